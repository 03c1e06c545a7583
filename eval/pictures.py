"""Draw the pictures of reports from the numbers in their JSON files, and tell which numbers a picture shows."""

import hashlib
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gpt2modern.evaluation.curves import plot_training_curves

DRAWN_FROM = "Source"  # the text of a PNG file with a digest of the numbers that it shows


def draw_bars(bars: dict[str, Any], path: Path) -> None:
    """Draw the median of each name's numbers as a bar from the first down, with its spread and note, as a PNG file.
    bars: `unit`, and as lists `names`, `values` (a list of numbers for each name), `notes`."""
    low, middle, high = np.array([np.quantile(values, (0.2, 0.5, 0.8)) for values in bars["values"]]).T
    figure = Figure(figsize=(10, 0.8 + 0.4 * len(middle)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(bars["names"], middle, xerr=[middle - low, high - middle])
    axis.bar_label(drawn, bars["notes"], padding=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(f"{bars['unit']}: median, p20 to p80")
    figure.savefig(path, dpi=120)


def draw_variants(variants: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean validation loss of each variant of an ablation over tokens, in a band from the lowest seed to the
    highest. The base is black, those that do not differ from it are gray; the legend has the order of the final losses.
    variants: `label`, `verdict`, and `curve`, a list of [tokens, mean, lowest, highest loss in nats/token]."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axis = figure.subplots()
    colours = cycle(f"C{number}" for number in range(10) if number != 7)  # C7 is gray
    for index, each in enumerate(sorted(variants, key=lambda each: -each["curve"][-1][1])):
        tokens, mean, low, high = zip(*each["curve"], strict=True)
        style = "-" if each["verdict"] == "base" else ("-", "--", ":", "-.")[index % 4]
        colour = {"base": "black", "inconclusive": "0.6"}.get(each["verdict"]) or next(colours)
        width = 2.5 if each["verdict"] == "base" else 1.5
        axis.plot(tokens, mean, style, color=colour, linewidth=width, label=each["label"])
        axis.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    curves = [each["curve"] for each in variants]
    losses = [loss for curve in curves for _, *of in curve[len(curve) // 4 :] for loss in of]  # after the steep start
    axis.set_ylim(min(losses) - 0.05, max(losses) + 0.05)
    axis.set(xlabel="training tokens", ylabel="validation loss (nats/token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", title="final loss, mean +- sd")
    figure.savefig(path, dpi=120)


PICTURES: dict[str, Callable[[Any, Path], None]] = {
    "bars": draw_bars,
    "variants": draw_variants,
    "training": plot_training_curves,  # rows of metrics.jsonl
}


def digest(drawing: dict[str, Any]) -> str:
    """Return a hash of what a picture shows. drawing: `kind`, a key of PICTURES, and `numbers`, which JSON can hold."""
    return hashlib.sha256(json.dumps(drawing, sort_keys=True).encode()).hexdigest()[:16]


def is_drawn_from(path: Path, drawing: dict[str, Any]) -> bool:
    """Return whether `path` is a picture that `draw` has made of these numbers."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(DRAWN_FROM) == digest(drawing)


def draw(drawing: dict[str, Any], path: Path) -> None:
    """Draw a picture as a PNG file that keeps the digest of its numbers."""
    PICTURES[drawing["kind"]](drawing["numbers"], path)
    text = PngInfo()
    text.add_text(DRAWN_FROM, digest(drawing))
    with Image.open(path) as image:
        image.save(path, pnginfo=text)
