"""Time prepare_data.py and two other programs that turn the same text files into packed tokens, one process per run.

    python -m benchmarks.data --tokenizer_name DIR_OR_HUB_ID [--text_dir DIR ...]
    python -m benchmarks.data --tokenizer_name DIR --text_dir DIR --megabytes 1000   # if so much text is found

The text is taken from this machine without duplicate documents: source and documentation files of --text_dir, then of
the installed packages and the standard library. The programs run in turn. The peers, as the two other programs are
called, are data_run_clm and data_tiktoken. They read JSON lines and must count the same tokens as prepare_data.py.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.manifest import read_manifest
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting

OURS = ("prepare_data jsonl", "prepare_data parquet")
PEERS = ("tiktoken", "run_clm")
PACKAGES = ("gigatoken", "tokenizers", "tiktoken", "datasets", "pyarrow")
SUFFIXES = {".py", ".md", ".rst", ".txt", ".html"}
MEGABYTE = 10**6
NUM_FILES = 8  # per format
READINGS, BATCHES_PER_READING, BATCH_SIZE = 5, 1000, 16
SECONDS_PER_POLL = 0.1
MEASURES = [
    *("benchmarks/data.py:read_documents,write_text,measure,measure_reading", "gpt2modern/data/blocks.py:PackedBlocks"),
    *("benchmarks/data_run_clm.py", "benchmarks/data_tiktoken.py", "gpt2modern/data/formats", "prepare_data.py"),
    *(f"gpt2modern/data/{name}.py" for name in ("documents", "packing", "rows", "shards", "sources", "splits")),
    *(f"gpt2modern/data/{name}.py" for name in ("tokenizing", "workers")),
]
HEADER = ["program", "seconds", "MB/s", "MB/s without start", "CPU s", "peak GiB", *(f"over {name}" for name in PEERS)]


@dataclass
class DataBenchmarkConfig:
    tokenizer_name: str = setting(help="GPT-2's tokenizer: a folder with tokenizer.json, or a name on the Hub")
    text_dir: list[str] = setting(default_factory=list, help="folders whose text files are taken first")
    megabytes: float = setting(150, "10^6 bytes of text; less if too little is found", least=0.1)
    peers: list[str] = setting(default_factory=lambda: list(PEERS), help="other programs to time", choices=list(PEERS))
    repetitions: int = setting(3, "number of timed runs of each program", least=1)
    num_proc: int = setting(2, "worker processes of each program", least=1)
    work_dir: str = setting("out", "folder for temporary files, 1 GB with the default flags")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        for name in self.text_dir:
            if not Path(name).is_dir():
                raise ValueError(f"--text_dir {name}: no such folder; name an existing folder")


def read_documents(folders: Sequence[str], text_bytes: float, left_out: Sequence[str]) -> list[str]:
    """Return the texts of files of `folders`, then of installed packages, until they have `text_bytes` bytes in total.

    Skips duplicates and texts with a string of `left_out`: special tokens, which the programs encode differently.
    """
    documents, size = {}, 0
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


def write_text(documents: list[str], folder: Path) -> None:
    """Write the documents to `folder` twice: as NUM_FILES files of JSON lines and as NUM_FILES Parquet files."""
    datasets.disable_progress_bars()
    for number in range(NUM_FILES):
        part = datasets.Dataset.from_dict({"text": documents[number::NUM_FILES]})
        part.to_json(folder / f"text-{number:02d}.jsonl", force_ascii=False)
        part.to_parquet(folder / f"text-{number:02d}.parquet")


@dataclass(frozen=True)
class TimedRun:
    """Hold the cost of a run with its child processes, and its token count; work_s: seconds after imports, or None."""

    seconds: float
    cpu_seconds: float
    peak_gib: float
    tokens: int
    work_s: float | None = None


def resident_gib(pid: int) -> float:
    """Return the resident memory of a process and its descendants now, in GiB; a shared page counts in each of them."""
    resident = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            resident += process.memory_info().rss
    return resident / 2**30


def measure(name: str, folder: Path, num_proc: int) -> TimedRun:
    """Run the program `name` once on the files in `folder` and time it. Raises GPT2ModernError if the program fails."""
    output_dir, tokenizer = folder / name, folder / "tokenizer"
    shutil.rmtree(output_dir, ignore_errors=True)
    files = sorted(folder.glob("text-*.parquet" if name.endswith("parquet") else "text-*.jsonl"))
    arguments = ["-m", f"benchmarks.data_{name}", tokenizer, output_dir, num_proc, *files]
    if name in OURS:
        arguments = ["prepare_data.py", "--tokenizer_name", tokenizer, "--output_dir", output_dir]
        arguments += ["--num_proc", num_proc, "--train_file", *files]
    command = [sys.executable, *map(str, arguments)]
    os.sync()  # so that this run does not wait for writes of the one before
    peak_gib, before, started = 0.0, os.times(), time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=evidence.REPOSITORY, text=True, errors="replace", **pipes) as process:
        while process.returncode is None:
            try:
                output, errors = process.communicate(timeout=SECONDS_PER_POLL)
            except subprocess.TimeoutExpired:
                peak_gib = max(peak_gib, resident_gib(process.pid))
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        last = errors.strip().rpartition("\n")[-1]
        raise GPT2ModernError(f"the timed program {name} ended with exit code {process.returncode}: {last}")
    if name in PEERS:
        counts = json.loads(output.splitlines()[-1])
    else:
        counts = {"tokens": sum(split["tokens"] for split in read_manifest(output_dir)["splits"].values())}
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return TimedRun(seconds, cpu_seconds, peak_gib, **counts)


def time_programs(names: Sequence[str], repetitions: int, folder: Path, num_proc: int) -> dict[str, list[TimedRun]]:
    """Run every program `repetitions` times, in turn. Raises GPT2ModernError if their token counts differ."""
    runs: dict[str, list[TimedRun]] = {name: [] for name in names}
    for name in tqdm(list(runs) * repetitions, unit="run"):
        runs[name].append(measure(name, folder, num_proc))
        if (tokens := runs[name][-1].tokens) != (expected := runs[names[0]][0].tokens):
            counts = f"{name} counted {tokens} tokens, but {names[0]} counted {expected}"
            raise GPT2ModernError(f"{counts}: times cannot be compared; check that --tokenizer_name is GPT-2's")
    return runs


def measure_reading(data_dir: Path) -> list[float]:
    """Measure READINGS times how fast random batches, (batch, block_size + 1) int64, are read; return 10^6 tokens/s."""
    blocks = PackedBlocks(data_dir, "train")
    blocks.verify_checksums()  # this also brings the files into the page cache
    rates = []
    for seed in range(READINGS):
        order = np.random.default_rng(seed).permutation(len(blocks))[: BATCH_SIZE * BATCHES_PER_READING].tolist()
        started = time.perf_counter()
        for first in range(0, len(order), BATCH_SIZE):
            blocks.__getitems__(order[first : first + BATCH_SIZE])
        rates.append(len(order) * blocks.block_size / (time.perf_counter() - started) / 1e6)
    return rates


def table_rows(runs: dict[str, list[TimedRun]], megabytes: float) -> list[list[str]]:
    """Return the report's table line for each program: medians over its runs, and the largest memory of any run."""
    rates = {name: megabytes / median(run.seconds for run in each) for name, each in runs.items()}
    peers = [name for name in runs if name in PEERS]
    work_rates = {name: megabytes / median(run.work_s for run in runs[name]) for name in peers}
    rows = []
    for name, each in runs.items():
        seconds = evidence.median_and_spread([run.seconds for run in each], ".2f", low=0, high=1)
        cells = [name, seconds, f"{rates[name]:.2f}", f"{work_rates[name]:.2f}" if name in peers else "-"]
        cells += [f"{median(run.cpu_seconds for run in each):.1f}", f"{max(run.peak_gib for run in each):.2f}"]
        over = {peer: f"{rates[name] / rates[peer]:.1f}" for peer in peers if name in OURS}
        rows.append(cells + [over.get(peer, "-") for peer in PEERS])
    return rows


