"""Measure training, memory and generation next to other implementations, and check the ratios against their targets.

    make bench                      # prepares text, then runs this
    python -m benchmarks.targets --data DATA --parts train --repetitions 5

DATA is a folder that prepare_data.py wrote. It takes about an hour on two quiet cores, and 10 minutes more when the
compiler's cache is empty. Every measurement has a process of its own; they are made in turn, --repetitions
times, and a ratio is formed of two in the same turn. The peers are transformers' GPT-2 and Llama, and a GPT-2 in the
form of nanoGPT, in the same sizes. The exit code is 1 if a ratio misses its target by more than its spread (p20 to
p80), or if a measurement failed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from benchmarks import measuring, throughput
from benchmarks.throughput import WARM_UP_STEPS, Row, StepConfig, measure_training
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.settings import setting

PARTS = ("train", "memory", "generation")
GENERATION_BATCHES = (1, 16)
PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT_TOKENS = 32, 64, 512
MEMORY_STEPS, MEMORY_TURNS = 1, 2  # timed in one process, and how often: memory hardly varies
HEADER = ["measured", "unit", "median (p20 to p80)", "peer", "its median (p20 to p80)", "n", "ratio (p20 to p80)"]
HEADER += ["target", "reached"]
MEASURES = {part: [*throughput.MEASURES, "benchmarks/targets.py:targets,measure"] for part in ("train", "memory")}
MEASURES["generation"] = ["modeling_gpt2modern", "benchmarks/targets.py:targets,measure,measure_generation"]
MEASURES["generation"] += ["benchmarks/measuring.py:generation_seconds,TIMED_CALLS"]


@dataclass(kw_only=True)
class TargetsConfig(StepConfig):
    data: str = setting(help="folder that prepare_data.py wrote")
    parts: list[str] = setting(default_factory=lambda: list(PARTS), help="parts to measure", choices=list(PARTS))
    block_size: int = setting(512, "tokens per sequence", least=1)
    per_device_train_batch_size: int = setting(4, "number of sequences in a step of the part train", least=1)
    memory_tokens: int = setting(8192, "tokens in a step of the part memory", least=1)
    steps: int = setting(3, "number of timed steps in one measurement of the part train", least=1)
    repetitions: int = setting(3, "number of measurements of each row", least=1)
    device: str | None = setting("cpu", "cpu or cuda; the targets were set for a CPU")


@dataclass(frozen=True)
class Target:
    """Represent a line of the table: a row, its peer, what is compared, and the bound of the ratio row / peer.

    bound: the least ratio, or with `at_most` the largest; None: the ratio is shown only.
    """

    part: str
    row: Row
    peer: Row
    unit: str
    bound: float | None = None
    at_most: bool = False

    def name_of(self, row: Row) -> str:
        """Return the table's words for the row or the peer."""
        words = [row.peer or row.model_preset, "gradient checkpointing" * row.gradient_checkpointing]
        words += [
            "logits kept" * row.keeps_logits,
            row.loop * (row.loop != "trainer's step" and self.part != "generation"),
        ]
        compiled = "static cache, compiled" if self.part == "generation" else "compiled"
        return ", ".join(filter(None, [*words, compiled if row.compiled else "eager"]))

    def reached(self, ratios: Sequence[float]) -> str:
        """Return whether the ratios of all repetitions reach the bound: 'yes', 'no', 'within the spread', or '-' if
        there is no bound. The spread is the distance from p20 to p80; by so much may the median miss the bound."""
        if self.bound is None:
            return "-"
        low, middle, high = np.quantile(ratios, (0.2, 0.5, 0.8))
        missing = middle - self.bound if self.at_most else self.bound - middle
        return "yes" if missing <= 0 else "within the spread" if missing <= high - low else "no"


