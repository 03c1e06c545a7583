"""Shards: the same bytes from any number of processes and machines, and after any number of kills."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from gpt2modern.data import sources, workers
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.shards import Stopped, write_shard
from prepare_data import main
from tests.support.folders import contents, make_texts, refusal, run, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 12

# Forks a process for each line of flags, so that only one pays for the imports; prints its number and its exit code.
LAUNCHER = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
import awkward, datasets, gigatoken, torch, transformers, prepare_data, gpt2modern.data.publishing
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            prepare_data.main(json.loads(line))
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code)
    print("started", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    """Starts prepare_data.py again and again in processes that can be killed."""

    def __init__(self, stderr: Path):
        self.stderr = stderr.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def start(self, *flags: object) -> int:
        """The number of the process, which leads its own group."""
        self.process.stdin.write(json.dumps([str(flag) for flag in flags]) + "\n")
        self.process.stdin.flush()
        return self._told("started")

    def wait(self) -> int:
        """The exit code of the process that was started last."""
        return self._told("ended")

    def _told(self, what: str) -> int:
        word, number = self.process.stdout.readline().split()
        assert word == what  # or the number is none of a process, and something else would be killed
        return int(number)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.stderr.close()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher") / "stderr")
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer_dir) -> tuple:
    path = write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", make_texts(1500))
    return ("--train_file", path, "--tokenizer_name", tokenizer_dir, "--block_size", 16, "--num_shards", SHARDS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags) -> dict[str, str]:
    data_dir = tmp_path_factory.mktemp("undisturbed") / "data"
    run(data_dir, *flags, "--num_proc", 1)
    return contents(data_dir)


def shards_of(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "train").glob("data-*"))


# Processes and machines


@pytest.mark.parametrize("num_proc", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, flags, undisturbed, num_proc):
    run(tmp_path / "data", *flags, "--num_proc", num_proc)
    assert contents(tmp_path / "data") == undisturbed


@pytest.mark.fault("F24 preparation killed, divided, out of disk")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_machines_that_write_one_shard_each_make_what_one_machine_makes(tmp_path, flags, packing, capsys):
    flags = (*flags, "--num_shards", 3, "--packing", packing)
    run(tmp_path / "one", *flags)
    for index in range(3):
        folder = tmp_path / f"machine{index}"
        main([*map(str, flags), "--shard_index", str(index), "--output_dir", str(folder)])
        assert not (folder / "manifest.json").exists() and len(shards_of(folder)) == 1
        shutil.copytree(folder, tmp_path / "together", dirs_exist_ok=True)
    assert "2 of 3 shards are still missing" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "together" / "train").rglob("*.arrow")}
    run(tmp_path / "together", *flags)
    assert contents(tmp_path / "together") == contents(tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.fixture
def huge_beside_small(tmp_path, tokenizer_dir) -> tuple:
    """Flags for a file in which one document takes nearly all bytes."""
    path = write_jsonl(tmp_path / "huge.jsonl", ["a cat sat on a mat " * 20_000, *make_texts(3)])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(3, 5000))
    return ("--train_file", path, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir, "--block_size", 16)


def test_fewer_shards_are_written_than_would_have_documents(tmp_path, huge_beside_small, monkeypatch, capsys):
    monkeypatch.setattr(sources, "SHARD_BYTES", 40_000)
    for name, flags in (("default", ()), ("given", ("--num_shards", 12))):
        manifest = run(tmp_path / name, *huge_beside_small, *flags)
        files = sorted(path.name for path in (tmp_path / name / "train").glob("*.arrow"))
        count = len(files)
        assert 1 <= count <= 4 and files == [
            Path(shard["path"]).name for shard in manifest["splits"]["train"]["shards"]
        ]
        assert len(manifest["splits"]["train"]["shards"]) == count
        assert manifest["splits"]["train"]["documents"] == manifest["source"]["documents"] == 4
        assert f"note: {count} shards are written, not " in capsys.readouterr().out
        main(["verify", str(tmp_path / name)])
        assert len(datasets.load_from_disk(str(tmp_path / name / "train"))) == manifest["splits"]["train"]["rows"]
        assert PackedBlocks(tmp_path / name, "train").num_shards == count


def test_machines_agree_on_the_shards_that_have_no_documents(tmp_path, huge_beside_small):
    flags = (*huge_beside_small, "--num_shards", 6)
    run(tmp_path / "one", *flags)
    for index in range(6):
        main([*map(str, flags), "--shard_index", str(index), "--output_dir", str(tmp_path / "together")])
    run(tmp_path / "together", *flags)
    assert contents(tmp_path / "together") == contents(tmp_path / "one")


def test_a_training_split_without_documents_is_refused(tmp_path, tokenizer_dir, capsys):
    path, held_out = write_jsonl(tmp_path / "a.jsonl", ["\n"]), write_jsonl(tmp_path / "b.jsonl", ["a"])
    flags = ("--train_file", path, "--tokenizer_name", tokenizer_dir, "--validation_split_percentage", 99.99)
    assert "split has no documents" in refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", held_out.name]


# Killed


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.001)


def is_finished(data_dir: Path) -> bool:
    return (data_dir / "manifest.json").exists()


class MoreFiles:
    """Whether more than so many files and folders have appeared since it was made, or all is finished."""

    def __init__(self, data_dir: Path, count: int):
        self.data_dir, self.count = data_dir, count
        self.seen: set[str] = set()
        self.seen_first = len(self.look())

    def look(self) -> set[str]:
        for folder, folders, files in os.walk(self.data_dir):  # passes over folders that vanish
            self.seen.update(os.path.join(folder, name) for name in folders + files)
        return self.seen

    def __call__(self) -> bool:
        return len(self.look()) > self.seen_first + self.count or is_finished(self.data_dir)


@pytest.mark.fault("F24 preparation killed, divided, out of disk")
def test_a_run_killed_20_times_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, flags, undisturbed, launcher):
    rng = np.random.default_rng(0)
    data_dir = tmp_path / "data"
    killed = []
    while len(killed) < 20:
        process = launcher.start(*flags, "--num_proc", 2, "--output_dir", data_dir)
        wait_until(MoreFiles(data_dir, int(rng.integers(0, 60))))
        if len(killed) % 2:
            os.kill(process, signal.SIGKILL)  # its workers have to end by themselves
        else:
            os.killpg(process, signal.SIGKILL)
        if launcher.wait() == -signal.SIGKILL:
            killed.append(len(shards_of(data_dir)))
        if is_finished(data_dir):
            assert launcher.start(*flags, "--output_dir", data_dir) and launcher.wait() == 0
            assert contents(data_dir) == undisturbed
            shutil.rmtree(data_dir)
    assert launcher.start(*flags, "--num_proc", 2, "--output_dir", data_dir) and launcher.wait() == 0
    assert contents(data_dir) == undisturbed
    assert min(killed) < max(killed)


@pytest.fixture
def half_written(tmp_path, flags) -> Path:
    """A folder with 4 of the shards."""
    for index in range(4):
        main([*map(str, flags), "--shard_index", str(index), "--output_dir", str(tmp_path / "data")])
    return tmp_path / "data"


@pytest.mark.fault("F24 preparation killed, divided, out of disk")
def test_finished_shards_are_kept_and_altered_ones_written_again(half_written, flags, undisturbed, capsys):
    kept, altered, cut, without_held_out = shards_of(half_written)
    content = bytearray(altered.read_bytes())
    content[-200] ^= 1
    altered.write_bytes(content)
    os.truncate(cut, 1000)
    (half_written / ".preparing" / "shard-00003" / "held_out_tokens.arrow").write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in (kept, altered, cut, without_held_out)}
    run(half_written, *flags, "--num_proc", 1)
    assert f"1 of {SHARDS} shards are already finished and verified" in capsys.readouterr().out
    assert [path for path in before if path.stat().st_mtime_ns == before[path]] == [kept]
    assert contents(half_written) == undisturbed


def test_an_unfinished_folder_with_other_settings_is_refused_with_the_difference(half_written, flags, capsys):
    before = contents(half_written)
    line = refusal(capsys, *flags, "--shuffle_seed", 5, "--output_dir", half_written)
    assert "was prepared with other settings or files (shuffle_seed was 0, now 5); choose another folder" in line
    assert contents(half_written) == before


def processes_of_group(group: int) -> list[int]:
    """Those that live: a process that has ended and that nobody has asked about is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_worker_outlives_a_killed_process(tmp_path, flags, launcher):
    process = launcher.start(*flags, "--num_proc", 2, "--output_dir", tmp_path / "data")
    wait_until(lambda: shards_of(tmp_path / "data"))
    os.kill(process, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    wait_until(lambda: not processes_of_group(process))


@pytest.mark.fault("F24 preparation killed, divided, out of disk")
def test_ctrl_c_is_one_line_and_the_run_can_go_on(tmp_path, flags, undisturbed, launcher):
    printed = Path(launcher.stderr.name)
    begin = printed.stat().st_size
    process = launcher.start(*flags, "--num_proc", 2, "--output_dir", tmp_path / "data")
    wait_until(lambda: shards_of(tmp_path / "data"))
    os.killpg(process, signal.SIGINT)  # as a terminal does
    assert launcher.wait() == 130
    said = printed.read_bytes()[begin:].decode()
    assert said.endswith("\nerror: interrupted by the user (Ctrl-C)\n") and "Traceback" not in said
    run(tmp_path / "data", *flags, "--num_proc", 1)
    assert contents(tmp_path / "data") == undisturbed


def test_a_mistake_in_the_first_call_for_one_shard_leaves_the_corrected_one_free(tmp_path, flags, capsys):
    one = (*flags, "--num_shards", 3, "--shard_index", 0, "--output_dir", tmp_path / "data")
    for _ in range(2):
        assert "has no column 'nope'" in refusal(capsys, *one, "--text_column", "nope")
    main([*map(str, one)])
    assert shards_of(tmp_path / "data")


# Errors of one process


def test_an_error_of_one_process_ends_the_others(tmp_path, flags, tokenizer_dir, capsys):
    lines = [json.dumps({"text": text}) for text in make_texts(3000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n')
    common = ("--train_file", path, "--tokenizer_name", tokenizer_dir, "--num_proc", 2, "--num_shards", 8)
    line = refusal(capsys, *common, "--output_dir", tmp_path / "data")
    assert line.startswith(f"{path}: byte {path.stat().st_size - 4} is not UTF-8")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_process_leaves_its_shard_when_another_has_failed(half_written, flags, monkeypatch):
    jobs = []
    monkeypatch.setattr(workers, "write_shard", lambda job, index: jobs.append(job))
    with pytest.raises(SystemExit):  # there are no shards to go on with
        run(half_written, *flags, "--num_proc", 1)
    with pytest.raises(Stopped):
        write_shard(jobs[0], 5, is_stopped=lambda: True)
    assert len(shards_of(half_written)) == 4


def test_a_process_that_fails_stops_the_others(half_written, flags, monkeypatch, capsys):
    def fail_or_wait(job, index, is_stopped):
        if index == 4:
            raise OSError("shard 4")
        wait_until(is_stopped)
        raise Stopped

    monkeypatch.setattr(workers, "write_shard", fail_or_wait)
    began = time.monotonic()
    line = refusal(capsys, *flags, "--num_proc", 2, "--output_dir", half_written)
    assert "shard 4; finished shards are kept" in line and time.monotonic() - began < 30
    assert len(shards_of(half_written)) == 4


def test_a_worker_that_is_ended_from_outside_is_one_line(half_written, flags, monkeypatch, capsys):
    monkeypatch.setattr(workers, "write_shard", lambda job, index, is_stopped: os.kill(os.getpid(), signal.SIGKILL))
    line = refusal(capsys, *flags, "--num_proc", 2, "--output_dir", half_written)
    assert (
        "one of its processes was killed, perhaps because memory ran out (then use a smaller --num_proc); finished"
        in line
    )


@pytest.mark.fault("F24 preparation killed, divided, out of disk")
def test_a_full_disk_is_one_line_and_the_run_can_go_on(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "a.jsonl", [*make_texts(400), "a cat sat on a mat " * 20_000])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(3, 5000))
    flags = ["--train_file", path, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir, "--num_shards", 4]
    flags = [*map(str, flags), "--block_size", "16", "--num_proc", "1", "--output_dir", str(tmp_path / "data")]

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), *flags],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"error: --output_dir {tmp_path}/data: File too large; finished shards are kept: free disk space and run the "
        "same command again to resume"
    )
    finished = {shard: shard.stat().st_mtime_ns for shard in shards_of(tmp_path / "data")}
    assert 0 < len(finished) < 4
    main(flags)
    assert {shard: shard.stat().st_mtime_ns for shard in finished} == finished
    run(tmp_path / "undisturbed", *flags[:-2])
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_a_folder_that_another_process_prepares_is_left_to_it(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "data").mkdir()
    descriptor = os.open(tmp_path / "data", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as one that writes a shard
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert (
        line
        == f"--output_dir {tmp_path}/data is being prepared by another process; wait until that one ends, or stop it"
    )
    main([*map(str, flags), "--shard_index", "1", "--output_dir", str(tmp_path / "data")])
    os.close(descriptor)


def test_nothing_is_written_outside_of_the_folder(tmp_path, flags):
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf")}
    arguments = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, flags), "--num_proc", "2"]
    subprocess.run([*arguments, "--output_dir", str(tmp_path / "data")], env=environment, check=True)
    assert [path for path in home.rglob("*") if path.is_file()] == []
