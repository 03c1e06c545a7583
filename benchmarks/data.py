"""prepare_data.py against the usual ways from text files to packed tokens: whole processes, timed from outside.

python -m benchmarks.data --tokenizer_name DIR_OR_HUB_ID [--text_dir DIR ...] [--full_peers true] [--quick true]

The text (`benchmarks.data_corpora`) is there anyway: sources and documentation of what is installed, and of --text_dir. First
without repetition, then the same documents again and again up to --megabytes.
The programs alternate, one run of each in turn; input is read from the page cache; 1 MB is 10^6 bytes of UTF-8 text.
Peers (`benchmarks.data_peers`) read the JSON lines. Their token counts have to equal ours, or the benchmark stops.
"""

import contextlib
import datetime
import itertools
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.data_corpora import MEGABYTE, Corpus, read_documents, write_corpora
from benchmarks.measuring import REPOSITORY, commit, markdown_table
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import check_range

CHECKED_DOCUMENTS = 200
FOLDERS = ("work_dir", "output", "tokenizer_name", "text_dir")  # where things lie is nobody else's concern
MEMORY_FIELDS = ("peak_rss_gib", "peak_anonymous_gib", "peak_pss_sum_gib")
SECONDS_PER_POLL = 0.25
POLLS_PER_SUM = 4  # summing up shared pages takes 15 ms a GiB
BATCHES_PER_READING = 1000
FULL = {"sample_megabytes": 20, "unique_megabytes": 150, "megabytes": 1000, "memory_megabytes": 2000, "repetitions": 3}
QUICK = {"sample_megabytes": 1.2, "unique_megabytes": 2, "megabytes": 4, "memory_megabytes": 0, "repetitions": 1}
QUICK_DOCUMENT_BYTES = 8000  # so that as little text has documents enough


def _size(name: str, what: str) -> float | None:
    return field(default=None, metadata={"help": f"{what} (default {FULL[name]}, with --quick {QUICK[name]})"})


@dataclass
class DataBenchmarkConfig:
    tokenizer_name: str = field(metadata={"help": "GPT-2's tokenizer: a folder with tokenizer.json, or a Hub name"})
    text_dir: list[str] | None = field(default=None, metadata={"help": "folders whose text files come first"})
    sample_megabytes: float | None = _size("sample_megabytes", "text for run_clm")
    unique_megabytes: float | None = _size("unique_megabytes", "text without repetition; less if there is less")
    megabytes: float | None = _size("megabytes", "text with repetition; 0 leaves it out")
    memory_megabytes: float | None = _size("memory_megabytes", "text of the memory measurement; 0 leaves it out")
    repetitions: int | None = _size("repetitions", "timed runs of each program")
    file_formats: list[str] = field(
        default_factory=lambda: ["jsonl", "parquet"],
        metadata={"help": "what prepare_data.py reads; peers read jsonl", "choices": ["jsonl", "parquet"]},
    )
    num_files: int = field(default=8, metadata={"help": "files per corpus"})
    num_proc: int = field(default=2, metadata={"help": "worker processes of each program"})
    block_size: int = field(default=1024, metadata={"help": "tokens per block"})
    batch_size: int = field(default=16, metadata={"help": "blocks per batch when the result is read"})
    reading_repetitions: int = field(default=5, metadata={"help": "timed readings of the result"})
    full_peers: bool = field(default=False, metadata={"help": "give --megabytes to the tiktoken pool as well"})
    quick: bool = field(default=False, metadata={"help": "small sizes, one run: shows that it works, measures nothing"})
    seed: int = field(default=0, metadata={"help": "seed of the choice and of the order of the documents"})
    work_dir: str = field(default="out", metadata={"help": "where a temporary folder is made; 7 GB by default"})
    output: str | None = field(
        default=None,
        metadata={"help": "Markdown, a .json beside it (default eval/reports/DATE_data.md, with --quick none)"},
    )

    def __post_init__(self):
        for name, value in (QUICK if self.quick else FULL).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("num_files", "num_proc", "block_size", "batch_size", "reading_repetitions", "repetitions"):
            check_range(f"--{name}", getattr(self, name), 1)
        for name in ("sample_megabytes", "unique_megabytes"):
            check_range(f"--{name}", getattr(self, name), 0.1)
        for name in ("megabytes", "memory_megabytes"):
            check_range(f"--{name}", getattr(self, name), 0)
        for name in self.text_dir or []:
            if not Path(name).is_dir():
                raise ValueError(f"--text_dir {name}: no such folder")
        if self.output is None and not self.quick:
            self.output = str(REPOSITORY / "eval" / "reports" / f"{datetime.date.today()}_data.md")
        if self.output and Path(self.output).suffix != ".md":
            raise ValueError(f"--output {self.output}: must end with .md; the .json stands beside it")


