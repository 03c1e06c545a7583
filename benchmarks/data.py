"""prepare_data.py against the usual ways from text files to packed tokens: whole processes, timed from outside.

    python -m benchmarks.data --tokenizer_name DIR_OR_HUB_ID [--text_dir DIR ...]
    python -m benchmarks.data --tokenizer_name DIR --repeated_megabytes 0         # text without repetition alone
    python -m benchmarks.data --tokenizer_name DIR --sample_megabytes 6 --unique_megabytes 6 --repeated_megabytes 10 \
        --repetitions 1 --output out     # shows that it works, measures nothing

The text (benchmarks.data_corpora) is there anyway: sources and documentation of what is installed, and of --text_dir.
First without repetition, then the same documents again and again. The programs alternate, one run of each in turn;
input is read from the page cache; 1 MB is 10^6 bytes of UTF-8 text. The peers, data_run_clm and data_tiktoken, read the
JSON lines; their token counts have to equal ours.
"""

import importlib.util
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers import AutoTokenizer

from benchmarks import measuring
from benchmarks.data_corpora import MEGABYTE, Corpus, read_documents, write_corpus
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import check_ranges, setting

NUM_FILES = 8  # per corpus
READINGS, BATCHES_PER_READING, BATCH_SIZE = 5, 1000, 16
SECONDS_PER_POLL, POLLS_PER_SUM = 0.25, 4  # adding up shared pages takes 15 ms a GiB
PACKAGES = ("gigatoken", "tokenizers", "tiktoken", "transformers", "datasets", "pyarrow")


@dataclass
class DataBenchmarkConfig:
    tokenizer_name: str = setting(help="GPT-2's tokenizer: a folder with tokenizer.json, or a Hub name")
    text_dir: list[str] | None = setting(None, "folders whose text files come first")
    sample_megabytes: float = setting(20, "text for run_clm", least=0.1)
    unique_megabytes: float = setting(150, "text without repetition; less if there is less", least=0.1)
    repeated_megabytes: float = setting(1000, "text with repetition; 0 leaves it out", least=0)
    repetitions: int = setting(3, "timed runs of each program", least=1)
    num_proc: int = setting(2, "worker processes of each program", least=1)
    block_size: int = setting(1024, "tokens per block", least=1)
    seed: int = setting(0, "seed of the choice and of the order of the documents", least=0)
    work_dir: str = setting("out", "where a temporary folder is made; 5 GB by default")
    output: str = setting("eval/reports", "folder for the report, Markdown with a .json beside it")

    def __post_init__(self):
        check_ranges(self)
        for name in self.text_dir or []:
            if not Path(name).is_dir():
                raise ValueError(f"--text_dir {name}: no such folder")


@dataclass(frozen=True)
class Task:
    """One program on one corpus."""

    program: str
    corpus: str
    file_format: str = "jsonl"


@dataclass
class TimedRun:
    """What one process took with its children. Memory in GiB: the largest resident set and the largest anonymous part
    that any one of them had, and the most that all had together (proportional set size, shared pages once)."""

    seconds: float
    cpu_seconds: float
    peak_rss_gib: float
    peak_anonymous_gib: float
    peak_pss_sum_gib: float
    tokens: int
    work_s: float | None = None


