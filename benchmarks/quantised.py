"""Measure a trained model in int8 and 4 bit: size in memory, change of the perplexity, tokens/s of generation.

    python -m benchmarks.quantised --model DIR --data DATA [--weights "torchao int8"] [--repetitions 5]

DIR is the output folder of a run, whose stock model is measured too; DATA is its data. While transformers loads the
weights, torchao and bitsandbytes (extra `quantise`) quantise them, as a user's `quantization_config` asks for. Every
measurement has a process of its own; they are made in turn. What this machine cannot do is a row with the reason.
"""

import io
import json
import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils import logging as transformers_logging

from benchmarks import measuring
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.evaluation.loss import evaluated_blocks, loss_from_logits
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting

try:
    from torchao import quantization as ao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
except ImportError:  # the extra `quantise`; the report says so
    ao = None

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
GROUP_SIZE = 64  # weights that share a scale: torchao's are set to the number of bitsandbytes
WEIGHTS = {  # what makes the quantization_config of transformers; fp32 and bf16 have none
    "bf16": lambda: None,
    "fp32": lambda: None,
    "torchao int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
    "torchao int8, activations too": lambda: TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig()),
    "torchao int4": lambda: TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=GROUP_SIZE)),
    "torchao int4 for CPUs": lambda: TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE)),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes NF4": lambda: BitsAndBytesConfig(**NF4),
}
HEADER = ["class", "weights", "MiB", "loss over bf16", "perplexity", "prompt, tokens/s", "over bf16"]
HEADER += ["generated, tokens/s", "over bf16"]
MEASURES = ["modeling_gpt2modern", "benchmarks/measuring.py:generation_seconds,TIMED_CALLS"]
MEASURES += ["benchmarks/quantised.py:WEIGHTS,NF4,GROUP_SIZE,load,num_bytes,measure"]


@dataclass(kw_only=True)
class QuantisedConfig:
    model: str = setting(help="folder of a trained model")
    data: str = setting(help="folder that prepare_data.py wrote")
    weights: list[str] = setting(default_factory=lambda: [*WEIGHTS], help="to compare with bf16", choices=[*WEIGHTS])
    eval_blocks: int = setting(32, "number of validation blocks that the loss is measured on", least=2)
    repetitions: int = setting(5, "number of measurements of each row", least=1)
    device: str | None = setting("cpu", "cpu or cuda")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)


def load(config: QuantisedConfig, folder: str, weights: str) -> PreTrainedModel:
    """Load the model in a subfolder of --model with such weights. Raises GPT2ModernError with the reason of the library
    that cannot quantise them, which transformers only logs. Call it in a new process: nothing is logged on stderr."""
    log = io.StringIO()
    transformers_logging.disable_default_handler()
    transformers_logging.disable_progress_bar()
    transformers_logging.add_handler(logging.StreamHandler(log))
    transformers_logging.set_verbosity_warning()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning in each layer
    options = {"dtype": torch.float32 if weights == "fp32" else torch.bfloat16, "device_map": {"": config.device}}
    try:
        options["quantization_config"] = WEIGHTS[weights]()
        return AutoModelForCausalLM.from_pretrained(config.model, subfolder=folder, **options)
    except Exception as error:  # of transformers, torchao or bitsandbytes
        reasons = re.findall(r"^\w*Error: (.+)", log.getvalue(), re.MULTILINE)
        raise GPT2ModernError(reasons[0] if reasons else first_line(error)) from None


