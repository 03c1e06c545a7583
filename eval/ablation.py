"""Train variants of a model with several seeds, and report which of them lower the validation loss, and by how much.

python -m eval.ablation --data_dir DATA --output_dir out/ablation --variants vanilla,+rope,+swiglu,modern,speedrun
    --tune learning_rate=0.0005,0.001,0.002,0.004,0.008 [--seeds 3] [--tokens 0.8M] [--matched params] [--jobs 2]

A variant is a base (vanilla, modern, modern-muon, speedrun, frontier) with changes, such as modern+relu2; +relu2
changes the first variant of the list. A change is a name from AXES, or a setting of the model or the trainer:
+rope_theta=1000, +weight_decay=0.
The same command continues a set of runs that was stopped, and skips the finished ones.
"""

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
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.evidence import DATA_CODE, Report, commits_of, current_commit, recipe_code
from gpt2modern.cli import find_recipe, one_line_errors, parse_arguments
from gpt2modern.cores import available_cores
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.evaluation.curves import read_rows
from gpt2modern.files import check_writable_folder, locked
from gpt2modern.loading import best_device
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.models import MODEL_SETTINGS, build_model, parse_config_overrides
from modeling_gpt2modern.configuration_gpt2modern import MLPS
from train_accelerate import train

MUON_RATES = (  # those of recipes/demo.yaml
    "optimizer=muon muon_learning_rate=0.03 embedding_learning_rate=0.2 learning_rate=0.008 lr_scheduler_type=linear "
    "warmup_ratio=0 min_lr_ratio=0 weight_decay=0"
)
BASES = {
    "vanilla": "model_preset=gpt2 embedding_dropout=0 attention_dropout=0 hidden_dropout=0",
    "modern": "model_preset=modern",
    "modern-muon": f"model_preset=modern-muon {MUON_RATES}",
    "speedrun": f"model_preset=speedrun {MUON_RATES}",
    "frontier": f"model_preset=frontier {MUON_RATES}",
}
AXES = {
    "rope": "position_embedding_type=rope",
    "rmsnorm": "norm_type=rmsnorm",
    "swiglu": "mlp_type=swiglu",  # of two thirds of the width, for as many parameters
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
TRAIN_SETTINGS = {field.name: field for field in fields(TrainConfig)}
DEFAULTS = {name: field.default for name, field in TRAIN_SETTINGS.items()}
NUMBER = r"\d*\.?\d+(e[+-]?\d+)?"
OF_A_RUN = ("config", "data_dir", "dry_run", "output_dir", "seed")  # eval.ablation sets them itself
MOST_UNEVEN = 1.2  # fastest seed / slowest seed: beyond it other programs have slowed some, and no speed is reported
SPEED_RUN = {"logging_steps": 5, "eval_steps": 0, "eval_blocks": 1, "save_steps": 0}
# The code that decides the losses, and what is said of them.
MEASURES = ["train_accelerate.py", "gpt2modern/evaluation/loss.py", "modeling_gpt2modern", *DATA_CODE]
MEASURES += ["eval/ablation.py:BASES,AXES,results_of,tokens_to_reach,pooled_sd,verdict,with_steps"]
MEASURES += [
    f"gpt2modern/training/{name}.py" for name in ("averaging", "batches", "models", "muon", "optimizers", "schedules")
]


@dataclass
class AblationConfig:
    data_dir: str = setting(help="folder from prepare_data.py")
    output_dir: str = setting(help="folder of the runs; later commands may add more of them")
    variants: str = setting(help="comma-separated: vanilla,+rope,modern; the others are compared with the first")
    recipe: str = setting("ablation", "recipe with sizes, batch, steps and precision: a YAML file or a shipped one")
    train_flags: str = setting("", "flags of train_accelerate.py that override the recipe", may_be_empty=True)
    seeds: int = setting(3, "runs per variant, with the seeds 1, 2, ...", least=1)
    tokens: str | None = setting(None, "training tokens per run, such as 0.8M; default: those of the recipe")
    matched: Literal["tokens", "params", "time"] = setting(
        "tokens", "what each variant has as much of as the first; params, outside of embeddings and head: by MLP width"
    )
    tune: list[str] = setting(
        default_factory=list, help="learning_rate=0.001,0.002,...: find the best for the first variant that uses it"
    )
    jobs: int | None = setting(
        None, "runs at a time, which share the cores; default: one per core, 1 on a GPU", least=1
    )
    report_only: bool = setting(False, "train nothing; report the finished runs")
    speed_steps: int = setting(
        30, "updates of a short run that measures the speed, for each variant and seed in turn; 0: none", least=0
    )
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)
        check_writable_folder("--output", self.output)
        if self.tokens is not None and not re.fullmatch(r"\d+(\.\d+)?[KMB]?", self.tokens):
            raise ValueError(f"--tokens {self.tokens} must be a number, such as 800000, 0.8M or 1.5B")
        for text in self.tune:
            key = text.partition("=")[0]
            if not re.fullmatch(rf"\w+={NUMBER}(,{NUMBER})+", text) or key not in TRAIN_SETTINGS or key in OF_A_RUN:
                raise ValueError(f"--tune {text} must be a setting of train_accelerate.py and numbers: key=1,2,3")
        names = self.variants.split(",")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--variants has {repeated[0]} twice; remove one")