class MemoryPoll(threading.Thread):
    """Reads the memory of a process and of all below it from /proc, several times a second, until `stop`.

    peak_kib: VmHWM and RssAnon, the largest of any one process; Pss, of all together.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak_kib = {"VmHWM": 0, "RssAnon": 0, "Pss": 0}
        self._stopped = threading.Event()

    def run(self) -> None:
        for count in itertools.count():
            seen = defaultdict(lambda: [0])
            with suppress(psutil.NoSuchProcess):
                for process in [self.root, *self.root.children(recursive=True)]:
                    for name in ("status", "smaps_rollup") if count % POLLS_PER_SUM == 0 else ("status",):
                        with suppress(OSError):  # it has ended; until then its VmHWM is the highest it has had
                            for field, kib in measuring.proc_fields_kib(Path(f"/proc/{process.pid}/{name}")).items():
                                seen[field].append(kib)
            for field, combined in {"VmHWM": max, "RssAnon": max, "Pss": sum}.items():
                self.peak_kib[field] = max(self.peak_kib[field], combined(seen[field]))
            if self._stopped.wait(SECONDS_PER_POLL):
                return

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def command_of(task: Task, files: list, tokenizer: Path, output_dir: Path, config: DataBenchmarkConfig) -> list[str]:
    """Return what is typed for a task; all flags that are not here keep their defaults."""
    script = ["prepare_data.py"] if task.program == "prepare_data" else ["-m", f"benchmarks.data_{task.program}"]
    flags = {"tokenizer_name": tokenizer, "output_dir": output_dir, "num_proc": config.num_proc}
    flags["block_size"] = config.block_size
    values = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *script, "--train_file", *map(str, files), *values]


def measure(task: Task, corpus: Corpus, tokenizer: Path, output_dir: Path, config: DataBenchmarkConfig) -> TimedRun:
    """Run one program once; raises GPT2ModernError with the last line that a failed one has written."""
    command = command_of(task, corpus.files[task.file_format], tokenizer, output_dir, config)
    os.sync()  # what the one before has left to be written is not this one's time
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=measuring.REPOSITORY, text=True, errors="replace", **pipes) as process:
        memory = MemoryPoll(process.pid)
        memory.start()
        output, errors = process.communicate()
    seconds = time.perf_counter() - started
    memory.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        last = (errors.strip().splitlines() or [""])[-1]
        raise GPT2ModernError(f"{task.program} on {task.corpus} ended with exit code {process.returncode}: {last}")
    if task.program == "prepare_data":
        manifest = json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))
        counts = {"tokens": sum(split["tokens"] for split in manifest["splits"].values())}
    else:
        counts = json.loads(output.splitlines()[-1])
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return TimedRun(seconds, cpu_seconds, *(kib / 2**20 for kib in memory.peak_kib.values()), **counts)


def check_tokens(task: Task, run: TimedRun, expected: dict[str, int], corpus: Corpus) -> None:
    """Raise GPT2ModernError unless all programs found the same tokens in a corpus; run_clm adds no EOS to documents."""
    tokens = run.tokens + (corpus.documents if task.program == "run_clm" else 0)
    if tokens != expected.setdefault(corpus.name, tokens):
        raise GPT2ModernError(
            f"{task.program} finds {tokens} tokens in the {corpus.name} text ({task.file_format}), "
            f"another program or run {expected[corpus.name]}: the times cannot be compared"
        )


def measure_reading(data_dir: Path) -> list[float]:
    """Return Mtok/s of each reading: batches of blocks drawn without replacement, (batch, block_size + 1) int64."""
    blocks = PackedBlocks(data_dir, "train")
    blocks.verify_checksums()  # of what was written, and the pages are in memory afterwards
    rates = []
    for seed in range(READINGS):
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        batches = [batch.tolist() for batch in order[: BATCH_SIZE * BATCHES_PER_READING].split(BATCH_SIZE)]
        started = time.perf_counter()
        for batch in batches:
            blocks.__getitems__(batch)
        rates.append(sum(map(len, batches)) * blocks.block_size / (time.perf_counter() - started) / 1e6)
    return rates


HEADER = ("program", "text", "MB", "format", "seconds", "MB/s", "MB/s without start", "CPU s", "RSS", "anonymous")
HEADER += ("PSS sum", "over run_clm", "over tiktoken")


def results_table(runs: dict[Task, list[TimedRun]], corpora: dict[str, Corpus]) -> str:
    """Write one line per task: seconds with spread, the largest memory of all repetitions.

    Ratios: MB/s of our whole process over those of the peer without its start (in brackets: with it); run_clm's are
    those of the sample.
    """

    def rate(task: Task, with_start: bool = True) -> float:
        seconds = median(run.seconds if with_start else run.work_s for run in runs[task])
        return corpora[task.corpus].text_bytes / MEGABYTE / seconds

    def ratio(task: Task, peer: Task) -> str:
        if task.program != "prepare_data" or peer not in runs:
            return ""
        return f"{rate(task) / rate(peer, with_start=False):.1f} ({rate(task) / rate(peer):.1f})"

    rows = []
    for task, measured in runs.items():
        cells = [f"{corpora[task.corpus].text_bytes / MEGABYTE:.1f}", task.file_format]
        cells.append(measuring.median_and_spread([run.seconds for run in measured], ".2f", low=0, high=1))
        cells += [f"{rate(task):.2f}", "" if measured[0].work_s is None else f"{rate(task, with_start=False):.2f}"]
        cells.append(f"{median(run.cpu_seconds for run in measured):.1f}")
        for name in ("peak_rss_gib", "peak_anonymous_gib", "peak_pss_sum_gib"):
            cells.append(f"{max(getattr(run, name) for run in measured):.2f}")
        peers = [ratio(task, Task("run_clm", "sample")), ratio(task, Task("tiktoken", task.corpus))]
        rows.append([task.program, task.corpus, *cells, *peers])
    return measuring.markdown_table(HEADER, rows)


def tasks_of(corpora: dict[str, Corpus]) -> list[Task]:
    """List what is run; run_clm, the slowest, reads the sample alone."""
    tasks = [Task("prepare_data", "sample"), Task("run_clm", "sample")]
    for name in list(corpora)[1:]:
        tasks += [Task("prepare_data", name, file_format) for file_format in corpora[name].files]
        tasks.append(Task("tiktoken", name))
    return tasks


def time_programs(config: DataBenchmarkConfig, corpora: dict[str, Corpus], folder: Path) -> dict[Task, list[TimedRun]]:
    """Run every program in turn, as often as was asked for; what prepare_data.py wrote last stays in folder/read."""
    runs: dict[Task, list[TimedRun]] = {task: [] for task in tasks_of(corpora)}
    expected: dict[str, int] = {}
    for repetition, task in itertools.product(range(config.repetitions), runs):
        output_dir = folder / ("read" if task.program == "prepare_data" else "output")
        shutil.rmtree(output_dir, ignore_errors=True)
        run = measure(task, corpora[task.corpus], folder / "tokenizer", output_dir, config)
        check_tokens(task, run, expected, corpora[task.corpus])
        runs[task].append(run)
        print(f"{repetition + 1}/{config.repetitions} {' '.join(vars(task).values())}: {run.seconds:.2f} s", flush=True)
    return runs


def report(
    config: DataBenchmarkConfig,
    source: str,
    origins: dict[str, int],
    corpora: dict[str, Corpus],
    runs: dict[Task, list[TimedRun]],
    reading: list[float],
) -> str:
    """Write the report, Markdown. source: the lines of `measuring.provenance`."""
    texts = [f"{corpus.name} {corpus.documents:,} ({corpus.passes:.2f} times each)" for corpus in corpora.values()]
    if corpora["unique"].text_bytes < config.unique_megabytes * MEGABYTE:
        texts.append(f"there were not {config.unique_megabytes:g} MB of different documents")
    timed = command_of(Task("prepare_data", ""), ["TEXT-*.jsonl"], Path("TOKENIZER"), Path("DATA"), config)
    return f"""\