@dataclass(frozen=True)
class Case:
    """One program on one corpus."""

    program: str
    corpus: str
    file_format: str = "jsonl"


@dataclass
class Run:
    """One process with its children. Memory in GiB: the largest resident set and the largest anonymous part of it that
    any one process had, and the most that all had together (proportional set size, shared pages once)."""

    seconds: float
    cpu_seconds: float
    peak_rss_gib: float
    peak_anonymous_gib: float
    peak_pss_sum_gib: float
    tokens: int
    work_s: float | None = None


def check_tiktoken(tokenizer_json: Path, documents: list[str]) -> None:
    """Raise GPT2ModernError if tiktoken and `tokenizers` differ on one of the first documents."""
    from tokenizers import Tokenizer

    from benchmarks.data_peers import tiktoken_encoding

    try:
        encoding = tiktoken_encoding(tokenizer_json)
    except ModuleNotFoundError:
        raise GPT2ModernError(
            "tiktoken is not installed: python -m pip install -c constraints.txt -e '.[bench]'"
        ) from None
    except ValueError as error:
        raise GPT2ModernError(f"--tokenizer_name: {error}; use GPT-2's") from None
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    for text in documents[:CHECKED_DOCUMENTS]:
        if encoding.encode_ordinary(text) != tokenizer.encode(text, add_special_tokens=False).ids:
            raise GPT2ModernError(
                f"tiktoken and tokenizers differ on the document that begins {text[:60]!r}; use GPT-2's"
            )


# One run


