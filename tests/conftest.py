"""What several test files share: a small prepared dataset, and processes that stay small and offline."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import prepare_data
from gpt2modern import hub as client
from tests.support.folders import make_texts, run, write_jsonl
from tests.support.hub import Hub

BLOCK_SIZE = 32


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Blocks of 32 tokens, 300 vocabulary entries, made from one file of the standard library: about 45 blocks."""
    folder = tmp_path_factory.mktemp("data")
    lines = (Path(sysconfig.get_path("stdlib")) / "json" / "encoder.py").read_text().splitlines()
    (folder / "encoder.txt").write_text("\n".join(lines[:100]))
    arguments = f"--train_file {folder / 'encoder.txt'} --validation_split_percentage 25 --output_dir {folder / 'data'}"
    prepare_data.main([*arguments.split(), "--train_tokenizer", "300", "--block_size", str(BLOCK_SIZE)])
    return folder / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """300 different documents, one to a line."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(300))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, corpus) -> Path:
    """400 entries trained on `corpus`; the folder around it is what prepare_data.py wrote, in blocks of 32."""
    output_dir = tmp_path_factory.mktemp("tokenizer") / "data"
    run(output_dir, "--train_file", corpus, "--train_tokenizer", 400, "--block_size", 32)
    return output_dir / "tokenizer"


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """WikiText-2, Tiny Shakespeare and GPT-2's tokenizer, which are no part of the project; GPT2_MODERN_TEXT_DIR."""
    folder = os.environ.get("GPT2_MODERN_TEXT_DIR")
    if not folder:
        pytest.skip("GPT2_MODERN_TEXT_DIR names no folder with real texts")
    return Path(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """An empty Hub, which the clients of this process ask, without pauses before they try again."""
    with Hub() as hub:
        hub.ask_in_this_process(monkeypatch, tmp_path_factory.mktemp("hub"))
        monkeypatch.setattr(client, "RETRY_S", (0.0, 0.0, 0.0))
        yield hub


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """Forget the Accelerator of a test: the next one may want another precision in the same process."""
    yield
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fault_log(request):
    """Says what a test of faults has tried, for the table that `pytest -m fault` ends with."""

    def report(fault: str, tried: int = 1, steps_again: int = 0) -> None:
        """fault: the row's name. steps_again: the most steps that a restart had to make a second time."""
        request.node.user_properties.append(("fault", (fault, tried, steps_again)))

    return report


def pytest_runtest_setup(item):
    """`@pytest.mark.fault("name")` is a row of the table, tried once by the test; else it uses `fault_log`."""
    for marker in item.iter_markers("fault"):
        for name in marker.args:
            item.user_properties.append(("fault", (name, 1, 0)))


def pytest_terminal_summary(terminalreporter, config):
    if "fault" not in config.option.markexpr:
        return
    tried, again, failed = {}, {}, {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, count, steps in (value for key, value in report.user_properties if key == "fault"):
                tried[name] = tried.get(name, 0) + count
                again[name] = max(again.get(name, 0), steps)
                failed[name] = failed.get(name, 0) + (outcome == "failed")
    width = max(map(len, tried), default=0)
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':{width}}  tried  lost")
    for name in sorted(tried, key=lambda name: (int(name[1:].split()[0]) if name[1:2].isdigit() else 99, name)):
        lost = "nothing" + (f"; at most {again[name]} steps made again" if again[name] else "")
        lost = f"{failed[name]} TESTS FAILED" if failed[name] else lost
        terminalreporter.write_line(f"{name:{width}}  {tried[name]:5}  {lost}")
