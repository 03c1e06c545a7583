"""README.md of a finished run: what was trained on what, how it went, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A {{ parameters }}-parameter GPT-2-class language model (preset `{{ preset }}`), trained with GPT2-Modern on
{{ corpus }}.

## Use

```python
from transformers import pipeline

# the path of this folder, or its name on the Hub
generate = pipeline("text-generation", model="{{ name }}", trust_remote_code=True)
print(generate({{ prompt }}, max_new_tokens=64)[0]["generated_text"])
```

The model's code is part of this folder, hence `trust_remote_code=True`. It is a base model: it continues text and
follows no instructions.

## Results

| measure | value |
|---|---|
{% for label, value in results -%}
| {{ label }} | {{ value }} |
{% endfor %}
![training curves](training_curves.png)

## Training

Every setting is in `resolved_config.yaml`; the numbers of each logged step are in `metrics.jsonl`.

| setting | value |
|---|---|
{% for label, value in settings -%}
| {{ label }} | {{ value }} |
{% endfor %}
"""


def write_model_card(
    path: Path,
    *,
    name: str,
    preset: str,
    manifest: dict[str, Any],
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write the card from the data's manifest, `summary` (the contents of summary.json) and the run's `settings`."""
    name_or_files = manifest["source"]["name"]
    source_name = name_or_files if isinstance(name_or_files, str) else ", ".join(name_or_files)
    is_stdlib = source_name == "stdlib"
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["gpt2-modern", "custom_code"],
        ),
        template_str=TEMPLATE,
        name=name,
        preset=preset,
        parameters=f"{summary['params']:,}",
        corpus="the source code of Python's standard library" if is_stdlib else f"`{source_name}`",
        prompt=repr("def " if is_stdlib else "The"),
        results=[
            ("validation loss (nats/token)", _rounded(summary["eval_loss"])),
            ("validation bits per byte", _rounded(summary["bits_per_byte"])),
            ("tokens seen", f"{summary['tokens_seen']:,}"),
            ("optimizer steps", f"{summary['steps']:,}"),
            ("training time (s)", _rounded(summary["wall_time_s"])),
            ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ],
        settings=sorted(settings.items()),
    )
    card.save(path)


def _rounded(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
