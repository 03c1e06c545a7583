"""Train variants of a model with several seeds, and report which of them lower the validation loss, and by how much.

python -m eval.ablation --data_dir DATA --output_dir out/ablation --variants vanilla,+rope,+swiglu,modern,speedrun
    --tune learning_rate=0.0005,0.001,0.002,0.004,0.008 [--seeds 3] [--tokens 0.8M] [--matched params] [--jobs 2]

A variant is a base (vanilla, modern, speedrun) with changes, such as modern+relu2; +relu2 changes the first variant of
the list. A change is a name from AXES, or a setting of the model or the trainer: +rope_theta=1000, +weight_decay=0.
The same command continues a set of runs that was stopped, and skips the finished ones.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.evidence import Report
from gpt2modern.cli import find_recipe, one_line_errors, parse_arguments
from gpt2modern.cores import available_cores
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import atomic_file, check_writable_folder, locked
from gpt2modern.loading import best_device
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.models import MODEL_SETTINGS, build_model, parse_config_overrides
from gpt2modern.training.records import read_rows
from modeling_gpt2modern.configuration_gpt2modern import MLPS
from train_accelerate import train

BASES = {
    "vanilla": "model_preset=gpt2 embedding_dropout=0 attention_dropout=0 hidden_dropout=0",
    "modern": "model_preset=modern",
    "speedrun": "model_preset=speedrun optimizer=muon muon_learning_rate=0.03 embedding_learning_rate=0.2 "
    "learning_rate=0.008 lr_scheduler_type=linear warmup_ratio=0 min_lr_ratio=0 weight_decay=0",  # recipes/demo.yaml
}
AXES = {
    "rope": "position_embedding_type=rope",
    "rmsnorm": "norm_type=rmsnorm",
    "swiglu": "mlp_type=swiglu",  # and the width at which it has as many parameters
    "relu2": "mlp_type=relu2",
    "qk_norm": "use_qk_norm=true",
    "muon": "optimizer=muon",
    "no_bias": "attention_bias=false mlp_bias=false",
    "untied": "tie_word_embeddings=false",
    "unet": "use_unet_skips=true",
    "x0": "use_x0_residual=true",
    "value_residual": "use_value_residual=true",
    "embedding_norm": "use_embedding_norm=true",
    "softcap": "final_logit_softcapping=30.0",
    "zero_init": "zero_init_projections=true",
    "sliding_window": "sliding_window=64",
    "gqa": "num_key_value_heads=2",
    "wsd": "lr_scheduler_type=warmup_stable_decay",
    "document_masking": "document_masking=true",
    "z_loss": "z_loss=0.0001",
}
SPEED_STEPS = 30  # of the run that measures a variant's speed, for --matched time
EMBEDDINGS = ("embed_tokens", "embed_positions", "lm_head")
MEASURES = [
    "train_accelerate.py",
    *(f"gpt2modern/training/{name}.py" for name in ("batches", "models", "optimizers", "schedules")),
    "gpt2modern/evaluation/loss.py",
    "modeling_gpt2modern",
]


@dataclass
class AblationConfig:
    data_dir: str = setting(help="folder from prepare_data.py")
    output_dir: str = setting(help="folder of the runs; more of them can be added by later commands")
    variants: str = setting(help="comma-separated: vanilla,+rope,modern; the others are compared with the first")
    recipe: str = setting("ablation", "recipe with sizes, batch, steps and precision: a YAML file or a shipped one")
    train_flags: str = setting("", "flags of train_accelerate.py that override the recipe's values", may_be_empty=True)
    seeds: int = setting(3, "runs per variant, with the seeds 1, 2, ...", least=1)
    tokens: str | None = setting(None, "training tokens per run, such as 0.8M; default: those of the recipe")
    matched: Literal["tokens", "params", "time"] = setting(
        "tokens",
        "what all variants have as much of as the first: tokens; parameters outside of embeddings and head, by the MLP "
        "width; training time, by the number of steps",
    )
    tune: list[str] = setting(
        default_factory=list, help="learning_rate=0.001,0.002,...: choose the best for the first variant that uses it"
    )
    jobs: int | None = setting(
        None, "runs at a time, which share the cores; default: one per core, 1 on a GPU", least=1
    )
    report_only: bool = setting(False, "train nothing; report the finished runs")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)
        check_writable_folder("--output", self.output)
        if self.tokens is not None and not re.fullmatch(r"\d+(\.\d+)?[KMB]?", self.tokens):
            raise ValueError(f"--tokens {self.tokens} must be a number, such as 800000, 0.8M or 1.5B")
        for text in self.tune:
            key, _, values = text.partition("=")
            if key not in (field.name for field in fields(TrainConfig)) or not all(values.split(",")):
                raise ValueError(f"--tune {text} must be a setting of train_accelerate.py and its values: key=1,2,3")
        names = self.variants.split(",")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--variants has {repeated[0]} twice; remove one")


@dataclass
class Variant:
    """Hold the settings, as text by name, with which a variant differs from the recipe. own: names of those that tuning
    does not replace."""

    name: str
    settings: dict[str, str]
    own: set[str]


@dataclass(frozen=True)
class Run:
    """Hold the settings of one training run and the folder with its records, whose name has a hash of the settings."""

    config: TrainConfig
    folder: Path

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def loss(self) -> float:
        """Return the validation loss at the end (nats/token), infinite if the run has not finished."""
        return self.summary["eval_loss"] if self.is_finished else math.inf

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Return (tokens seen, validation loss) of each evaluation."""
        return [(row["tokens_seen"], row["eval_loss"]) for row in self.rows if row.get("eval_loss") is not None]


