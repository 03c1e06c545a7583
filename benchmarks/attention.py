"""Compare the time of attention implementations, forward and backward, in the shape that a training step has.

    python -m benchmarks.attention [--seq_len 256 512 1024 2048] [--compiled true]

The implementations take turns in one process. Their order decides which one trains on a CPU without
--attn_implementation (`gpt2modern.training.models.fastest_attention`).
"""

import itertools
import time
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import measuring
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.models import COMPILE_OPTIONS
from modeling_gpt2modern import GPT2ModernConfig
from modeling_gpt2modern.modeling_gpt2modern import GPT2ModernAttention

HEADER = ["dtype", "tokens in a row", "documents in a row", "implementation", "ms (p20 to p80)", "time over sdpa's"]
MEASURES = ["benchmarks/attention.py:seconds", "modeling_gpt2modern/attention_gpt2modern.py"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(kw_only=True)
class AttentionConfig:
    seq_len: list[int] = setting(default_factory=lambda: [256, 512, 1024, 2048], help="tokens in a row", least=1)
    num_tokens: int = setting(2048, "tokens in a batch", least=1)
    num_attention_heads: int = setting(12, "heads, of 64 dimensions", least=1)
    attn_implementation: list[str] = setting(default_factory=lambda: ["blockwise"], help="to compare with sdpa")
    compiled: bool = setting(False, "compile the implementations")
    repetitions: int = setting(9, "number of timed passes of each", least=1)
    device: str | None = setting("cpu", "cpu or cuda")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)


def seconds(config: AttentionConfig, dtype: torch.dtype, seq_len: int, documents: int) -> dict[str, list[float]]:
    """Return the seconds of the passes of each implementation, which take turns; the first pass is not counted."""
    device, heads = measuring.choose_device(config.device), config.num_attention_heads
    width, batch = heads * 64, max(1, config.num_tokens // seq_len)
    settings = GPT2ModernConfig.from_preset("gpt2", hidden_size=width, num_attention_heads=heads, num_hidden_layers=1)
    module = GPT2ModernAttention(settings, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(batch, seq_len, heads, 64, generator=generator).to(device, dtype) for _ in range(4)]
    states = [each.transpose(1, 2).requires_grad_() for each in drawn[:3]]  # (batch, heads, seq_len, 64)
    mask = None
    if documents > 1:
        document = torch.arange(seq_len, device=device) * documents // seq_len
        mask = (document[:, None] == document).tril().expand(batch, 1, seq_len, seq_len)

    def one_pass(function) -> None:
        output, _ = function(module, *states, mask, dropout=0.0, scaling=0.125)  # (batch, seq_len, heads, 64)
        torch.autograd.grad(output, states, drawn[3])

    functions = {name: ALL_ATTENTION_FUNCTIONS[name] for name in dict.fromkeys(["sdpa", *config.attn_implementation])}
    if config.compiled:
        torch.compiler.reset()
        functions = {name: torch.compile(each, options=COMPILE_OPTIONS) for name, each in functions.items()}
    times = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(config.repetitions + 1), functions.items()):
        start = time.perf_counter()
        one_pass(function)
        measuring.synchronize(device)
        times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(AttentionConfig, argv, __doc__)
        device, variant = measuring.choose_device(config.device), "compiled" * config.compiled
        report = evidence.Report("attention", config.output, device, argv, measures=MEASURES, variant=variant)
        lines, results = [HEADER], []
        for dtype, seq_len, documents in tqdm([*itertools.product(DTYPES, config.seq_len, (1, 3))], unit="case"):
            times = seconds(config, DTYPES[dtype], seq_len, documents)
            for name, each in times.items():
                ratio = median(each) / median(times["sdpa"])
                facts = {"dtype": dtype, "seq_len": seq_len, "documents": documents, "implementation": name}
                results.append(facts | {"seconds": each, "ratio": ratio})
                cell = evidence.median_and_spread([1000 * value for value in each], ".1f")
                lines.append([dtype, f"{seq_len:,}", str(documents), name, cell, f"{ratio:.2f}"])
        method = f"""
{config.num_tokens:,} tokens in a batch, {config.num_attention_heads} heads of 64 dimensions, {
            "" if config.compiled else "not "
        }compiled; n = {config.repetitions} passes each, in turn, after one. CPU threads: {torch.get_num_threads()}."""
        question = "which attention is the fastest in a training step?"
        report.write("Attention", question, method, lines, results=results)


if __name__ == "__main__":
    main()