class MemoryPoll(threading.Thread):
    """Reads the memory of a process and of all below it from /proc, several times a second, until `stop`."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_kib = {"VmHWM": 0, "RssAnon": 0, "Pss": 0}
        self._stopped = threading.Event()

    def run(self) -> None:
        for count in itertools.count():
            self._poll(with_sum=count % POLLS_PER_SUM == 0)
            if self._stopped.wait(SECONDS_PER_POLL):
                return

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _poll(self, with_sum: bool) -> None:
        proportional = 0
        for pid in self._processes():
            # A process may end at any moment; until then its VmHWM is the highest it has had.
            with contextlib.suppress(OSError):
                status = _kib_fields(Path(f"/proc/{pid}/status"))
                if with_sum:
                    proportional += _kib_fields(Path(f"/proc/{pid}/smaps_rollup")).get("Pss", 0)
                for name in ("VmHWM", "RssAnon"):
                    self.peak_kib[name] = max(self.peak_kib[name], status.get(name, 0))
        self.peak_kib["Pss"] = max(self.peak_kib["Pss"], proportional)

    def _processes(self) -> Iterator[int]:
        waiting = [self.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (thread / "children").read_text().split())


def _kib_fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


def command_of(case: Case, files: list, tokenizer: Path, output_dir: Path, config: DataBenchmarkConfig) -> list[str]:
    """What is typed for `case`; all flags that are not here keep their defaults."""
    program = ["prepare_data.py"] if case.program == "prepare_data" else ["-m", "benchmarks.data_peers", case.program]
    flags = {"tokenizer_name": tokenizer, "output_dir": output_dir, "num_proc": config.num_proc}
    flags["block_size"] = config.block_size
    values = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *program, "--train_file", *map(str, files), *values]


def measure(case: Case, corpus: Corpus, tokenizer: Path, output_dir: Path, config: DataBenchmarkConfig) -> Run:
    """One run of one program; raises GPT2ModernError with the last line that a failed one has written."""
    command = command_of(case, corpus.files[case.file_format], tokenizer, output_dir, config)
    os.sync()  # what the one before has left to be written is none of this one's time
    with tempfile.TemporaryFile(dir=output_dir.parent) as log, tempfile.TemporaryFile(dir=output_dir.parent) as result:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=result, stderr=log)
        memory = MemoryPoll(process.pid)
        memory.start()
        exit_code = process.wait()
        seconds = time.perf_counter() - started
        memory.stop()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = []
        for file in (log, result):
            file.seek(0)
            lines.append(file.read().decode("utf-8", errors="replace").strip().splitlines() or [""])
    if exit_code:
        raise GPT2ModernError(f"{case.program} on {case.corpus} ended with exit code {exit_code}: {lines[0][-1]}")
    if case.program == "prepare_data":
        manifest = json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))
        counts = {"tokens": sum(split["tokens"] for split in manifest["splits"].values())}
    else:
        counts = json.loads(lines[1][-1])
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peaks = [memory.peak_kib[name] / 2**20 for name in ("VmHWM", "RssAnon", "Pss")]
    return Run(seconds, cpu_seconds, *peaks, **counts)


def cases_of(config: DataBenchmarkConfig, corpora: dict[str, Corpus]) -> list[Case]:
    """Largest last."""
    cases = [Case("prepare_data", "sample"), Case("run_clm", "sample")]
    for corpus in ("unique", "repeated"):
        if corpus in corpora:
            cases += [Case("prepare_data", corpus, file_format) for file_format in config.file_formats]
            if corpus == "unique" or config.full_peers:
                cases.append(Case("tiktoken", corpus))
    return cases + [Case("prepare_data", "memory")] * ("memory" in corpora)


def check_tokens(case: Case, run: Run, expected: dict[str, int], corpus: Corpus) -> None:
    """Raise GPT2ModernError unless all programs found the same tokens in a corpus; run_clm adds no EOS to documents."""
    tokens = run.tokens + (corpus.documents if case.program == "run_clm" else 0)
    if tokens != expected.setdefault(corpus.name, tokens):
        raise GPT2ModernError(
            f"{case.program} finds {tokens} tokens in the {corpus.name} text ({case.file_format}), "
            f"another program or run {expected[corpus.name]}: the times cannot be compared"
        )


def measure_reading(data_dir: Path, config: DataBenchmarkConfig) -> list[float]:
    """Mtok/s of each repetition: batches of blocks drawn without replacement, as (batch, block + 1) int64 tensors."""
    import torch

    from gpt2modern.data.blocks import PackedBlocks

    blocks = PackedBlocks(data_dir, "train")
    blocks.verify_checksums()  # of what was written, and the pages are in memory afterwards
    generator = torch.Generator().manual_seed(config.seed)
    rates = []
    for _ in range(config.reading_repetitions):
        order = torch.randperm(len(blocks), generator=generator)[: config.batch_size * BATCHES_PER_READING]
        batches = [batch.tolist() for batch in order.split(config.batch_size)]
        started = time.perf_counter()
        for batch in batches:
            blocks.__getitems__(batch)
        rates.append(len(order) * blocks.block_size / (time.perf_counter() - started) / 1e6)
    return rates


# The report


def spread(values: list[float], digits: int = 1) -> str:
    """Median (smallest to largest)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rate(runs: list[Run], corpus: Corpus, with_start: bool = True) -> float:
    """Median MB/s of the whole process, or of a peer's work after imports and the tokenizer."""
    return corpus.text_bytes / MEGABYTE / median(run.seconds if with_start else run.work_s for run in runs)


RESULTS_HEADER = ["program", "text", "MB", "format", "seconds", "MB/s", "MB/s without start", "CPU s"]
RESULTS_HEADER += ["RSS", "anonymous", "PSS sum"]
GOALS_HEADER = ["goal", "asked", "measured", "verdict"]


def results_table(runs: dict[Case, list[Run]], corpora: dict[str, Corpus]) -> str:
    """One line per case; seconds with spread, memory the largest of all repetitions."""
    rows = []
    for case, measured in runs.items():
        corpus = corpora[case.corpus]
        rows.append(
            [
                case.program,
                case.corpus,
                f"{corpus.text_bytes / MEGABYTE:.1f}",
                case.file_format,
                spread([run.seconds for run in measured], 2),
                f"{rate(measured, corpus):.2f}",
                "" if measured[0].work_s is None else f"{rate(measured, corpus, with_start=False):.2f}",
                f"{median(run.cpu_seconds for run in measured):.1f}",
                *(f"{max(getattr(run, name) for run in measured):.2f}" for name in MEMORY_FIELDS),
            ]
        )
    return markdown_table(RESULTS_HEADER, rows)