@dataclass
class Ablation:
    """Plan the runs of an ablation: which settings each variant has. Raises GPT2ModernError for an unknown variant, and
    for settings that contradict each other or do not fit the data."""

    config: AblationConfig
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self):
        config = self.config
        flags = ["--config", str(find_recipe(config.recipe)), *shlex.split(config.train_flags)]
        flags += ["--data_dir", config.data_dir, "--output_dir", config.output_dir]
        self.recipe = parse_arguments(TrainConfig, flags)
        self.blocks = PackedBlocks(config.data_dir, "train", self.recipe.block_size)
        if self.recipe.warmup_steps is not None:
            ratio = self.recipe.warmup_steps / self.recipe.max_steps
            self.recipe = replace(self.recipe, warmup_steps=None, warmup_ratio=ratio)
        batch = self.recipe.total_batch_size or self.blocks.block_size * int(self.recipe.per_device_train_batch_size)
        self.recipe = replace(self.recipe, total_batch_size=batch)
        if config.tokens is not None:
            unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(config.tokens[-1], 1)
            self.recipe = with_steps(self.recipe, round(float(config.tokens.rstrip("KMB")) * unit / batch))
        needed = self.recipe.max_steps * batch
        if needed > self.blocks.tokens:
            self.warn(f"each run trains on {needed:,} tokens, but the data has {self.blocks.tokens:,}: it repeats them")
        first, *others = config.variants.split(",")
        self.variants = [self.variant(name, first) for name in (first, *others)]
        if config.matched == "params":
            target = self.parameters(self.variants[0].settings)
            for variant in self.variants[1:]:
                variant.settings["intermediate_size"] = self.matched_width(variant.settings, target)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        warn(message)

    def variant(self, name: str, first: str) -> Variant:
        base, *axes = (first + name if name.startswith("+") else name).split("+")
        if base not in BASES:
            raise GPT2ModernError(f"--variants {name}: {base!r} is no base; choose from {', '.join(BASES)}, or +CHANGE")
        before = dict(word.split("=", 1) for word in BASES[base].split())
        settings = dict(before)
        for axis in axes:
            text = AXES.get(axis, axis)
            keys = {word.partition("=")[0] for word in text.split()}
            if "=" not in text or not keys <= {*MODEL_SETTINGS, *(field.name for field in fields(TrainConfig))}:
                raise GPT2ModernError(
                    f"--variants {name}: {axis!r} is no change; choose from {', '.join(AXES)}, or give a setting of the "
                    "model or of train_accelerate.py as key=value"
                )
            settings |= dict(word.split("=", 1) for word in text.split())
        old, new = (self.model(each).config for each in (before, settings))
        if (gated := MLPS[new.mlp_type].gated) != MLPS[old.mlp_type].gated and "intermediate_size" not in settings:
            width = old.intermediate_size * (2 / 3 if gated else 3 / 2)  # a gated MLP has three matrices, not two
            settings["intermediate_size"] = str(8 * round(width / 8))
        return Variant(name, settings, {key for key in settings if "rate" in key})

    def changed(self, settings: dict[str, str]) -> TrainConfig:
        """Return the recipe with other settings, of the trainer and of the model."""
        flags = {key: value for key, value in settings.items() if key not in MODEL_SETTINGS}
        overrides = parse_config_overrides(self.recipe.config_overrides)
        overrides = {key: json.dumps(value) for key, value in overrides.items()}
        overrides |= {key: value for key, value in settings.items() if key not in flags}
        flags["config_overrides"] = ",".join(f"{key}={value}" for key, value in overrides.items())
        typed = parse_arguments(TrainConfig, ["--dry_run", *(f"--{key}={value}" for key, value in flags.items())])
        try:
            return replace(self.recipe, **{key: getattr(typed, key) for key in flags})
        except ValueError as error:
            raise GPT2ModernError(f"--recipe {self.config.recipe} with {settings}: {error}") from None

    def model(self, settings: dict[str, str]) -> PreTrainedModel:
        with torch.device("meta"):
            return build_model(self.changed(settings), self.blocks)

    def parameters(self, settings: dict[str, str]) -> int:
        """Return the number of parameters outside of embeddings and head."""
        named = self.model(settings).named_parameters()
        return sum(each.numel() for name, each in named if not any(part in name for part in EMBEDDINGS))

    def matched_width(self, settings: dict[str, str], target: int) -> str:
        """Return the MLP width, a multiple of 8, at which the model has nearest to `target` parameters outside of
        embeddings and head."""
        at_8, at_16 = (self.parameters(settings | {"intermediate_size": str(width)}) for width in (8, 16))
        return str(8 * max(1, 1 + round((target - at_8) / (at_16 - at_8))))

    def run(self, variant: Variant, seed: int, steps: int | None = None, **changes: Any) -> Run:
        """Return the run of a variant with a seed; `steps` and `changes` replace settings of it."""
        config = replace(self.changed(variant.settings), seed=seed)
        config = replace(with_steps(config, steps or config.max_steps), **changes)
        identity = [config.chosen(card=True), self.blocks.manifest]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w+=.-]", "_", variant.name.lstrip("+"))
        folder = Path(self.config.output_dir, f"{name}-seed{seed}-{digest}")
        return Run(replace(config, output_dir=str(folder)), folder)


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Return `config` with another number of steps, and evaluations at the same shares of them."""
    if steps < 1:
        raise GPT2ModernError(f"--tokens are less than one step of {config.total_batch_size:,} tokens; give more")
    eval_steps = config.eval_steps and max(1, round(config.eval_steps * steps / config.max_steps))
    return replace(config, max_steps=steps, eval_steps=eval_steps)


def train_run(config: TrainConfig, threads: int, step: Any) -> None:
    """Train one run in this process, which was started for it, and end the process. `step`: a shared number, the last
    update begun. If the process that has started this one is gone, the run is saved and stopped."""
    folder, parent, told = Path(config.output_dir), multiprocessing.parent_process(), False

    def callback(event: str, **details: Any) -> None:
        nonlocal told
        step.value = details["step"]
        if not told and not parent.is_alive():
            told = True
            signal.raise_signal(signal.SIGTERM)

    folder.mkdir(parents=True, exist_ok=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    torch.set_num_threads(threads)
    with one_line_errors(), locked(folder / ".run"):  # the process of a killed set may still be saving this run
        stopped = train(config, callback)["stopped"]
        if not stopped:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    sys.exit(75 if stopped else 0)


class Workers:
    """Train runs, `jobs` at a time, each in a process of its own with its share of the cores, and show the progress.

    tokens: the number that all runs have together, for the time left. failures: why runs have failed, by folder.
    """

    def __init__(self, jobs: int, tokens: int):
        self.jobs, self.threads = jobs, max(1, available_cores(physical=True) // jobs)
        self.failures: dict[str, str] = {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train_accelerate"])  # imported once for all processes
        every = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a log file keeps every redrawing
        self.bar = tqdm(total=tokens, desc="ablation", unit="tok", unit_scale=True, mininterval=every)

    def train(self, runs: Sequence[Run]) -> None:
        """Train the runs that have not finished; returns when all have. On Ctrl-C, all are saved and stopped."""
        waiting, running = [], {}
        for run in {run.folder: run for run in runs}.values():
            if run.is_finished:
                self.bar.initial += (tokens := run.config.max_steps * run.config.total_batch_size)
                self.bar.update(tokens)
            else:
                waiting.append(run)
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    run, step = waiting.pop(0), self.context.Value("q", 0)
                    process = self.context.Process(target=train_run, args=(run.config, self.threads, step))
                    running[process] = [run, step, 0]
                    process.start()
                wait([process.sentinel for process in running], timeout=1.0)
                for process, progress in list(running.items()):
                    self._update(progress)
                    if process.exitcode is not None:
                        self._finish(process.exitcode, *running.pop(process))
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()

    def _update(self, progress: list) -> None:
        run, step, seen = progress
        if not seen and step.value:  # what a resumed run had already trained took no time
            self.bar.initial += (step.value - 1) * run.config.total_batch_size
        progress[2] = step.value
        self.bar.update((progress[2] - seen) * run.config.total_batch_size)

    def _finish(self, exitcode: int, run: Run, step: Any, seen: int) -> None:
        self.bar.update((run.config.max_steps - seen) * run.config.total_batch_size)
        if run.is_finished:
            self.failures.pop(run.folder.name, None)
            self.bar.write(f"{run.folder.name}: {run.loss:.4f} after {run.summary['wall_time_s']:.0f} s")
            return
        lines = (run.folder / "output.txt").read_text(errors="replace").strip().splitlines() or [""]
        self.failures[run.folder.name] = f"exit code {exitcode}: {lines[-1].removeprefix('error: ')[:300]}"
        warn(f"{run.folder.name} has failed: {self.failures[run.folder.name]}")


def tune(ablation: Ablation, workers: Workers) -> list[dict[str, Any]]:
    """Train the first variant that uses a setting with each of its values in --tune, and give the best value to all
    variants that do not set it themselves. Returns what the report says of it."""
    tuned = []
    for text in ablation.config.tune:
        key, _, values = text.partition("=")
        optimizer = next(each for each in fields(TrainConfig) if each.name == key).metadata.get("optimizer")
        users = [each for each in ablation.variants if optimizer in (None, ablation.changed(each.settings).optimizer)]
        if not users:
            raise GPT2ModernError(f"--tune {key}: no variant has the optimizer {optimizer}; remove it")
        first = users[0]
        runs = {
            value: ablation.run(replace(first, settings=first.settings | {key: value}), seed=1)
            for value in sorted(values.split(","), key=float)
        }
        if not ablation.config.report_only:
            workers.train(list(runs.values()))
        losses = {value: run.loss if run.is_finished else None for value, run in runs.items()}
        best = min(runs, key=lambda value: runs[value].loss)
        if losses[best] is None:
            raise GPT2ModernError(f"--tune {key}: no run has finished{first_failure(workers)}")
        at_edge = best in (next(iter(runs)), next(reversed(runs)))
        if at_edge:
            ablation.warn(f"--tune {key}: the best value, {best}, is at the edge; add values beyond it")
        for variant in ablation.variants:
            if variant is first or key not in variant.own:
                variant.settings[key] = best
        tuned.append({"setting": key, "variant": first.name, "losses": losses, "best": best, "at_edge": at_edge})
    return tuned


def first_failure(workers: Workers) -> str:
    return "".join(f"; {name}: {problem}" for name, problem in list(workers.failures.items())[:1])


def steps_of_same_time(ablation: Ablation, workers: Workers) -> list[int]:
    """Return for each variant the number of steps that take as long as the first variant's, by a short run of each."""
    changes = {"steps": SPEED_STEPS, "eval_steps": 0, "eval_blocks": 1, "save_steps": 0, "logging_steps": 5}
    runs = [ablation.run(variant, 1, **changes) for variant in ablation.variants]
    if not ablation.config.report_only:
        workers.train(runs)
    if missing := [run.folder.name for run in runs if not run.is_finished]:
        raise GPT2ModernError(f"--matched time: the speed of {missing[0]} is not measured{first_failure(workers)}")
    speeds = [statistics.median(row["tokens_per_second"] for row in run.rows[1:]) for run in runs]
    return [max(1, round(ablation.recipe.max_steps * speed / speeds[0])) for speed in speeds]


