"""prepare_data.py against the usual ways from text files to packed tokens: whole processes, timed from outside.

    python -m benchmarks.data --tokenizer_name DIR_OR_HUB_ID [--text_dir DIR ...]
    python -m benchmarks.data --tokenizer_name DIR --repeat 7 --peers tiktoken   # a gigabyte

The text is there anyway: sources and documentation of --text_dir, then of the installed packages and the standard
library, no two documents equal. The programs alternate, one run of each in turn; input is read from the page cache.
The peers, data_run_clm and data_tiktoken, read the JSON lines; their token counts have to equal ours.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks import measuring
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.manifest import read_manifest
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting

OURS = ("prepare_data jsonl", "prepare_data parquet")
PEERS = ("tiktoken", "run_clm")
PACKAGES = ("gigatoken", "tokenizers", "tiktoken", "datasets", "pyarrow")
SUFFIXES = {".py", ".md", ".rst", ".txt"}
MEGABYTE = 10**6
NUM_FILES = 8  # per format
READINGS, BATCHES_PER_READING, BATCH_SIZE = 5, 1000, 16
SECONDS_PER_POLL = 0.1


@dataclass
class DataBenchmarkConfig:
    tokenizer_name: str = setting(help="GPT-2's tokenizer: a folder with tokenizer.json, or a Hub name")
    text_dir: list[str] = setting(default_factory=list, help="folders whose text files come first")
    megabytes: float = setting(150, "different text; less if there is less", least=0.1)
    repeat: int = setting(1, "times that every document stands in the text, each time in another order", least=1)
    peers: list[str] = setting(default_factory=lambda: list(PEERS), help="timed beside ours", choices=list(PEERS))
    repetitions: int = setting(3, "timed runs of each program", least=1)
    num_proc: int = setting(2, "worker processes of each program", least=1)
    work_dir: str = setting("out", "where a temporary folder is made; 1 GB by default")
    output: str = setting("eval/reports", "folder for the report")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        for name in self.text_dir:
            if not Path(name).is_dir():
                raise ValueError(f"--text_dir {name}: no such folder")


def read_documents(folders: Sequence[str], text_bytes: float, left_out: Sequence[str]) -> list[str]:
    """Read different documents of `text_bytes` together, or all there are: of `folders`, then of what is installed.

    Documents with one of the strings `left_out` are left out: encoders are asked for different ids where a text spells
    a special token.
    """
    documents: dict[str, None] = {}
    size = 0
    for folder in (*folders, sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)
        for path in random.Random(0).sample(paths, len(paths)):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text and text not in documents and not any(word in text for word in left_out):
                documents[text] = None
                size += len(text.encode())
            if size >= text_bytes:
                return list(documents)
    return list(documents)


def repeated(documents: list[str], times: int) -> list[str]:
    """Return the documents `times` over, each time in another order."""
    generator = random.Random(1)
    return [text for _ in range(times) for text in generator.sample(documents, len(documents))]


def write_text(documents: list[str], folder: Path) -> None:
    """Write the documents to NUM_FILES files of each format, text-00.jsonl and so on."""
    datasets.disable_progress_bars()
    for number in range(NUM_FILES):
        part = datasets.Dataset.from_dict({"text": documents[number::NUM_FILES]})
        part.to_json(folder / f"text-{number:02d}.jsonl", force_ascii=False)
        part.to_parquet(folder / f"text-{number:02d}.parquet")


@dataclass(frozen=True)
class TimedRun:
    """What one run took with its children; peak_gib: see `resident_gib`; work_s: a peer's seconds after its start."""

    seconds: float
    cpu_seconds: float
    peak_gib: float
    tokens: int
    work_s: float | None = None


def resident_gib(pid: int) -> float:
    """Add up what a process and all below it hold resident now; pages that they share count in each."""
    resident = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            resident += process.memory_info().rss
    return resident / 2**30


def measure(name: str, folder: Path, num_proc: int) -> TimedRun:
    """Run a program once on the text in `folder`; raises GPT2ModernError with the last line that a failed one wrote."""
    output_dir, tokenizer = folder / name, folder / "tokenizer"
    shutil.rmtree(output_dir, ignore_errors=True)
    files = sorted(folder.glob("text-*.parquet" if name.endswith("parquet") else "text-*.jsonl"))
    arguments = ["-m", f"benchmarks.data_{name}", tokenizer, output_dir, num_proc, *files]
    if name in OURS:
        arguments = ["prepare_data.py", "--tokenizer_name", tokenizer, "--output_dir", output_dir]
        arguments += ["--num_proc", num_proc, "--train_file", *files]
    command = [sys.executable, *map(str, arguments)]
    os.sync()  # what the one before has left to be written is not this one's time
    peak_gib, before, started = 0.0, os.times(), time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=measuring.REPOSITORY, text=True, errors="replace", **pipes) as process:
        while process.returncode is None:
            try:
                output, errors = process.communicate(timeout=SECONDS_PER_POLL)
            except subprocess.TimeoutExpired:
                peak_gib = max(peak_gib, resident_gib(process.pid))
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        last = errors.strip().rpartition("\n")[-1]
        raise GPT2ModernError(f"{name} ended with exit code {process.returncode}: {last}")
    if name in PEERS:
        counts = json.loads(output.splitlines()[-1])
    else:
        counts = {"tokens": sum(split["tokens"] for split in read_manifest(output_dir)["splits"].values())}
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return TimedRun(seconds, cpu_seconds, peak_gib, **counts)