def benchmark(config: DataBenchmarkConfig, report: evidence.Report, special_tokens: list[str], folder: Path) -> None:
    """Write the text into `folder`, which holds the tokenizer already; time all programs on it and write the report."""
    documents = read_documents(config.text_dir, config.megabytes * MEGABYTE, special_tokens)
    write_text(documents, folder)
    megabytes = sum(len(text.encode()) for text in documents) / MEGABYTE
    runs = time_programs([*OURS, *dict.fromkeys(config.peers)], config.repetitions, folder, config.num_proc)
    rates = measure_reading(folder / OURS[0])
    reading = evidence.median_and_spread(rates, ".1f", low=0, high=1)
    question = """\
how fast does prepare_data.py turn text files into blocks, and with how much memory, compared with `datasets.map`
and grouping (run_clm) and with a pool of tiktoken workers?"""
    method = f"""
Each program has {config.num_proc} worker processes. n = {config.repetitions} runs of each program, in turn.
Seconds: from the start to the end of the process, median (fastest to slowest). MB/s without start: imports and loading
of the tokenizer are not counted. Peak GiB: the largest sum of the resident memory of all processes of a program in any
run, read every {SECONDS_PER_POLL} s; a shared page counts in each process.

Text: {megabytes:.1f} MB (10^6 bytes) in {NUM_FILES} files; {len(documents):,} documents, no two equal. All
programs counted {runs[OURS[0]][0].tokens:,} tokens."""
    remarks = f"""
Columns `over ...`: MB/s of prepare_data.py divided by MB/s of the other program, both with their start.

Reading the blocks: {reading} 10^6 tokens/s in one process, random batches of {BATCH_SIZE}, int64, n = {READINGS}.

Limits: the input is read from the page cache. run_clm writes no EOS token; one per document is added to its count."""
    results = {"megabytes": megabytes, "documents": len(documents), "reading_mtokens_per_s": rates}
    results["seconds"] = {name: median(run.seconds for run in each) for name, each in runs.items()}
    results["runs"] = {name: [asdict(run) for run in each] for name, each in runs.items()}
    bars = {"unit": "seconds", "names": [*runs], "values": [[run.seconds for run in each] for each in runs.values()]}
    bars["notes"] = [f"{median(each):.1f} s" for each in bars["values"]]
    table, drawing = [HEADER, *table_rows(runs, megabytes)], {"kind": "bars", "numbers": bars}
    report.write("Data preparation", question, method, table, remarks, results, drawing)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(DataBenchmarkConfig, argv, __doc__)
        report = evidence.Report("data", config.output, torch.device("cpu"), argv, *PACKAGES, measures=MEASURES)
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name)
        except (OSError, ValueError) as error:
            cause = f"--tokenizer_name {config.tokenizer_name} cannot be loaded ({first_line(error)})"
            raise GPT2ModernError(f"{cause}; name a folder with tokenizer.json, or check name and network") from None
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="data_benchmark_", dir=config.work_dir) as folder:
            tokenizer.save_pretrained(Path(folder, "tokenizer"))
            benchmark(config, report, tokenizer.all_special_tokens, Path(folder).resolve())


if __name__ == "__main__":
    main()