class Run:
    """Describe one training run: its settings, and its folder, whose name has a hash of the settings and the data."""

    def __init__(self, config: TrainConfig, variant: str, folder: str, manifest: dict[str, Any]):
        # Without defaults, so that a later version with more settings still knows the run.
        chosen = {key: value for key, value in config.chosen(card=True).items() if value != DEFAULTS[key]}
        identity = json.dumps([chosen, manifest], sort_keys=True)
        name = re.sub(r"[^\w+=.-]", "_", variant.lstrip("+"))
        self.name = f"{name}-seed{config.seed}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self.folder = Path(folder, self.name)
        self.config = replace(config, output_dir=str(self.folder))
        self.tokens_per_step: int = config.total_batch_size

    @property
    def summary(self) -> dict[str, Any] | None:
        """Return the contents of summary.json, None if the run has not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def rows_with(self, name: str) -> list[tuple[int, float]]:
        """Return (tokens seen, value) of each row of metrics.jsonl that has a value of this name."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return [(row["tokens_seen"], row[name]) for row in rows if row.get(name) is not None]


class Ablation:
    """Plan the runs of an ablation. variants: by name, the settings with which each differs from the recipe, as text.
    Raises GPT2ModernError for an unknown variant, and for settings that are invalid or do not fit the data."""

    def __init__(self, config: AblationConfig):
        self.config = config
        flags = ["--config", str(find_recipe(config.recipe)), *shlex.split(config.train_flags)]
        recipe = parse_arguments(
            TrainConfig, [*flags, "--data_dir", config.data_dir, "--output_dir", config.output_dir]
        )
        self.blocks = PackedBlocks(config.data_dir, "train", recipe.block_size)
        batch = recipe.total_batch_size or self.blocks.block_size * int(recipe.per_device_train_batch_size)
        steps = recipe.max_steps
        if config.tokens is not None:
            unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(config.tokens[-1], 1)
            steps = max(1, round(float(config.tokens.rstrip("KMB")) * unit / batch))
        ratio = recipe.schedule.warmup_steps / recipe.max_steps
        recipe = replace(recipe, total_batch_size=batch, warmup_steps=None, warmup_ratio=ratio, export_stock="false")
        self.recipe = with_steps(recipe, steps)
        self.tokens = steps * batch
        if self.tokens > self.blocks.tokens:
            warn(
                f"each run takes {self.tokens:,} tokens, more than the {self.blocks.tokens:,} of the data: some repeat"
            )
        self.first, *others = config.variants.split(",")
        self.variants = {name: self.settings_of(name) for name in (self.first, *others)}
        if config.matched == "params":
            for name in others:
                self.match_parameters(self.variants[name])

    def settings_of(self, name: str) -> dict[str, str]:
        """Return the settings of a variant's base and changes. An MLP that becomes gated, or ceases to be, gets the
        width, a multiple of 8, at which it has as many parameters. Raises GPT2ModernError for an unknown name."""
        base, *axes = (self.first + name if name.startswith("+") else name).split("+")
        if base not in BASES:
            problem = f"{base!r} is no base" if base else "the first variant has no base that a change could change"
            raise GPT2ModernError(f"--variants {name}: {problem}; choose {', '.join(BASES)}, then +CHANGE")
        words = BASES[base].split()
        before = self.model(dict(word.split("=", 1) for word in words)).config
        for axis in axes:
            key = axis.partition("=")[0]
            if axis not in AXES and (key not in {*MODEL_SETTINGS, *TRAIN_SETTINGS} or key in OF_A_RUN):
                raise GPT2ModernError(
                    f"--variants {name}: {axis!r} is no change; choose from {', '.join(AXES)}, or give a setting of "
                    "the model or of train_accelerate.py as key=value"
                )
            words += AXES[axis].split() if axis in AXES else [axis]
        settings = dict(word.split("=", 1) for word in words)
        gated = MLPS[self.model(settings).config.mlp_type].gated
        if gated != MLPS[before.mlp_type].gated and "intermediate_size" not in settings:
            factor = 2 / 3 if gated else 3 / 2  # a gated MLP has three matrices, another two
            settings["intermediate_size"] = str(8 * round(before.intermediate_size * factor / 8))
        return settings

    def train_config(self, settings: dict[str, str]) -> TrainConfig:
        """Return the recipe with other settings, of the trainer and of the model."""
        overrides = parse_config_overrides(self.recipe.config_overrides)
        overrides = {key: json.dumps(value) for key, value in overrides.items()}
        overrides |= {key: value for key, value in settings.items() if key in MODEL_SETTINGS}
        flags = {key: value for key, value in settings.items() if key not in overrides}
        words = [word for key, value in flags.items() for word in (f"--{key}", *value.split())]  # lists: 1 2 4
        overrides = ",".join(f"{key}={value}" for key, value in overrides.items())
        typed = parse_arguments(TrainConfig, ["--dry_run", *words, f"--config_overrides={overrides}"])
        try:
            return replace(self.recipe, **{key: getattr(typed, key) for key in (*flags, "config_overrides")})
        except ValueError as error:
            raise GPT2ModernError(f"--recipe {self.config.recipe} with {settings}: {error}") from None

    def model(self, settings: dict[str, str]) -> PreTrainedModel:
        with torch.device("meta"):
            return build_model(self.train_config(settings), self.blocks)

    def parameters(self, settings: dict[str, str]) -> int:
        """Return the number of parameters outside of embeddings and head."""
        return sum(
            parameter.numel()
            for name, parameter in self.model(settings).named_parameters()
            if not re.search("embed_|value_embeddings|lm_head", name)
        )

    def match_parameters(self, settings: dict[str, str]) -> None:
        """Set the MLP width to the multiple of 8 at which the model has nearest to as many parameters as the first."""
        at_8, at_16 = (self.parameters(settings | {"intermediate_size": width}) for width in ("8", "16"))
        wanted = (self.parameters(self.variants[self.first]) - at_8) / (at_16 - at_8)
        if wanted < -0.5:
            raise GPT2ModernError(f"--matched params: no MLP is narrow enough for {settings}; use --matched tokens")
        settings["intermediate_size"] = str(8 * max(1, 1 + round(wanted)))

    def run(self, variant: str, seed: int, changes: dict[str, str] | None = None, **values: Any) -> Run:
        """Return the run of a variant with a seed. changes: further settings, as text; values: the same, typed."""
        settings = self.variants[variant] | (changes or {})
        config = self.train_config(settings)
        if "total_batch_size" in settings and "max_steps" not in settings:
            config = with_steps(config, max(1, round(self.tokens / config.total_batch_size)))
        config = replace(config, seed=seed, **values)
        return Run(config, variant, self.config.output_dir, self.blocks.manifest)


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Return `config` with another number of steps, and evaluations after the same shares of them."""
    eval_steps = config.eval_steps and max(1, round(config.eval_steps * steps / config.max_steps))
    return replace(config, max_steps=steps, eval_steps=eval_steps)


def train_run(run: Run, threads: int, step: Any) -> None:
    """Train a run in this process, which was started for it, and end the process. step: shared, the last update begun.
    If the process that has started this one is gone, the run is saved and stopped."""
    parent, told = multiprocessing.parent_process(), False

    def callback(event: str, **details: Any) -> None:
        nonlocal told
        step.value = details["step"]
        if not told and not parent.is_alive():
            told = True
            signal.raise_signal(signal.SIGTERM)

    os.setsid()  # Ctrl-C reaches only the parent: a second request to stop would end the run without saving it
    run.folder.mkdir(parents=True, exist_ok=True)
    output = os.open(run.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    torch.set_num_threads(threads)
    with one_line_errors(), locked(run.folder / ".run"):  # a process of a killed set may still be saving the run
        if run.summary is not None:
            return
        with (run.folder / "commits.txt").open("a") as file:
            print(current_commit(MEASURES) or "", file=file)
        if not train(run.config, callback)["stopped"]:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


class Workers:
    """Train runs, `jobs` at a time, each in a process of its own with its share of the cores, and show the progress.

    tokens: the number of all runs together, for the time left. failures: why runs have failed, by name.
    """

    def __init__(self, jobs: int, tokens: int):
        self.jobs, self.threads = jobs, max(1, available_cores(physical=True) // jobs)
        self.failures: dict[str, str] = {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train_accelerate"])  # imported once for all processes
        every = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a log file keeps every redrawing
        self.bar = tqdm(total=tokens, desc="ablation", unit="tok", unit_scale=True, mininterval=every)

    def train(self, runs: Sequence[Run]) -> None:
        """Train the runs that have not finished; returns when all have ended. On Ctrl-C, all are saved and stopped."""
        waiting, running = [], {}
        for run in runs:
            if run.summary is None:
                waiting.append(run)
            else:
                self._advance(run, 0, run.config.max_steps, was_trained_before=True)
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    run, step = waiting.pop(0), self.context.Value("q", 0)
                    process = self.context.Process(target=train_run, args=(run, self.threads, step))
                    running[process] = (run, step, 0)
                    process.start()
                wait([process.sentinel for process in running], timeout=1.0)
                for process, (run, step, seen) in list(running.items()):
                    now = step.value
                    if not seen and now:  # what a resumed run has trained before
                        self._advance(run, 0, now - 1, was_trained_before=True)
                        seen = now - 1
                    self._advance(run, seen, now)
                    running[process] = (run, step, now)
                    if process.exitcode is not None:
                        del running[process]
                        self._advance(run, now, run.config.max_steps)
                        self._finish(run, process.exitcode)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()

    def _advance(self, run: Run, seen: int, now: int, *, was_trained_before: bool = False) -> None:
        tokens = (now - seen) * run.tokens_per_step
        if was_trained_before and not self.bar.disable:
            self.bar.initial += tokens
        self.bar.update(tokens)

    def _finish(self, run: Run, exitcode: int) -> None:
        if summary := run.summary:
            self.bar.write(f"{run.name}: {summary['eval_loss']:.4f} after {summary['wall_time_s']:.0f} s")
            return
        lines = (run.folder / "output.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
        self.failures[run.name] = f"exit code {exitcode}: {lines[-1].removeprefix('error: ')[-300:]}"
        warn(f"{run.name} has failed, {self.failures[run.name]}")

    def first_failure(self) -> str:
        return "".join(f"; {name}: {problem}" for name, problem in list(self.failures.items())[:1])


def tune(ablation: Ablation, workers: Workers) -> list[dict[str, Any]]:
    """Train the first variant that uses a setting in --tune with each value, and give the best one to all variants that
    do not set it themselves. Returns what the report says of it."""
    tuned = []
    for text in ablation.config.tune:
        key, _, values = text.partition("=")
        kind = TRAIN_SETTINGS[key].metadata.get("optimizer")
        optimizers = {
            name: each.get("optimizer", ablation.recipe.optimizer) for name, each in ablation.variants.items()
        }
        users = [name for name, optimizer in optimizers.items() if kind in (None, optimizer)]
        if not users:
            raise GPT2ModernError(f"--tune {key}: no variant has --optimizer {kind}; remove it")
        values = sorted(values.split(","), key=float)
        runs = [ablation.run(users[0], 1, {key: value}) for value in values]
        workers.train([] if ablation.config.report_only else runs)
        losses = [run.summary["eval_loss"] if run.summary else None for run in runs]
        if not any(losses):
            raise GPT2ModernError(f"--tune {key}: no run has finished{workers.first_failure()}")
        best = values[losses.index(min(filter(None, losses)))]
        at_edge = best in (values[0], values[-1])
        if at_edge:
            warn(f"--tune {key}: the best value, {best}, is at the edge; add values beyond it")
        if key in (settings := ablation.variants[users[0]]):
            settings[key] = best
        ablation.recipe = replace(ablation.recipe, **{key: getattr(runs[values.index(best)].config, key)})
        losses = dict(zip(values, losses, strict=True))
        tuned.append({"setting": key, "variant": users[0], "losses": losses, "best": best, "at_edge": at_edge})
    return tuned


def tokens_of(runs: Sequence[Run]) -> int:
    """Return how many tokens the runs train on together."""
    return sum(run.config.max_steps * run.tokens_per_step for run in runs)


def in_turn(runs: dict[str, list[Run]]) -> list[Run]:
    """Return the runs of each variant as one list: first those of all variants with seed 1."""
    return [run for each in zip(*runs.values(), strict=True) for run in each]


def measure_speeds(ablation: Ablation, workers: Workers) -> dict[str, list[float]]:
    """Return the tokens/s of each variant: of each seed the median in a short run. All are trained in turn, so that
    other programs do not slow one variant only."""
    config, settings = ablation.config, SPEED_RUN | {"max_steps": ablation.config.speed_steps}
    seeds = range(1, 1 + config.seeds * bool(config.speed_steps))
    runs = {name: [ablation.run(name, seed, **settings) for seed in seeds] for name in ablation.variants}
    workers.bar.total += tokens_of(in_turn(runs))
    workers.train([] if config.report_only else in_turn(runs))
    logged = {name: [run.rows_with("tokens_per_second") for run in each if run.summary] for name, each in runs.items()}
    return {
        name: [statistics.median(speed for _, speed in rows[1:] or rows) for rows in each if rows]
        for name, each in logged.items()
    }


def match_time(ablation: Ablation, speeds: dict[str, list[float]]) -> dict[str, dict[str, int]]:
    """Return for each variant the settings with which it trains as long as the first, by their speeds."""
    if missing := [name for name, each in speeds.items() if not each]:
        raise GPT2ModernError(f"--matched time: the speed of {missing[0]} is unknown; use --speed_steps 30")
    first = statistics.median(speeds[ablation.first])
    shares = {name: statistics.median(each) / first for name, each in speeds.items()}
    changed = {
        name: with_steps(ablation.recipe, max(1, round(ablation.recipe.max_steps * share)))
        for name, share in shares.items()
    }
    return {name: {"max_steps": each.max_steps, "eval_steps": each.eval_steps} for name, each in changed.items()}


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


def pooled_sd(*groups: Sequence[float]) -> float | None:
    """Return the standard deviation of numbers around the mean of their group; None if no group has two."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom) if freedom else None


