"""Metrics as modules of the package `evaluate`, one per folder."""

from pathlib import Path
from typing import Any

from gpt2modern.errors import GPT2ModernError


def load_metric(name: str) -> Any:
    """Return the `evaluate.Metric` of the folder `name` beside this file; it keeps its inputs in memory. Raises
    GPT2ModernError if evaluate is not installed."""
    try:
        import evaluate  # noqa: PLC0415  optional (extra eval), and its import takes 5 s
    except ModuleNotFoundError:
        raise GPT2ModernError("evaluate is not installed; run python -m pip install -e '.[eval]'") from None
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