def time_programs(names: Sequence[str], repetitions: int, folder: Path, num_proc: int) -> dict[str, list[TimedRun]]:
    """Run the programs in turn, so often each; raises GPT2ModernError if one finds another number of tokens."""
    runs: dict[str, list[TimedRun]] = {name: [] for name in names}
    for name in tqdm(list(runs) * repetitions, unit="run"):
        runs[name].append(measure(name, folder, num_proc))
        if (tokens := runs[name][-1].tokens) != (expected := runs[names[0]][0].tokens):
            raise GPT2ModernError(f"{name} finds {tokens} tokens, {names[0]} {expected}: times cannot be compared")
    return runs


def measure_reading(data_dir: Path) -> list[float]:
    """Return Mtok/s of each reading: batches of blocks drawn without replacement, (batch, block_size + 1) int64."""
    blocks = PackedBlocks(data_dir, "train")
    blocks.verify_checksums()  # of what was written, and the pages are in memory afterwards
    rates = []
    for seed in range(READINGS):
        order = np.random.default_rng(seed).permutation(len(blocks))[: BATCH_SIZE * BATCHES_PER_READING].tolist()
        started = time.perf_counter()
        for first in range(0, len(order), BATCH_SIZE):
            blocks.__getitems__(order[first : first + BATCH_SIZE])
        rates.append(len(order) * blocks.block_size / (time.perf_counter() - started) / 1e6)
    return rates


HEADER = ["program", "seconds", "MB/s", "MB/s without start", "CPU s", "peak GiB", *(f"over {name}" for name in PEERS)]


def table_rows(runs: dict[str, list[TimedRun]], megabytes: float) -> list[list[str]]:
    """Return a line for each program: medians, seconds with (fastest to slowest), the largest memory of all runs."""
    rates = {name: megabytes / median(run.seconds for run in each) for name, each in runs.items()}
    peers = [name for name in runs if name in PEERS]
    work_rates = {name: megabytes / median(run.work_s for run in runs[name]) for name in peers}
    rows = []
    for name, each in runs.items():
        seconds = measuring.median_and_spread([run.seconds for run in each], ".2f", low=0, high=1)
        cells = [name, seconds, f"{rates[name]:.2f}", f"{work_rates[name]:.2f}" if name in peers else "-"]
        cells += [f"{median(run.cpu_seconds for run in each):.1f}", f"{max(run.peak_gib for run in each):.2f}"]
        over = {peer: f"{rates[name] / work_rates[peer]:.1f}" for peer in peers if name in OURS}
        rows.append(cells + [over.get(peer, "-") for peer in PEERS])
    return rows


def benchmark(config: DataBenchmarkConfig, report: measuring.Report, special_tokens: list[str], folder: Path) -> None:
    """Write the text into `folder`, which has the tokenizer, run everything, write the report."""
    documents = read_documents(config.text_dir, config.megabytes * MEGABYTE, special_tokens)
    texts = repeated(documents, config.repeat)
    write_text(texts, folder)
    megabytes = sum(len(text.encode()) for text in texts) / MEGABYTE
    runs = time_programs([*OURS, *dict.fromkeys(config.peers)], config.repetitions, folder, config.num_proc)
    reading = measuring.median_and_spread(measure_reading(folder / OURS[0]), ".1f", low=0, high=1)
    question = """\
how fast, and in how much memory, does prepare_data.py turn files into blocks, against `datasets.map` with grouping
(run_clm) and a pool of tiktoken workers?"""
    method = f"""
{config.num_proc} worker processes each. n = {config.repetitions} runs of each program, in turn over the programs.
Seconds are those of the whole process, its start included: the median (fastest to slowest). Without start: after
imports and the tokenizer. Memory is the largest of all runs: resident sets of all processes at once, looked at every
{SECONDS_PER_POLL} s, shared pages counted in each.

Text: {megabytes:.1f} MB (10^6 bytes) in {NUM_FILES} files; {len(documents):,} documents, no two equal, each \
{config.repeat} times. All programs found {runs[OURS[0]][0].tokens:,} tokens."""
    remarks = f"""
Over a peer: MB/s of our whole process, its start included, over the work of the peer without its start.

Reading: {reading} Mtok/s in one process, batches of {BATCH_SIZE} random blocks as int64 tensors, n = {READINGS}.

Caveats: input comes from the page cache. run_clm writes no EOS; one a document is added to its count. Text that is
repeated is easier than new text for an encoder that remembers words."""
    report.write("Data preparation", question, method, [HEADER, *table_rows(runs, megabytes)], remarks)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(DataBenchmarkConfig, argv, __doc__)
        report = measuring.Report("data", config.output, torch.device("cpu"), argv, *PACKAGES)
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name)
        except (OSError, ValueError) as error:
            raise GPT2ModernError(f"--tokenizer_name {config.tokenizer_name}: not a tokenizer ({error})") from None
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="data_benchmark_", dir=config.work_dir) as folder:
            tokenizer.save_pretrained(Path(folder, "tokenizer"))
            benchmark(config, report, tokenizer.all_special_tokens, Path(folder).resolve())


if __name__ == "__main__":
    main()
