"""README.md of a run: what was trained on what, how it went, how to load it."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ description }}

## Use

```python
from transformers import pipeline

# the path of this folder, or its name on the Hub
generate = pipeline("text-generation", model="{{ name }}", trust_remote_code=True)
print(generate({{ prompt }}, max_new_tokens=64)[0]["generated_text"])
```

The model's code is part of this folder, hence `trust_remote_code=True`. It continues text; unless it was trained on
conversations it follows no instructions.

## Results

| measure | value |
|---|---|
{% for label, value in results -%}
| {{ label }} | {{ value }} |
{% endfor %}
![training curves](training_curves.png)

{% if samples -%}
## Samples

What the model wrote after fixed prompts at step {{ samples[0].step }}, drawn at temperature 0.8 from the 50 likeliest
tokens, not chosen:
{% for sample in samples %}
{{ sample.block }}
{% endfor %}
{% endif -%}
## Data

| property | value |
|---|---|
{% for label, value in data -%}
| {{ label }} | {{ value }} |
{% endfor %}
## Training

The numbers of each logged step are in `metrics.jsonl`; `resolved_config.yaml` repeats the run.

| setting | value |
|---|---|
{% for label, value in settings -%}
| {{ label }} | {{ value }} |
{% endfor %}
## Licence

{{ licence }} The modelling code is Apache-2.0.
"""


def write_model_card(
    path: Path,
    *,
    name: str,
    preset: str,
    base_model: str | None,
    license: str | None,
    manifest: dict[str, Any],
    summary: dict[str, Any],
    evaluated_blocks: str,
    max_steps: int,
    samples: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """Write the card of a model that was trained from scratch or from `base_model` (Hub id or folder).

    summary: the contents of summary.json; evaluated_blocks: those that its loss is of; samples: rows of samples.jsonl,
    of which the last step's are shown.
    """
    dataset_id, base_id = _hub_id(_source_name(manifest)), _hub_id(base_model)
    eval_results = _eval_results(dataset_id, manifest, summary)
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["gpt2-modern", "custom_code"],
            license=license,
            datasets=dataset_id,
            base_model=base_id,
            model_name=name if eval_results else None,  # a key of the results' own
            eval_results=eval_results,
        ),
        template_str=TEMPLATE,
        name=name,
        title=name.split("/")[-1],
        description=_description(preset, base_model, manifest, summary, max_steps),
        prompt=repr("def " if _source_name(manifest) == "stdlib" else "The"),
        results=[
            ("validation loss (nats/token)", _rounded(summary["eval_loss"])),
            ("validation bits per byte", _rounded(summary["bits_per_byte"])),
            ("validation blocks", evaluated_blocks),
            ("tokens seen", f"{summary['tokens_seen']:,}"),
            ("optimizer steps", f"{summary['steps']:,}"),
            ("training time (s)", _rounded(summary["wall_time_s"])),
            ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ],
        samples=[
            {"step": sample["step"], "block": _fenced(sample["prompt"] + sample["text"])}
            for sample in samples
            if sample["step"] == samples[-1]["step"]
        ],
        data=_data(manifest, summary),
        settings=sorted(settings.items()),
        licence=f"The weights: {license}." if license else "Who trained the weights has stated none for them.",
    )
    card.save(path)


def _description(
    preset: str, base_model: str | None, manifest: dict[str, Any], summary: dict[str, Any], max_steps: int
) -> str:
    kind = f"A {summary['params']:,}-parameter GPT-2-class language model"
    if base_model is None:
        kind += f" (preset `{preset}`)"
    else:
        kind += f", trained further from `{_hub_id(base_model) or Path(base_model).name}`"
    is_stdlib = _source_name(manifest) == "stdlib"
    corpus = "the source code of Python's standard library" if is_stdlib else f"`{_source_name(manifest)}`"
    text = f"{kind}, trained with GPT2-Modern on {corpus}."
    if summary["steps"] < max_steps:
        text += f" This is a checkpoint: step {summary['steps']:,} of {max_steps:,}."
    return text


def _hub_id(name: str | None) -> str | None:
    """`name` if it reads owner/name and is no path here."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _source_name(manifest: dict[str, Any]) -> str:
    name_or_files = manifest["source"]["name"]
    return name_or_files if isinstance(name_or_files, str) else ", ".join(name_or_files)


def _data(manifest: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    train, validation = manifest["splits"]["train"], manifest["splits"]["validation"]
    tokenizer = manifest["tokenizer"]["name"]
    kind = f"`{tokenizer}`" if tokenizer else "BPE trained on this data"
    return [
        ("source", _source_name(manifest)),
        ("training documents", f"{train['documents']:,}"),
        ("training tokens", f"{train['tokens']:,} (seen {summary['tokens_seen'] / train['tokens']:.2f} times)"),
        ("validation tokens", f"{validation['tokens']:,}"),
        ("validation text", manifest.get("validation_rule", "not recorded")),
        ("tokenizer", f"{kind}, {manifest['vocab_size']:,} entries"),
        ("packing", f"{manifest['packing']}, blocks of {manifest['block_size']:,} tokens"),
    ]


def _eval_results(dataset_id: str | None, manifest: dict[str, Any], summary: dict[str, Any]) -> list[EvalResult] | None:
    measures = {"loss": "Loss (nats/token)", "bits_per_byte": "Bits per byte"}
    values = {"loss": summary["eval_loss"], "bits_per_byte": summary["bits_per_byte"]}
    if values["loss"] is None:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id or "text",
            dataset_name=_source_name(manifest),
            dataset_split="validation",
            metric_type=metric,
            metric_name=label,
            metric_value=round(values[metric], 4),
        )
        for metric, label in measures.items()
    ]


def _fenced(text: str) -> str:
    """`text` as a block of Markdown whose fence is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _rounded(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