def goals_table(runs: dict[Case, list[Run]], corpora: dict[str, Corpus], reading: list[float]) -> str:
    """What was asked against what was measured. Ratios hold our whole process against the peer without its start."""
    rows: list[list[str]] = []

    def add(goal: str, asked: str, measured: str, met: bool) -> None:
        rows.append([goal, asked, measured, "met" if met else "missed"])

    def add_ratio(case: Case, peer: Case, least: float) -> None:
        whole = rate(runs[case], corpora[case.corpus])
        started, whole_peer = (rate(runs[peer], corpora[peer.corpus], with_start) for with_start in (False, True))
        goal = f"{case.corpus} text, {case.file_format}: MB/s over those of {peer.program} ({peer.corpus} text)"
        measured = f"{whole / started:.1f} ({whole / whole_peer:.1f} with the peer's start)"
        add(goal, f"at least {least}", measured, whole / started >= least)

    for case, measured in runs.items():
        if case.program == "prepare_data" and case.corpus in ("unique", "repeated"):
            peer = Case("tiktoken", case.corpus)
            add_ratio(case, Case("run_clm", "sample"), 60 if case.corpus == "unique" else 100)
            add_ratio(case, peer if peer in runs else Case("tiktoken", "unique"), 8)
        elif case.corpus == "memory":
            peak = max(run.peak_rss_gib for run in measured)
            megabytes = corpora["memory"].text_bytes / MEGABYTE
            add(f"largest process, {megabytes:.0f} MB of text", "under 1.5 GiB", f"{peak:.2f} GiB", peak < 1.5)
    add("random reading, int64 tensors", "at least 20 Mtok/s", f"{spread(reading)} Mtok/s", median(reading) >= 20)
    return markdown_table(GOALS_HEADER, rows)


REPORT = """\
# Data preparation: from files of text to packed tokens, whole processes

Question: how fast, and in how much memory, does prepare_data.py turn files into blocks, against `datasets.map` with
grouping (run_clm) and a pool of tiktoken workers, {num_proc} processes each?

Command: `{command}`, {commit}.
Timed from outside, the start of the process included: `{timed_command}`.
Versions: {versions}.
Hardware: {hardware}; load average {load_average} before the first run.

n = {repetitions} runs of each program, in turn over the programs. Seconds are the median (fastest to slowest), memory
is the largest of all runs in GiB. RSS: the largest resident set of any one process, mapped files included; anonymous:
the largest part of one that no file backs; PSS sum: all processes together, shared pages once. 1 MB is 10^6 bytes of
text; input comes from the page cache. Without start: after imports and the tokenizer. All programs found the same
number of tokens in each text (run_clm: but for one EOS per document, which it does not write).

Text: {origins}, no two documents equal, in {num_files} files. Documents: {texts}.

{results}
Ratios hold our whole process, its start included, against the work of the peer without its start.

{goals}
Reading: {reading} Mtok/s in one process, batches of {batch_size} random blocks as int64 tensors, n = {readings}.

Caveats: repeated text is easier than new text for an encoder that remembers words. run_clm reads the sample only, and
its rate is taken to hold for more.
"""


def environment() -> dict[str, str]:
    """Commit, versions, hardware and load, as a report states them."""
    from importlib.metadata import version

    packages = ("gigatoken", "tokenizers", "tiktoken", "transformers", "datasets", "pyarrow")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "commit": commit(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
        "hardware": f"{len(os.sched_getaffinity(0))} cores of {processor}, {memory_gib:.0f} GiB of memory",
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }


def report(
    config: DataBenchmarkConfig,
    command: str,
    facts: dict[str, str],
    origins: dict[str, int],
    corpora: dict[str, Corpus],
    runs: dict[Case, list[Run]],
    reading: list[float],
) -> str:
    """The whole report, Markdown."""
    ours = next(case for case in runs if case.program == "prepare_data")
    timed_command = command_of(ours, [f"TEXT-*.{ours.file_format}"], Path("TOKENIZER"), Path("DATA"), config)
    texts = [f"{corpus.name} {corpus.documents:,} ({corpus.passes:.2f} times each)" for corpus in corpora.values()]
    if corpora["unique"].text_bytes < config.unique_megabytes * MEGABYTE:
        texts.append(f"there were no {config.unique_megabytes:g} MB of different documents")
    return REPORT.format(
        command=command,
        timed_command=" ".join(["python", *timed_command[1:]]),
        **facts,
        num_proc=config.num_proc,
        repetitions=config.repetitions,
        origins=", ".join(f"{size / MEGABYTE:.1f} MB of {origin}" for origin, size in origins.items()),
        num_files=config.num_files,
        texts=", ".join(texts),
        results=results_table(runs, corpora),
        goals=goals_table(runs, corpora, reading),
        reading=spread(reading),
        batch_size=config.batch_size,
        readings=config.reading_repetitions,
    )