def verdict(losses: Sequence[float], base: Sequence[float]) -> str:
    """Return adopt or reject if the mean loss is lower or higher than the base's by more than 2 pooled standard
    deviations, otherwise inconclusive; without a second seed, which a deviation needs, one seed."""
    sd, difference = pooled_sd(losses, base), statistics.mean(losses) - statistics.mean(base)
    if sd is None:
        return "one seed"
    if abs(difference) <= 2 * sd:
        return "inconclusive"
    return "adopt" if difference < 0 else "reject"


def results_of(
    runs: Sequence[Run], base: Sequence[Run], speeds: Sequence[float], base_speeds: Sequence[float]
) -> dict[str, Any]:
    """Return the results of a variant's finished runs, and how they compare with those of the base. speeds: tokens/s,
    measured several times."""
    summaries, base_summaries = ([run.summary for run in each] for each in (runs, base))
    losses, base_losses = ([each["eval_loss"] for each in some] for some in (summaries, base_summaries))
    mean, target = statistics.mean(losses), statistics.mean(base_losses)
    speed, base_speed = (
        statistics.mean(some) if some and max(some) <= MOST_UNEVEN * min(some) else None
        for some in (speeds, base_speeds)
    )
    base_tokens = base_summaries[0]["tokens_seen"]
    curves = [run.rows_with("eval_loss") for run in runs]
    reached = [tokens_to_reach(curve, target) for curve in curves]
    tokens, time = (1.0, 1.0) if runs is base else (None, None)
    if runs is not base and None not in reached:
        tokens = statistics.mean(reached) / base_tokens
        time = tokens * base_speed / speed if speed and base_speed else None
    points = [(point[0][0], [loss for _, loss in point]) for point in zip(*curves, strict=False)]  # of all seeds
    return {
        "parameters": summaries[0]["params"],
        "tokens": summaries[0]["tokens_seen"],
        "losses": {run.config.seed: loss for run, loss in zip(runs, losses, strict=True)},
        "mean_loss": mean,
        "sd_loss": pooled_sd(losses),
        "difference": mean - target,
        "pooled_sd": pooled_sd(losses, base_losses),
        "tokens_to_base_loss": tokens,
        "time_to_base_loss": time,
        "each_tokens_to_base_loss": [each and each / base_tokens for each in reached],
        "each_tokens_per_second": list(speeds),
        "each_lowest": [min(curve, key=lambda point: point[1]) for curve in curves],
        "tokens_per_second": speed,
        "peak_memory_gib": max(each["peak_memory_gib"] for each in summaries),
        "verdict": "base" if runs is base else verdict(losses, base_losses),
        "curve": [[tokens, statistics.mean(of), min(of), max(of)] for tokens, of in points],
    }


