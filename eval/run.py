"""Evaluate a model on several tasks, and write one JSON with results, versions and protocol.

python -m eval.run --model DIR --tasks perplexity,hellaswag,lambada --data DATA [--hellaswag FILE] [--lambada FILE]
"""

import gpt2modern  # noqa: F401  first, as it refuses a deleted working directory  # isort: skip
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval import perplexity
from eval.metrics import load_metric
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.tasks import TASKS, evaluate_tasks, prepare_tasks
from gpt2modern.files import check_writable_file, public_name, sha256_of, write_json
from gpt2modern.loading import load_model, longest_sequence, num_token_ids
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.card import EVALUATION_FILE, WEIGHTS_FILE
from gpt2modern.training.distributed import Processes, joined_processes
from gpt2modern.training.records import show_evaluation


@dataclass
class RunConfig:
    model: str = setting(help="model folder, or Hub repository id (owner/name)")
    tasks: str = setting("perplexity,hellaswag,lambada", "tasks to evaluate on, separated by commas")
    data: str | None = setting(None, "prepared data, for perplexity; for eval.hellaswag and eval.lambada: their file")
    hellaswag: str | None = setting(None, "JSON-lines file of HellaSwag; default: Rowan/hellaswag on the Hub")
    lambada: str | None = setting(None, "JSON-lines file of LAMBADA; default: EleutherAI/lambada_openai on the Hub")
    limit: int | None = setting(None, "documents of HellaSwag and LAMBADA, the first ones; default: all", least=1)
    per_device_eval_batch_size: int = setting(8, "sequences per forward pass and process", least=1)
    output: str | None = setting(None, "JSON file to which the results are also written")
    update_card: bool = setting(False, f"write {EVALUATION_FILE} into the model folder; show it in its card and curves")

    def __post_init__(self):
        check_ranges(self)
        check_writable_file("--output", self.output)


def main(argv: list[str] | None = None, task: str | None = None, description: str = __doc__) -> None:
    with one_line_errors():
        config = parse_arguments(RunConfig, argv, description)
        if task and (config.hellaswag or config.lambada or config.tasks != RunConfig.tasks):
            raise GPT2ModernError(f"eval.{task} has one task, its file is --data; the others are of eval.run")
        own = {"hellaswag": config.hellaswag, "lambada": config.lambada, "perplexity": config.data}
        files = {task: config.data} if task else {name: own.get(name) for name in config.tasks.split(",")}
        if config.update_card and not Path(config.model, WEIGHTS_FILE).is_file():
            raise GPT2ModernError(f"--update_card: {config.model} is no folder with a {WEIGHTS_FILE}; omit the flag")
        if unknown := [name for name in files if name not in {"perplexity", *TASKS}]:
            known = ", ".join(["perplexity", *TASKS])
            raise GPT2ModernError(f"the task {unknown[0]!r} is unknown; choose from {known}")
        if "perplexity" in files and config.data is None:
            raise GPT2ModernError("--tasks perplexity needs --data with prepared data; give it, or other --tasks")
        with joined_processes("no", 3600) as (accelerator, processes):
            torch.set_float32_matmul_precision("highest")  # TF32 would change the fourth digit
            report = evaluate(config, files, accelerator.device, processes)
            if processes.is_main:
                print(json.dumps(report, indent=2))
                if config.output:
                    write_json(Path(config.output), report)
                if config.update_card:
                    write_json(Path(config.model, EVALUATION_FILE), report)
                    show_evaluation(Path(config.model))


def evaluate(
    config: RunConfig, files: dict[str, str | None], device: torch.device, processes: Processes
) -> dict[str, Any]:
    """Return the report of a model on the tasks in `files`: the data of each, None for its dataset on the Hub."""
    model = load_model(config.model).to(device)
    data, weights = files.pop("perplexity", None), Path(config.model, WEIGHTS_FILE)
    tasks = prepare_tasks([f"{name}={file or ''}" for name, file in files.items()], model, config.model, config.limit)
    with processes.errors_of_main():  # before the long work
        metrics = {task.name: load_metric(task.name).compute for task in tasks} if processes.is_main else {}
    batch_size, results, protocol = config.per_device_eval_batch_size, {}, {}
    if data is not None:
        blocks, longest = PackedBlocks(data, "validation"), longest_sequence(model)
        if longest is not None and blocks.block_size > longest:
            blocks = PackedBlocks(data, "validation", longest)
        refuse_other_tokenizer(config.model, blocks)
        refuse_larger_vocabulary(config.model, num_token_ids(model.config), blocks)
        measured = perplexity.measure(model, blocks, batch_size=batch_size, processes=processes)
        loss, error = measured["loss"], measured.pop("standard_error")
        for name in ("loss", "perplexity", "bits_per_byte"):  # errors of the last two by the delta method
            results[name] = value = measured.pop(name)
            results[f"{name}_stderr"] = error and error * (value if name == "perplexity" else value / loss)
        protocol["perplexity"] = {"dataset": f"{public_name(data)}, validation", **measured}
    options = {"metric_of": metrics.__getitem__} if metrics else {}
    shares = {"batch_size": batch_size, "process_index": processes.index, "num_processes": processes.count}
    results |= evaluate_tasks(tasks, model, **options, **shares)
    protocol |= {task.name: task.protocol for task in tasks}
    return {
        "model": public_name(config.model),
        "weights_sha256": sha256_of(weights) if weights.is_file() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "gpt2-modern")},
        "results": results,
        "protocol": protocol,
    }


if __name__ == "__main__":
    main()