# Data preparation: from files of text to packed tokens, whole processes

Question: how fast, and in how much memory, does prepare_data.py turn files into blocks, against `datasets.map` with
grouping (run_clm) and a pool of tiktoken workers, {config.num_proc} processes each?

{source}
Timed from outside, the start of the process included: `{" ".join(["python", *timed[1:]])}`.

n = {config.repetitions} runs of each program, in turn over the programs. Seconds are the median (fastest to slowest),
memory is the largest of all runs in GiB. RSS: the largest resident set of any one process, mapped files included;
anonymous: the largest part of one that no file backs; PSS sum: all processes together, shared pages once. 1 MB is 10^6
bytes of text; input comes from the page cache. Without start: after imports and the tokenizer. All programs found the
same number of tokens in each text (run_clm: but for one EOS per document, which it does not write).

Text: {", ".join(f"{size / MEGABYTE:.1f} MB of {origin}" for origin, size in origins.items())}; no two documents
equal; {NUM_FILES} files.
Documents: {", ".join(texts)}.

{results_table(runs, corpora)}
Over a peer: MB/s of our whole process, its start included, over the work of the peer without its start (in brackets:
with its start), on the same text; run_clm's rate is that of the sample in every row.

Reading: {measuring.median_and_spread(reading, ".1f", low=0, high=1)} Mtok/s in one process, batches of {BATCH_SIZE} \
random blocks as int64 tensors, n = {READINGS}.