def targets() -> list[Target]:
    """Return all lines of the table, ordered so that a row and its peers are measured one after another."""
    gpt2, modern = Row("gpt2", precision="bf16", compiled=True), Row("modern", precision="bf16", compiled=True)
    stock = replace(gpt2, peer="GPT2LMHeadModel", loop="plain loop")
    llama = replace(modern, peer="LlamaForCausalLM", loop="plain loop")
    plain, eager = partial(replace, loop="plain loop"), partial(replace, compiled=False)
    trainer, checkpointed = replace(gpt2, loop="train_accelerate.py"), replace(gpt2, gradient_checkpointing=True)
    train = partial(Target, "train", unit="tokens/s")
    memory = partial(Target, "memory", unit="peak GiB", at_most=True)
    added = partial(memory, unit="GiB above imports")
    lines = [
        train(gpt2, stock, bound=1.2),
        train(gpt2, replace(plain(gpt2), peer="nanoGPT"), bound=1.3),
        train(trainer, plain(gpt2), bound=0.97),
        train(plain(gpt2), replace(plain(gpt2), keeps_logits=True), bound=1.0),
        train(modern, llama, bound=1.25),
        train(eager(gpt2), eager(stock), bound=1.4),
        memory(gpt2, stock, bound=0.6),
        memory(eager(gpt2), eager(stock), bound=0.4),
        memory(checkpointed, stock, bound=0.35),
        memory(checkpointed, gpt2, unit="s per step", bound=1.35),
        *(added(row, peer) for row, peer in ((gpt2, stock), (eager(gpt2), eager(stock)), (checkpointed, stock))),
    ]
    gpt2, stock, modern, llama = (replace(row, precision="fp32") for row in (gpt2, stock, modern, llama))
    for unit in (f"tokens/s, batch {size}" for size in GENERATION_BATCHES):
        generation = partial(Target, "generation", unit=unit)
        lines += [generation(gpt2, eager(stock), bound=1.3), generation(stock, eager(stock))]
        lines += [generation(eager(row), eager(peer), bound=1.0) for row, peer in ((gpt2, stock), (modern, llama))]
    first = partial(Target, "generation", unit="s to the first token", bound=1.0, at_most=True)
    return [*lines, first(eager(gpt2), eager(stock)), first(eager(modern), eager(llama))]


