"""`make try-everything` takes a model folder to each client in a process of its own, and says which one failed."""

import re
import shutil
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file

from tests.support import clients
from tests.support.folders import change_json
from tests.support.trainer import TINY, train


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory):
    """A run whose model has a stock class, also one that llama.cpp knows."""
    overrides = f"{TINY},use_qk_norm=true,initializer_range=0.2"
    flags = {"max_steps": 2, "save_steps": 0, "eval_steps": 0, "export_stock": "true", "config_overrides": overrides}
    return train(data_dir, tmp_path_factory.mktemp("runs") / "run", **flags)


def table(capsys, *words) -> dict[str, str]:
    """Run the command, and return the last column of its table by the first one."""
    failed = False
    try:
        clients.main(list(map(str, words)))
    except SystemExit as ended:
        failed = ended.code == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    results = {name: row.split(clients.CLIENTS[name][0].__doc__)[1].strip() for name, row in rows.items()}
    assert failed == any(result.startswith("FAILED") for result in results.values())
    return results


@pytest.mark.slow
def test_the_table_says_what_worked_and_what_failed(model_dir, tmp_path, capsys):
    model = shutil.copytree(model_dir, tmp_path / "model")
    path = model / "stock" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    results = table(capsys, "--model", model, "--clients", "pipeline", "stock")
    assert re.fullmatch(r"'def __init__\(self.*' \(\d+ s\)", results["pipeline"])
    assert re.fullmatch(r"FAILED: .* is not the text of the model itself \(\d+ s\)", results["stock"])


def test_a_client_that_is_not_installed_is_no_failure(model_dir, monkeypatch, capsys):
    monkeypatch.setitem(clients.CLIENTS, "weights", (clients.use_weights, "torch", "no_such_client"))
    results = table(capsys, "--model", model_dir, "--clients", "weights")
    assert results == {"weights": "not installed: pip install no_such_client"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model nowhere has no config.json; name a model folder, or write one by make demo"),
        (["--clients", "gguv"], "--clients gguv is unknown (did you mean 'gguf'?)"),
        (["--clients", "tensorflow"], "--clients tensorflow is unknown; choose from pipeline, stock, weights, serve,"),
    ],
)
def test_wrong_flags_get_one_line(words, message, model_dir, capsys):
    with pytest.raises(SystemExit) as ended:
        clients.main(["--model", str(model_dir), *words])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_without_a_stock_model_its_clients_say_so(model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("stock"))
    worked, reason = clients.attempt(clients.use_stock, model, tmp_path)
    assert not worked and reason == "stock/ is missing; write it by python -m gpt2modern.conversion"
    change_json(model / "summary.json", lambda summary: summary.update(stock_class=None))  # as after a failed export
    assert clients.attempt(clients.use_stock, model, tmp_path) == (False, reason)
    change_json(model / "config.json", lambda config: config.update(final_logit_softcapping=30.0))
    worked, reason = clients.attempt(clients.use_stock, model, tmp_path)
    assert worked and re.fullmatch("not possible: .*does not allow final_logit_softcapping=30.0", reason)


def test_the_weights_are_read_and_saved(model_dir, tmp_path):
    assert re.fullmatch(r"\d\d tensors, all equal", clients.use_weights(model_dir, tmp_path))


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(model_dir, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra clients)")
    assert re.fullmatch(r"difference \d\.\de-\d\d at most", clients.use_onnx(model_dir, tmp_path))


@pytest.mark.exhaustive
def test_every_client(model_dir, capsys):
    results = table(capsys, "--model", model_dir)
    installed = [name for name, (_, *packages) in clients.CLIENTS.items() if all(map(find_spec, packages))]
    assert list(results) == list(clients.CLIENTS)
    assert not {name: result for name, result in results.items() if result.startswith("FAILED")}
    missing = {name for name, result in results.items() if result.startswith("not installed: pip install ")}
    assert missing == results.keys() - set(installed)