def tokens_to_reach(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return the tokens after which a curve first has a loss of at most `target`, linear between evaluations: at most
    those of the first evaluation, if it is there already; None if no evaluation is."""
    before = None
    for tokens, loss in curve:
        if loss <= target:
            share = 1.0 if before is None else (before[1] - target) / (before[1] - loss)
            return tokens if before is None else before[0] + share * (tokens - before[0])
        before = tokens, loss
    return None


def spread(*groups: Sequence[float]) -> float | None:
    """Return the standard deviation in groups of numbers around their group's mean, pooled; None without a pair."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom) if freedom else None


def verdict(losses: Sequence[float], base: Sequence[float]) -> str:
    """Return adopt or reject if the mean loss is lower or higher than the base's by more than 2 pooled standard
    deviations, otherwise inconclusive."""
    sd, difference = spread(losses, base), statistics.mean(losses) - statistics.mean(base)
    if sd is None or abs(difference) <= 2 * sd:
        return "inconclusive"
    return "adopt" if difference < 0 else "reject"


def summarize(runs: Sequence[Run], base: Sequence[Run], variant: Variant, parameters: int) -> dict[str, Any]:
    """Return the results of a variant, from its finished runs and those of the base."""
    losses, base_losses = [run.loss for run in runs], [run.loss for run in base]
    target, base_tokens = statistics.mean(base_losses), base[0].summary["tokens_seen"]
    base_time = base_tokens / statistics.mean(run.summary["tokens_per_second"] for run in base)
    reached = [tokens_to_reach(run.curve, target) for run in runs]
    tokens = time = None
    if runs is base:
        tokens = time = 1.0
    elif None not in reached:
        tokens = statistics.mean(reached) / base_tokens
        times = [each / run.summary["tokens_per_second"] for each, run in zip(reached, runs, strict=True)]
        time = statistics.mean(times) / base_time
    points = list(zip(*(run.curve for run in runs), strict=False))  # one per evaluation: (tokens, loss) of each seed
    return {
        "settings": variant.settings,
        "parameters": runs[0].summary["params"],
        "parameters_without_embeddings": parameters,
        "tokens": runs[0].summary["tokens_seen"],
        "losses": {run.config.seed: run.loss for run in runs},
        "mean_loss": statistics.mean(losses),
        "sd_loss": spread(losses),
        "difference": statistics.mean(losses) - target,
        "pooled_sd": spread(losses, base_losses),
        "tokens_to_base_loss": tokens,
        "time_to_base_loss": time,
        "tokens_per_second": statistics.mean(run.summary["tokens_per_second"] for run in runs),
        "peak_memory_gib": max(run.summary["peak_memory_gib"] for run in runs),
        "verdict": "base" if runs is base else verdict(losses, base_losses),
        "curve": [
            [point[0][0], *(f([loss for _, loss in point]) for f in (statistics.mean, min, max))] for point in points
        ],
    }


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the mean validation loss of each variant over tokens, with a band from the lowest to the highest seed. The
    base is black, and only those that differ from it are in colour; the legend is in the order of the final losses."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axis = figure.subplots()
    colours = iter([f"C{number}" for number in range(10) if number != 7] * 9)  # C7 is gray
    for index, (name, each) in enumerate(sorted(results.items(), key=lambda item: -item[1]["mean_loss"])):
        tokens, mean, low, high = zip(*each["curve"], strict=True)
        differs, is_base = each["verdict"] in ("adopt", "reject"), each["verdict"] == "base"
        colour = "black" if is_base else next(colours) if differs else "0.65"
        style = {"color": colour, "linestyle": "-" if differs or is_base else ["--", ":", "-."][index % 3]}
        sd = "" if each["sd_loss"] is None else f" ± {each['sd_loss']:.3f}"
        axis.plot(tokens, mean, label=f"{name}  {mean[-1]:.3f}{sd}", linewidth=2.5 if is_base else 1.5, **style)
        axis.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    every = [loss for each in results.values() for _, loss, *_ in each["curve"][max(1, len(each["curve"]) // 4) :]]
    if every:  # without the first quarter, in which the losses fall from ln(V)
        axis.set_ylim(min(every) - 0.05, max(every) + 0.05)
    axis.set_xlabel("training tokens")
    axis.set_ylabel("validation loss (nats/token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", title="mean of the last evaluation ± sd", reverse=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def table(results: dict[str, dict[str, Any]], jobs: int) -> list[list[str]]:
    """Return the rows of the report's table, the header first."""
    indicative = f" (indicative: {jobs} runs at a time)" if jobs > 1 else ""
    header = ["variant", "parameters", "loss, nats/token", "difference", "tokens to the base's loss"]
    header += [f"time to it{indicative}", f"tokens/s{indicative}", "peak GiB", "verdict"]
    rows = [header]
    for name, each in results.items():
        sd = "" if each["sd_loss"] is None else f" +- {each['sd_loss']:.3f}"
        shares = (each["tokens_to_base_loss"], each["time_to_base_loss"])
        rows.append(
            [
                f"`{name}`",
                f"{each['parameters']:,}",
                f"{each['mean_loss']:.3f}{sd} (n = {len(each['losses'])})",
                f"{each['difference']:+.3f}",
                *("not reached" if share is None else f"{share:.0%}" for share in shares),
                f"{each['tokens_per_second']:,.0f}",
                f"{each['peak_memory_gib']:.2f}",
                each["verdict"],
            ]
        )
    return rows


def tuning_table(tuned: dict[str, Any]) -> str:
    cells = [("-" if loss is None else f"{loss:.3f}") for loss in tuned["losses"].values()]
    values = [f"**{value}**" if value == tuned["best"] else value for value in tuned["losses"]]
    lines = [[tuned["setting"], *values], ["---"] * (len(cells) + 1), ["loss", *cells]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Tuning of `{tuned['variant']}`, seed 1; the best value is used for all that do not set it:\n\n{text}\n"


def write_report(
    report: Report, ablation: Ablation, runs: dict[str, list[Run]], tuned: list[dict[str, Any]], workers: Workers
) -> None:
    """Write table, tuning and picture of the finished runs. Raises GPT2ModernError if the base has none."""
    config, recipe = ablation.config, ablation.recipe
    finished = {name: [run for run in each if run.is_finished] for name, each in runs.items()}
    first = ablation.variants[0].name
    if not finished[first]:
        raise GPT2ModernError(f"the base {first} has no finished run{first_failure(workers)}")
    results = {
        each.name: summarize(finished[each.name], finished[first], each, ablation.parameters(each.settings))
        for each in ablation.variants
        if finished[each.name]
    }
    missing = [run.folder.name for each in runs.values() for run in each if not run.is_finished]
    picture = report.path.with_suffix(".png")
    plot(results, picture)
    tokens = recipe.max_steps * recipe.total_batch_size
    method = f"""
Recipe `{config.recipe}`{f" with {config.train_flags}" if config.train_flags else ""}: {recipe.max_steps:,} steps of
{recipe.total_batch_size:,} tokens ({tokens / 1e6:.2f}M), the same {config.matched}. Data: {ablation.blocks.data_dir.name},
{ablation.blocks.tokens:,} tokens. {workers.jobs} runs at a time, {workers.threads} threads each. A variant is adopted or
rejected if its mean loss differs from that of `{first}` by more than 2 pooled standard deviations of the seeds. Tokens
and time to the base's mean final loss: in % of the base's, linear between evaluations, mean over the seeds."""
    remarks = [f"![validation loss over training tokens]({picture.name})", *map(tuning_table, tuned)]
    remarks += [f"Warning: {warning}." for warning in ablation.warnings]
    remarks += [f"Not finished: {', '.join(missing)}."] if missing else []
    remarks += [f"Failed: {name} ({problem})." for name, problem in workers.failures.items()]
    report.write(
        f"Ablation of {first}",
        f"which changes lower the validation loss of `{first}`, and by how much?",
        method,
        table(results, workers.jobs),
        "\n\n".join(remarks),
        results={
            "base": first,
            "matched": config.matched,
            "tokens": tokens,
            "jobs": workers.jobs,
            "threads": workers.threads,
            "tuning": tuned,
            "variants": results,
            "not_finished": missing,
            "failures": workers.failures,
        },
    )


@contextlib.contextmanager
def reserved(config: AblationConfig) -> Iterator[None]:
    """Keep other ablations out of --output_dir while this one trains."""
    if config.report_only:
        yield
        return
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        with locked(Path(config.output_dir, ".ablation"), seconds=0):
            yield
    except BlockingIOError:
        raise GPT2ModernError(
            f"another ablation is training in --output_dir {config.output_dir}; wait until it ends, or use another folder"
        ) from None
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {config.output_dir} cannot be written ({error.strerror})") from None


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(AblationConfig, argv, __doc__)
        device = best_device()
        report = Report("ablation", config.output, device, argv, "accelerate", package="eval", measures=MEASURES)
        ablation = Ablation(config)
        seeds = range(1, config.seeds + 1)
        jobs = config.jobs or (available_cores(physical=True) if device.type == "cpu" else 1)
        count = len(ablation.variants) * config.seeds + sum(len(text.split(",")) - 1 for text in config.tune)
        with reserved(config):
            workers = Workers(jobs, count * ablation.recipe.max_steps * ablation.recipe.total_batch_size)
            tuned = tune(ablation, workers)
            steps = [None] * len(ablation.variants)
            if config.matched == "time":
                steps = steps_of_same_time(ablation, workers)
            planned = list(zip(ablation.variants, steps, strict=True))
            runs = {each.name: [ablation.run(each, seed, number) for seed in seeds] for each, number in planned}
            if not config.report_only:
                workers.train([each[index] for index in range(config.seeds) for each in runs.values()])
            workers.bar.close()
        write_report(report, ablation, runs, tuned, workers)
        if workers.failures:
            raise GPT2ModernError(f"{len(workers.failures)} runs have failed{first_failure(workers)}")


if __name__ == "__main__":
    main()