Caveats: repeated text is easier than new text for an encoder that remembers words. run_clm reads the sample only, and
its rate is taken to hold for more.
"""


def benchmark(config: DataBenchmarkConfig, source: str, folder: Path, path: Path) -> None:
    """Write the texts into `folder`, run everything, publish the report at `path` and a record as JSON beside it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name)
        tokenizer.save_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise GPT2ModernError(f"--tokenizer_name {config.tokenizer_name}: not a tokenizer ({error})") from error
    print("Collecting text", flush=True)
    text_dirs, unique_bytes = [Path(name) for name in config.text_dir or []], int(config.unique_megabytes * MEGABYTE)
    documents, origins = read_documents(text_dirs, unique_bytes, tokenizer.all_special_tokens, config.seed)
    both = ["jsonl", "parquet"]
    corpora = {"sample": write_corpus("sample", config.sample_megabytes, documents, ["jsonl"], folder, NUM_FILES)}
    corpora["unique"] = write_corpus("unique", None, documents, both, folder, NUM_FILES)
    if config.repeated_megabytes:
        corpora["repeated"] = write_corpus("repeated", config.repeated_megabytes, documents, both, folder, NUM_FILES)
    del documents

    runs = time_programs(config, corpora, folder)
    reading = measure_reading(folder / "read")
    measuring.publish(path, report(config, source, origins, corpora, runs, reading))
    folders = ("work_dir", "output", "tokenizer_name", "text_dir")  # where things lie is not part of a record
    record = {
        "provenance": source,
        "arguments": {name: value for name, value in vars(config).items() if name not in folders},
        "text_bytes_by_origin": origins,
        "texts": [vars(corpus) | {"files": len(corpus.files["jsonl"])} for corpus in corpora.values()],
        "runs": [vars(task) | {"repetitions": [asdict(run) for run in each]} for task, each in runs.items()],
        "reading_mtok_per_s": reading,
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(DataBenchmarkConfig, argv, __doc__)
        if not Path("/proc/self/smaps_rollup").exists():
            raise GPT2ModernError("memory is read from /proc, which only Linux has")
        if importlib.util.find_spec("tiktoken") is None:
            raise GPT2ModernError("tiktoken is not installed: python -m pip install -c constraints.txt -e '.[bench]'")
        path = measuring.report_path(config.output, "data", torch.device("cpu"))
        command = sys.argv[1:] if argv is None else argv
        source = measuring.provenance("benchmarks.data", command, torch.device("cpu"), PACKAGES)
        megabytes = 3 * config.sample_megabytes + 3 * config.unique_megabytes + 4 * config.repeated_megabytes
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(config.work_dir).free < megabytes * MEGABYTE:
            problem = f"less than {megabytes:.0f} MB free; name another folder"
            raise GPT2ModernError(f"--work_dir {config.work_dir}: {problem}")
        with tempfile.TemporaryDirectory(prefix="data_benchmark_", dir=config.work_dir) as folder:
            benchmark(config, source, Path(folder).resolve(), path)


if __name__ == "__main__":
    main()
