"""Make the contents of a run's summary.json and model card (README.md): data, settings, results, how to load it."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.evaluation.generation import fenced
from gpt2modern.evaluation.loss import METRICS
from gpt2modern.files import is_hub_name, public_name
from gpt2modern.pages import render
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.state import TrainState
from modeling_gpt2modern import GPT2ModernForCausalLM

EVALUATION_FILE, WEIGHTS_FILE = "eval.json", "model.safetensors"


def summarize(
    config: TrainConfig,
    state: TrainState,
    rows: list[dict[str, Any]],
    *,
    model: GPT2ModernForCausalLM,
    plan: BatchPlan,
    eval_blocks: PackedBlocks,
) -> dict[str, Any]:
    """Return the contents of summary.json after `state.step` steps. rows: all rows of metrics.jsonl.

    The results under the names in METRICS are those of the last evaluation, or None if there was no evaluation.
    """
    loss = state.evaluation.get("eval_loss")  # the only result in checkpoints of earlier versions
    results = {} if loss is None else {name: metric.of(loss, eval_blocks) for name, metric in METRICS.items()}
    losses = [row["loss"] for row in rows if row.get("loss") is not None]  # a skipped update has none
    tokens_seen = plan.tokens_seen(state.step)
    return {
        "params": model.num_parameters(),
        "steps": state.step,
        "tokens_seen": tokens_seen,
        "train_loss": losses[-1] if losses else None,
        **(dict.fromkeys(METRICS) | results | state.evaluation),
        "tokens_per_second": tokens_seen / state.wall_time_s,
        "wall_time_s": state.wall_time_s,
        "mixed_precision": config.mixed_precision,
        "num_processes": plan.num_processes,
        "eval_blocks": min(len(eval_blocks), config.eval_blocks or len(eval_blocks)),
        "peak_memory_gib": max([row.get("peak_memory_gib", 0.0) for row in rows], default=None),
    }


def public_settings(config: TrainConfig, *, card: bool = False) -> dict[str, Any]:
    """Return the settings that `config.chosen` returns, with names in place of paths, so that anyone may read them."""
    places = ("data_dir", "output_dir", "model_name_or_path", "resume_from_checkpoint")
    settings = config.chosen(card=card)
    if "eval_tasks" in settings:
        tasks = (text.partition("=") for text in settings["eval_tasks"])
        settings["eval_tasks"] = [f"{name}{sign}{file and public_name(file)}" for name, sign, file in tasks]
    return settings | {name: public_name(settings[name]) for name in places if name in settings}


def model_card(
    config: TrainConfig,
    summary: dict[str, Any],
    *,
    name: str,
    base_model: str | None,
    samples: list[dict[str, Any]],
    manifest: dict[str, Any],
    num_eval_blocks: int,
) -> str:
    """Return the model card (Markdown) of a model trained from scratch (base_model: None) or from a Hub id or folder.

    summary: from `summarize`; name: of the Hub repository or folder; samples: rows of samples.jsonl, of which those of
    the last step are shown; manifest: of the prepared data; num_eval_blocks: size of the validation split in blocks.
    """
    source = _source_name(manifest)
    datasets = [each for each in (source, config.data_dir) if is_hub_name(each)]
    base, facts = base_model and public_name(base_model), manifest["source"].get("card", {})
    eval_results = _eval_results(datasets[0] if datasets else None, manifest, summary)
    return render(
        "model_card.md",
        card=ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["gpt2-modern", "custom_code"],
            license=config.license,
            language=facts.get("language"),
            datasets=datasets or None,
            base_model=base if is_hub_name(base_model) else None,
            model_name=name if eval_results else None,  # a key of the results' own
            eval_results=eval_results,
        ),
        name=name,
        base=base,
        config=config,
        summary=summary,
        manifest=manifest,
        facts=facts,
        source=source,
        prompt=repr("def " if source == "stdlib" else "The"),
        results=[*((metric.label, _rounded(summary[key])) for key, metric in METRICS.items()), *with_errors(summary)],
        num_eval_blocks=num_eval_blocks,
        training_time=_rounded(summary["wall_time_s"]),
        samples=[
            {"step": sample["step"], "block": fenced(sample["prompt"] + sample["text"])}
            for sample in samples
            if sample["step"] == samples[-1]["step"]
        ],
        settings=sorted((public_settings(config, card=True) | {"num_processes": summary["num_processes"]}).items()),
    )


def _source_name(manifest: dict[str, Any]) -> str:
    name_or_files = manifest["source"]["name"]
    return public_name(name_or_files) if isinstance(name_or_files, str) else ", ".join(name_or_files)


def _eval_results(dataset_id: str | None, manifest: dict[str, Any], summary: dict[str, Any]) -> list[EvalResult] | None:
    if any(summary[name] is None for name in METRICS):
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id or "text",
            dataset_name=_source_name(manifest),
            dataset_split="validation",
            metric_type=name.removeprefix("eval_"),
            metric_name=metric.label,
            metric_value=round(summary[name], 4),
        )
        for name, metric in METRICS.items()
    ]


def with_evaluation(card: str, report: dict[str, Any]) -> str:
    """Return the text of a model card with a section about a report of eval.run, in place of an earlier one."""
    lines = ["## Evaluation by eval.run\n", "| result | value |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in with_errors(report["results"])]
    for name, protocol in report["protocol"].items():
        items = [f"{protocol['items']:,} items"] if "items" in protocol else []
        lines.append(f"\n{name}: {'; '.join([protocol['dataset'], *items, *protocol.get('scorers', [])])}.")
    lines.append(f"\nVersions: {', '.join(' '.join(each) for each in report['versions'].items())}.\n\n")
    card = re.sub(r"^## Evaluation by eval.run\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    before, heading, after = card.partition("## Data\n\n| property |")  # longer than what a sample may contain
    return before + "\n".join(lines) + heading + after


def with_errors(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and text of each result whose standard error is there too, as name_stderr."""
    errors = {name: results[f"{name}_stderr"] for name in results if f"{name}_stderr" in results}
    return [(name, f"{_rounded(results[name])}{f' +- {error:.2g}' if error else ''}") for name, error in errors.items()]


def _rounded(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