def num_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all tensors of a model, with the scales of the quantised ones. Tied tensors count once."""
    tensors, storages = [*model.state_dict().values()], {}
    for tensor in tensors:  # which grows
        if is_traceable_wrapper_subclass(tensor):  # torchao's, whose own dtype is that of the result
            tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@torch.no_grad()
def measure(config: QuantisedConfig, folder: str, weights: str) -> dict[str, Any]:
    """Return the bytes of a model, its loss (nats/token) in each validation block, and the tokens/s of reading 3/4 of a
    block as prompt and of generating the last quarter. Call it in a new process."""
    model, blocks = load(config, folder, weights), PackedBlocks(config.data, "validation")
    chosen = evaluated_blocks(len(blocks), max_blocks=config.eval_blocks, from_start=False)
    result = {"bytes": num_bytes(model), "losses": []}
    for index in chosen:
        nats = loss_from_logits(model, blocks.__getitems__([index]).to(model.device)).item()
        result["losses"].append(nats / blocks.num_targets([index]))
    model.generation_config.eos_token_id = None  # so that every row generates all tokens
    new = blocks.block_size // 4
    prompt = blocks.__getitems__([0])[:, : blocks.block_size - new]
    first, last = (measuring.generation_seconds(model, prompt, count, pad_token_id=0) for count in (1, new))
    return result | {"prompt": prompt.shape[1] / first, "generated": (new - 1) / (last - first)}


def cells(found: list[dict[str, Any]] | str, base: list[dict[str, Any]] | str) -> list[str]:
    """Return a row's cells from its repetitions, or its error message, and from those of bf16."""
    if problem := next((each for each in (found, base) if isinstance(each, str)), None):
        return [f"not possible: {problem}", *[""] * (len(HEADER) - 3)]
    losses, size = found[0]["losses"], found[0]["bytes"]
    changes = np.subtract(losses, base[0]["losses"])  # paired, as the blocks are the same
    change = f"{changes.mean():+.4f} +- {changes.std(ddof=1) / len(changes) ** 0.5:.4f}"
    row = [f"{size / 2**20:.1f}", change, f"{np.exp(np.mean(losses)):.3f}"]
    for key in ("prompt", "generated"):
        speeds, of_base = ([each[key] for each in rows] for rows in (found, base))
        row += [evidence.median_and_spread(speeds, ",.0f")]
        row += [evidence.median_and_spread(np.divide(speeds, of_base), ".2f")]
    return row


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(QuantisedConfig, argv, __doc__)
        device, packages = measuring.choose_device(config.device), ("torchao", "bitsandbytes")
        report = evidence.Report("quantised", config.output, device, argv, *packages, measures=MEASURES)
        run, blocks = Path(config.model), PackedBlocks(config.data, "validation")
        if not (run / "summary.json").exists():
            raise GPT2ModernError(f"--model {run} has no summary.json; finish the run with train_accelerate.py")
        refuse_other_tokenizer(config.model, blocks)
        summary = json.loads((run / "summary.json").read_text())
        classes = {"": "GPT2ModernForCausalLM", "stock": summary.get("stock_class")}
        weights = dict.fromkeys(["bf16", *config.weights])
        rows = [(folder, each) for folder in classes if classes[folder] for each in weights]
        found = measuring.in_turn({row: (config.repetitions, partial(measure, config, *row)) for row in rows})
        method = f"""
Model: {summary["params"]:,} parameters after {summary["tokens_seen"]:,} tokens of training. \
Only the matrices of the layers are quantised, the default of transformers; the rest is in bf16. 4 bit: {GROUP_SIZE} \
weights share a scale. MiB: all tensors of the loaded model.
Loss (nats/token) and perplexity: {min(config.eval_blocks, len(blocks))} validation blocks of {blocks.block_size} \
tokens; the standard error is that of the differences in the same blocks.
Speed: greedy, one sequence, a prompt of 3/4 of a block, the last quarter generated; median of {measuring.TIMED_CALLS} \
calls after one. n = {config.repetitions} processes of each row, in turn: median (p20 to p80), ratios in the same turn.
Threads: {torch.get_num_threads()}."""
        question = "what do int8 and 4 bit cost in quality, and what do they gain in memory and speed?"
        lines = [[classes[row[0]], row[1], *cells(found[row], found[row[0], "bf16"])] for row in found]
        results = [{"class": classes[row[0]], "weights": row[1], "found": found[row]} for row in found]
        report.write("Quantised models", question, method, [HEADER, *lines], results=results)


if __name__ == "__main__":
    main()