def measure_generation(row: Row, config: TargetsConfig, blocks: PackedBlocks) -> dict[str, float]:
    """Return the tokens/s of greedy generation for each batch size, and if not compiled the seconds to the first token
    after a long prompt. A compiled row has a cache of fixed size. Call it in a new process."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = throughput.build_model(row, config, blocks).to(config.device).eval()
    model.generation_config.eos_token_id = None  # so that every row gets all tokens
    cache = {"cache_implementation": "static"} if row.compiled else {}
    if row.compiled:  # as the documentation of transformers does
        model.forward = torch.compile(model.forward, dynamic=False)
    tokens = blocks.__getitems__(range(max(GENERATION_BATCHES)))[:, :-1]  # (16, block_size)
    seconds = partial(measuring.generation_seconds, model, **cache)
    new_tokens = min(NEW_TOKENS, config.block_size // 2)
    short = tokens[:, :PROMPT_TOKENS][:, :new_tokens]
    results = {f"tokens/s, batch {n}": n * new_tokens / seconds(short[:n], new_tokens) for n in GENERATION_BATCHES}
    return results if row.compiled else results | {"s to the first token": seconds(tokens[:1, :LONG_PROMPT_TOKENS], 1)}


def large_batches(config: TargetsConfig) -> TargetsConfig:
    """Return the settings of the part memory: --memory_tokens in a step."""
    return replace(config, per_device_train_batch_size=max(1, config.memory_tokens // config.block_size))


Results = dict[tuple[str, Row], list[dict[str, float]] | str]  # of each repetition by unit, or an error message


def measure(lines: Sequence[Target], config: TargetsConfig, blocks: PackedBlocks) -> Results:
    """Measure all rows of the table in turn, --repetitions times (memory at most MEMORY_TURNS times)."""
    calls = {
        "train": partial(measure_training, config=config, blocks=blocks, steps=config.steps),
        "memory": partial(measure_training, config=large_batches(config), blocks=blocks, steps=MEMORY_STEPS),
        "generation": partial(measure_generation, config=config, blocks=blocks),
    }
    turns = dict.fromkeys(PARTS, config.repetitions) | {"memory": min(MEMORY_TURNS, config.repetitions)}
    rows = dict.fromkeys((line.part, row) for line in lines for row in (line.row, line.peer))
    return measuring.in_turn({(part, row): (turns[part], partial(calls[part], row)) for part, row in rows})


def compare(lines: Sequence[Target], results: Results) -> list[dict[str, Any]]:
    """Return for each line its numbers: the values of row and peer, the ratios of each repetition, and whether the
    target is reached. A line of which a measurement failed has its error message and is not reached."""
    numbers = []
    for line in lines:
        ours, theirs = (results[line.part, row] for row in (line.row, line.peer))
        facts = {"part": line.part, "row": line.name_of(line.row), "peer": line.name_of(line.peer), "unit": line.unit}
        facts |= {"target": line.bound, "at_most": line.at_most}
        if errors := [each for each in (ours, theirs) if isinstance(each, str)]:
            numbers.append(facts | {"error": errors[0], "reached": "no"})
            continue
        values, peer_values = ([each[line.unit] for each in measured] for measured in (ours, theirs))
        ratios = [ours / theirs for ours, theirs in zip(values, peer_values, strict=True)]
        facts |= {"values": values, "peer_values": peer_values, "ratios": ratios, "ratio": median(ratios)}
        numbers.append(facts | {"reached": line.reached(ratios)})
    return numbers


def table(numbers: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the report's table line for each entry of `compare`."""
    lines = []
    for each in numbers:
        form = ",.0f" if each["part"] == "train" else ",.2f"
        keys = {"values": form, "peer_values": form, "ratios": ".2f"}
        values, peer_values, ratios = (
            evidence.median_and_spread(each[key], form) if key in each else "-" for key, form in keys.items()
        )
        target = "-" if each["target"] is None else f"at {'most' if each['at_most'] else 'least'} {each['target']:g}"
        cells = [each["row"], each["unit"], each.get("error", values), each["peer"], peer_values]
        lines.append([*cells, str(len(each.get("ratios", []))), ratios, target, each["reached"]])
    return lines


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(TargetsConfig, argv, __doc__)
        logging.set_verbosity_error()
        large = large_batches(config)
        blocks = throughput.read_blocks(config, config.data, 2 * config.steps + WARM_UP_STEPS)
        if "memory" in config.parts:
            throughput.read_blocks(large, config.data, WARM_UP_STEPS + MEMORY_STEPS)
        config.vocab_size = config.vocab_size or blocks.vocab_size
        lines = [line for line in targets() if line.part in config.parts]
        rows = {row.peer or row.model_preset: row for line in lines for row in (line.row, line.peer)}
        models = {name: throughput.weightless_model(row, config, blocks) for name, row in rows.items()}
        sizes = [f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items()]
        variant = "" if set(config.parts) == set(PARTS) else "_".join(config.parts)
        device = torch.device(config.device)
        measures = sorted({path for part in config.parts for path in MEASURES[part]})
        report = evidence.Report("targets", config.output, device, argv, measures=measures, variant=variant)
        started = time.monotonic()
        numbers = compare(lines, measure(lines, config, blocks))
        method = f"""
n measurements of each row, in turn, each in a new process. Ratio: the row's value over that of
the peer in the same turn. CPU threads: {torch.get_num_threads()}. Minutes: {(time.monotonic() - started) / 60:.0f}.
Parameters: {", ".join(sizes)}. Data: {blocks.data_dir.name}, no block twice.

Training: {config.steps} steps of {config.per_device_train_batch_size} x {config.block_size} tokens after \
{WARM_UP_STEPS} warm-up steps, bf16 autocast, fused AdamW, no dropout. Attention: \
{config.attn_implementation or "the trainer's default"}, of peers sdpa. Presets make
`train_accelerate.train_step` with the trainer's settings of compiler and allocator. Plain loop: forward, backward,
clipping, update, torch's defaults. train_accelerate.py: what it logs.

Memory: {MEMORY_STEPS} steps of {large.per_device_train_batch_size} x {config.block_size} tokens after warm-up. \
Peak: of the whole process, resident on a CPU, allocated on a GPU; this decides, as it is what a user sees.

Generation: fp32, greedy, {NEW_TOKENS} tokens after {PROMPT_TOKENS}; to the first token: after {LONG_PROMPT_TOKENS}. \
Median of {measuring.TIMED_CALLS} calls after the first. Eager: `generate` with its defaults."""
        missed = [f"{each['row']} over {each['peer']}, {each['unit']}" for each in numbers if each["reached"] == "no"]
        verdict = f"not reached: {'; '.join(missed)}" if missed else "every target is reached, or within the spread"
        question = "how do training, memory and generation compare with other implementations of the same models?"
        report.write("Ratios and targets", question, method, [HEADER, *table(numbers)], f"Verdict: {verdict}.", numbers)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