def loss_text(result: dict[str, Any]) -> str:
    return f"{result['mean_loss']:.3f}" + ("" if result["sd_loss"] is None else f" +- {result['sd_loss']:.3f}")


def table_of(results: dict[str, dict[str, Any]], jobs: int) -> list[list[str]]:
    """Return the rows of the report's table, the header first."""
    rough = f" ({jobs} runs at a time)" if jobs > 1 else ""
    header = (
        "variant|parameters|loss, nats/token|difference|tokens to the base's loss|time to it|tokens/s|peak GiB|verdict"
    )
    rows = [[f"{cell}{rough if cell == 'tokens/s' else ''}" for cell in header.split("|")]]
    for name, each in results.items():
        shares = (each["tokens_to_base_loss"], each["time_to_base_loss"])
        numbers = [
            f"{each['parameters']:,}",
            f"{loss_text(each)} (n = {len(each['losses'])})",
            f"{each['difference']:+.3f}",
        ]
        unknown = "uneven" if each["each_tokens_per_second"] else "-"
        missing = "not reached" if shares[0] is None else unknown
        numbers += [missing if share is None else f"{share:.1%}" for share in shares]
        speed = each["tokens_per_second"]
        numbers += [unknown if speed is None else f"{speed:,.0f}", f"{each['peak_memory_gib']:.2f}"]
        rows.append([f"`{name}`", *numbers, each["verdict"]])
    return rows


