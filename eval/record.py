"""Write a report of a finished run: its loss on the whole validation split, speed, memory, curves, last samples.

    python -m eval.record --run out/demo --data data/stdlib [--length_factors 2 4]

The report names the commit of the checkout: record a run before the code changes. Of a run of eval.ablation it also
names the commits that trained it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from eval import evidence
from eval.perplexity import measure_lengths
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.curves import read_rows
from gpt2modern.evaluation.loss import METRICS, evaluate_loss
from gpt2modern.evaluation.tasks import PUBLISHED
from gpt2modern.loading import best_device, load_model
from gpt2modern.settings import setting
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.records import SETTINGS_FILE

DEFAULTS = vars(TrainConfig(dry_run="true"))
MEASURES = [*evidence.TRAINING_CODE, *(f"gpt2modern/training/{name}.py" for name in ("batches", "schedules"))]
MEASURES += ["eval/perplexity.py:measure,measure_lengths,windows", *evidence.DATA_CODE]


@dataclass
class RecordConfig:
    run: str = setting(help="output folder of train_accelerate.py")
    data: str = setting(help="folder written by prepare_data.py that the run was trained on")
    length_factors: list[int] | None = setting(None, "also the loss in blocks of these multiples of the block size")
    output: str = setting("eval/reports", "folder that the report is written to")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(RecordConfig, argv, __doc__)
        run, blocks, device = Path(config.run), PackedBlocks(config.data, "validation"), best_device()
        if not (run / "summary.json").exists():
            raise GPT2ModernError(f"--run {run} has no summary.json; finish the run with train_accelerate.py")
        refuse_other_tokenizer(config.run, blocks)
        name = run.resolve().name
        report = evidence.Report(
            "record",
            config.output,
            device,
            argv,
            package="eval",
            measures=MEASURES + evidence.recipe_code(name),
            variant=name,
        )
        commits = filter(None, [*evidence.commits_of(run), report.provenance["commit"]])
        report.provenance["commit"] = ", ".join(dict.fromkeys(commits)) or None
        logged, samples = read_rows(run / "metrics.jsonl"), read_rows(run / "samples.jsonl")
        model = load_model(config.run, flag="--run").to(device)
        loss = evaluate_loss(model, blocks, batch_size=8)
        results = json.loads((run / "summary.json").read_text()) | {"validation_tokens": blocks.tokens}
        results |= {key: metric.of(loss, blocks) for key, metric in METRICS.items()}
        results["samples"] = [each for each in samples if each["step"] == samples[-1]["step"]]
        results["lengths"] = measure_lengths(model, blocks, config.length_factors or [])
        settings = yaml.safe_load((run / SETTINGS_FILE).read_text())
        chosen = {key: value for key, value in settings.items() if value != DEFAULTS.get(key, value)}
        results["settings"] = chosen = {key: value for key, value in chosen.items() if not key.endswith("_dir")}
        results["rates"] = [row["tokens_per_second"] for row in logged if "tokens_per_second" in row]
        numbers = [(key, value) for key, value in results.items() if isinstance(value, int | float)]
        rows = [["measure", "value"], *([k, f"{v:,}" if isinstance(v, int) else f"{v:,.3f}"] for k, v in numbers)]
        for each in results["lengths"]:
            of_length = f"{each['loss']:.3f}" if "loss" in each else each["note"]
            rows.append([f"loss in blocks of {each['block_size']}", of_length])
        method = f"""
Loss: all {blocks.tokens:,} tokens of the validation split of {blocks.data_dir.name}. Other values: of the training, at
{evidence.median_and_spread(results["rates"], ",.0f")} tokens/s, median (p20 to p80) of what was logged. One seed.
Settings of the training: `{" ".join(f"{key}={value}" for key, value in chosen.items())}`."""
        texts = (f"```text\n{each['prompt']}{each['text']}\n```" for each in results["samples"])
        remarks = "\n\n".join(["Samples of the last step, not selected:", *texts]) if results["samples"] else ""
        shown = ("tokens_seen", "loss", "learning_rate", "eval_loss", *PUBLISHED)
        numbers = [{key: row[key] for key in shown if key in row} for row in logged]
        question, drawing = f"what has the run {name} reached?", {"kind": "training", "numbers": numbers}
        report.write(f"The run {name}", question, method, rows, remarks, results, drawing)


if __name__ == "__main__":
    main()