def command_without_folders(argv: list[str]) -> str:
    """The command line as a report shows it: of an absolute path, its last part."""
    words = (Path(word).name if os.path.isabs(word) else word for word in argv)
    return shlex.join(["python", "-m", "benchmarks.data", *words])


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_arguments(DataBenchmarkConfig, argv, __doc__)
    if not Path("/proc/self/smaps_rollup").exists():
        raise GPT2ModernError("memory is read from /proc, which only Linux has")
    if config.output and Path(config.output).exists():
        raise GPT2ModernError(f"--output {config.output}: is there already; name another file")
    if config.output and not os.access(Path(config.output).parent, os.W_OK):
        raise GPT2ModernError(f"--output {config.output}: its folder is not there or cannot be written to")
    megabytes = 3 * (config.sample_megabytes + config.unique_megabytes) + 4 * config.megabytes
    megabytes += 3 * config.memory_megabytes
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(config.work_dir).free < megabytes * MEGABYTE:
        raise GPT2ModernError(f"--work_dir {config.work_dir}: less than {megabytes:.0f} MB free; name another folder")
    with tempfile.TemporaryDirectory(prefix="data_benchmark_", dir=config.work_dir) as folder:
        benchmark(config, command_without_folders(argv), Path(folder).resolve())


def benchmark(config: DataBenchmarkConfig, command: str, folder: Path) -> None:
    """Write the texts, run everything, print the report and write it where it was asked for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name)
        tokenizer.save_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise GPT2ModernError(f"--tokenizer_name {config.tokenizer_name}: not a tokenizer ({error})") from error
    print("Collecting text", flush=True)
    documents, origins = read_documents(
        [Path(name) for name in config.text_dir or []],
        int(config.unique_megabytes * MEGABYTE),
        left_out=tokenizer.all_special_tokens,
        most_bytes=QUICK_DOCUMENT_BYTES if config.quick else None,
        seed=config.seed,
    )
    check_tiktoken(folder / "tokenizer" / "tokenizer.json", documents)
    formats = list(dict.fromkeys(["jsonl", *config.file_formats]))
    wanted = {
        "sample": (config.sample_megabytes, ["jsonl"]),
        "unique": (None, formats),
        "repeated": (config.megabytes, formats),
        "memory": (config.memory_megabytes, ["jsonl"]),
    }
    corpora = write_corpora(wanted, documents, folder, config.num_files, config.seed)
    del documents  # a process is forked from this one for every run
    facts = environment()

    cases = cases_of(config, corpora)
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    read_case = next(case for case in reversed(cases) if case.program == "prepare_data" and case.corpus != "memory")
    expected: dict[str, int] = {}
    for repetition in range(config.repetitions):
        for case in cases:
            output_dir = folder / "output"
            run = measure(case, corpora[case.corpus], folder / "tokenizer", output_dir, config)
            check_tokens(case, run, expected, corpora[case.corpus])
            runs[case].append(run)
            label = f"{repetition + 1}/{config.repetitions} {case.program} {case.corpus} {case.file_format}"
            print(f"{label}: {run.seconds:.2f} s, {rate([run], corpora[case.corpus]):.2f} MB/s", flush=True)
            if case == read_case and repetition == config.repetitions - 1:
                output_dir.rename(folder / "read")
            else:
                shutil.rmtree(output_dir)
    reading = measure_reading(folder / "read", config)

    text = report(config, command, facts, origins, corpora, runs, reading)
    print("\n" + text)
    if config.output:
        path = Path(config.output)
        path.write_text(text, encoding="utf-8")
        record = {
            **facts,
            "arguments": {name: value for name, value in vars(config).items() if name not in FOLDERS},
            "text_bytes_by_origin": origins,
            "texts": [
                {name: value for name, value in vars(corpus).items() if name != "files"} for corpus in corpora.values()
            ],
            "runs": [vars(case) | {"repetitions": [vars(run) for run in measured]} for case, measured in runs.items()],
            "reading_mtok_per_s": reading,
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