def tuning_text(tuned: dict[str, Any]) -> str:
    losses = ["-" if loss is None else f"{loss:.3f}" for loss in tuned["losses"].values()]
    values = [f"**{value}**" if value == tuned["best"] else value for value in tuned["losses"]]
    lines = [[tuned["setting"], *values], ["---"] * (1 + len(values)), ["loss", *losses]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    edge = " It is at the edge of the values: there may be a better one." if tuned["at_edge"] else ""
    return (
        f"Tuning of `{tuned['variant']}`, seed 1. Variants without a value of their own have the best.{edge}\n\n{table}"
    )


def write_report(
    report: Report,
    ablation: Ablation,
    runs: dict[str, list[Run]],
    speeds: dict[str, list[float]],
    tuned: list[dict[str, Any]],
    workers: Workers,
) -> None:
    """Write the table, tuning and picture of the finished runs. Raises GPT2ModernError if the base has none."""
    config, recipe, first = ablation.config, ablation.recipe, ablation.first
    finished = {name: [run for run in each if run.summary] for name, each in runs.items()}
    if not finished[first]:
        raise GPT2ModernError(f"the base {first} has no finished run{workers.first_failure()}")
    commits = dict.fromkeys(commit for each in finished.values() for run in each for commit in commits_of(run.folder))
    report.provenance["commit"] = ", ".join(commits) or report.provenance["commit"]
    shorter = [name for name, each in finished.items() if each and each[0].summary["tokens_seen"] != ablation.tokens]
    exceptions = f" but {' and '.join(shorter)}" if shorter and config.matched == "tokens" else ""
    results = {
        name: results_of(each, finished[first], speeds[name], speeds[first])
        | {
            "settings": ablation.variants[name],
            "non_embedding_parameters": ablation.parameters(ablation.variants[name]),
        }
        for name, each in finished.items()
        if each
    }
    missing = [run.name for each in runs.values() for run in each if not run.summary]
    flags = f" with `{config.train_flags}`" if config.train_flags else ""
    method = f"""
Recipe `{Path(config.recipe).stem}`{flags}: {recipe.max_steps:,} steps of {recipe.total_batch_size:,} tokens, together
{ablation.tokens:,}, {ablation.tokens / ablation.blocks.tokens:.2g} epochs of {ablation.blocks.data_dir.name};
the same {config.matched} for all variants{exceptions}; {workers.jobs} runs at a time, {workers.threads} threads each.
A variant is adopted or rejected if its mean final validation loss differs from that of `{first}` by more than 2 pooled
standard deviations of the seeds. Tokens and time to the mean final loss of `{first}`, in % of its own: linear between
evaluations, mean over the seeds; `not reached` if not by every seed. tokens/s, unless `-`: of {config.speed_steps}
steps, all variants in turn, mean of {config.seeds}; `uneven` if these differ by more than {MOST_UNEVEN - 1:.0%}."""
    remarks = [*map(tuning_text, tuned)]
    remarks += [f"Not finished: {', '.join(missing)}."] if missing else []
    remarks += [f"Failed: {name}, {problem}." for name, problem in workers.failures.items()]
    facts = {"base": first, "matched": config.matched, "tokens": ablation.tokens, "tuning": tuned, "variants": results}
    facts |= {"jobs": workers.jobs, "threads": workers.threads, "not_finished": missing, "failures": workers.failures}
    question = f"which changes lower the validation loss of `{first}`, and by how much?"
    rows = table_of(results, workers.jobs)
    numbers = [
        {"label": f"{name}: {loss_text(each)}"} | {key: each[key] for key in ("verdict", "curve")}
        for name, each in results.items()
    ]
    drawing = {"kind": "variants", "numbers": numbers}
    report.write(f"Ablation of {first}", question, method, rows, "\n\n".join(remarks), facts, drawing)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(AblationConfig, argv, __doc__)
        device = best_device()
        measures, variant = MEASURES + recipe_code(config.recipe), Path(config.output_dir).resolve().name
        origin = {"package": "eval", "measures": measures, "variant": variant}
        report = Report("ablation", config.output, device, argv, "accelerate", **origin)
        ablation = Ablation(config)
        jobs = config.jobs or (available_cores(physical=True) if device.type == "cpu" else 1)
        expected = tokens_of([ablation.run(name, 1) for name in ablation.variants]) * config.seeds
        workers = Workers(jobs, expected + ablation.tokens * sum(text.count(",") + 1 for text in config.tune))
        tuned = tune(ablation, workers)
        speeds = measure_speeds(ablation, workers)
        steps = match_time(ablation, speeds) if config.matched == "time" else {}
        seeds = range(1, config.seeds + 1)
        runs = {name: [ablation.run(name, seed, **steps.get(name, {})) for seed in seeds] for name in ablation.variants}
        workers.bar.total += tokens_of(in_turn(runs)) - expected  # others with --matched time
        workers.train([] if config.report_only else in_turn(runs))
        workers.bar.close()
        write_report(report, ablation, runs, speeds, tuned, workers)
        if workers.failures:
            raise GPT2ModernError(f"{len(workers.failures)} runs have failed{workers.first_failure()}")


if __name__ == "__main__":
    main()
