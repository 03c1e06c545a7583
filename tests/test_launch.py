"""Every way to start the trainer gives the same losses: launchers, processes, nodes, shards; none waits forever."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.folders import random_rows, write_prepared
from tests.support.trainer import (
    MUON_SETTINGS,
    REPOSITORY,
    TINY,
    TORCHRUN,
    assert_same_weights,
    command,
    environment,
    losses,
    metrics,
    train,
)

CONFIGURATIONS = REPOSITORY / "accelerate_configs"
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "eval_steps": 3,
    "eval_blocks": 5,  # two processes make three and two passes
    "per_device_eval_batch_size": 1,
    "ddp_timeout": 120,
}
SPEEDRUN = {"model_preset": "speedrun", "optimizer": "muon", "embedding_learning_rate": 0.1}
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
SHARDED = "2 x cpu, sharded by FSDP2"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(data_dir, output_dir, *launcher, says, variables=(), **changes):
    """Train in processes started by `launcher`; says: the processes and device that the trainer prints."""
    arguments = command(data_dir, output_dir, *launcher, **(SETTINGS | changes))
    result = subprocess.run(
        arguments, env=environment(**dict(variables)), capture_output=True, text=True, timeout=200, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f" on {says}, precision no" in result.stdout
    first = re.search(r"^CPU threads.*", result.stdout, re.MULTILINE)[0]
    assert first.startswith("CPU threads per process: 1, by OMP_NUM_THREADS=1 (cores: ")
    assert first.endswith(f", processes that share them: {says[0]})")
    return output_dir


def eval_losses(run):
    return [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """Six steps in one process, with a checkpoint at the third."""
    return train(data_dir, tmp_path_factory.mktemp("whole"), **SETTINGS)


ONE_PROCESS = {
    "python": (sys.executable,),
    "accelerate launch": (*ACCELERATE, str(CONFIGURATIONS / "cpu.yaml")),
    "torchrun": (*TORCHRUN, "1"),
}


@pytest.mark.parametrize("launcher", ONE_PROCESS.values(), ids=ONE_PROCESS)
def test_every_launcher_gives_one_process_the_same_weights(whole, data_dir, tmp_path, launcher):
    run = launch(data_dir, tmp_path, *launcher, says="1 x cpu")
    assert losses(run) == losses(whole)
    assert_same_weights(run, whole)


TWO_PROCESSES = {
    "accelerate launch": (*ACCELERATE, str(CONFIGURATIONS / "cpu_two_processes.yaml")),
    "torchrun": (*TORCHRUN, "2"),
}


@pytest.mark.parametrize("launcher", TWO_PROCESSES.values(), ids=TWO_PROCESSES)
def test_two_processes_train_like_one(whole, data_dir, tmp_path, launcher):
    run = launch(data_dir, tmp_path, *launcher, says="2 x cpu")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert eval_losses(run) == pytest.approx(eval_losses(whole), rel=1e-6)


def stand_in(folder, name, script):
    """Write a program `name` into `folder`, which is to stand on the PATH."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def free_job_id():
    """Find a SLURM job number whose port (slurm_two_nodes.sbatch: 10000 + number) nobody listens on."""
    while True:
        number = random.SystemRandom().randrange(20000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 10000 + number)) != 0:
                return str(number)


def slurm(folder, **variables):
    return environment(
        PATH=f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_ID=free_job_id(),
        **variables,
    )


def test_two_nodes_train_like_one_process(whole, data_dir, tmp_path):
    """The SLURM file as it is, srun being a loop over two launchers that meet on the loopback interface."""
    stand_in(tmp_path, "scontrol", "echo 127.0.0.1")
    stand_in(
        tmp_path,
        "srun",
        'shift; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; first=$?; wait $! && exit $first',
    )
    script = (str(CONFIGURATIONS / "slurm_two_nodes.sbatch"),)
    run = tmp_path / "run"
    arguments = command(data_dir, run, "bash", *script, **(SETTINGS | {"mixed_precision": "no"}))
    arguments.remove(str(REPOSITORY / "train_accelerate.py"))  # the script names it
    result = subprocess.run(arguments, env=slurm(tmp_path), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 x cpu" in result.stdout
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.fault("F6 a SLURM job at its time limit")
def test_a_slurm_job_at_its_time_limit_is_queued_again(tmp_path):
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    stand_in(tmp_path, "srun", f"echo $$ > {tmp_path}/srun.pid; exec sleep 60")
    stand_in(tmp_path, "scancel", f'echo "$@" > {tmp_path}/scancel.log; kill -USR1 $(cat {tmp_path}/srun.pid)')
    variables = slurm(tmp_path)
    job = subprocess.Popen(["bash", str(CONFIGURATIONS / "slurm_two_nodes.sbatch")], env=variables, cwd=REPOSITORY)
    while not (tmp_path / "srun.pid").exists() or not (tmp_path / "srun.pid").read_text().strip():
        time.sleep(0.01)
    time.sleep(0.5)  # for the trap
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 128 + signal.SIGUSR1
    assert (tmp_path / "scancel.log").read_text().split() == ["--signal=USR1", variables["SLURM_JOB_ID"] + ".0"]
    assert f"requeue {variables['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_configuration_has_known_keys_only(path):
    """Accelerate refuses unknown keys at the top but takes any under fsdp_config."""
    configuration = load_config_from_file(str(path))
    assert configuration.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert configuration.num_processes % configuration.num_machines == 0  # a total, not a number per machine
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert configuration.fsdp_config.keys() <= options.keys()
    assert ("fsdp" in path.stem) == (configuration.fsdp_config.get("fsdp_version") == 2)


@pytest.fixture(scope="module")
def sharded(data_dir, tmp_path_factory):
    configuration = str(CONFIGURATIONS / "fsdp2_one_node.yaml")
    launcher = (*ACCELERATE, configuration, "--num_processes", "2", "--mixed_precision", "no")
    output_dir = tmp_path_factory.mktemp("sharded")
    return launch(data_dir, output_dir, *launcher, says=SHARDED, sample_prompts="def", sample_max_new_tokens=4)


def test_shards_train_like_the_whole_model(sharded, whole):
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-6)
    assert eval_losses(sharded) == pytest.approx(eval_losses(whole), rel=1e-6)
    norms = [[row["grad_norm"] for row in metrics(run)] for run in (sharded, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_sharded_model_is_sampled_from(sharded):
    assert len((sharded / "samples.jsonl").read_text().splitlines()) == 2  # of steps 3 and 6, from one process


@pytest.mark.fault("F22 the folder loads elsewhere, tied")
def test_a_sharded_run_leaves_the_folders_of_a_whole_one(sharded, whole):
    for folder in (Path(), Path("checkpoints/step_0000003")):
        names = [{path.name for path in (run / folder).iterdir()} - {"samples.jsonl"} for run in (sharded, whole)]
        assert names[0] == names[1]
        for name in ("config.json", "modeling_gpt2modern.py", "generation_config.json", "tokenizer.json"):
            assert (sharded / folder / name).read_bytes() == (whole / folder / name).read_bytes()
        for name in names[0] & {"model.safetensors", "optimizer.safetensors"}:
            found, expected = load_file(sharded / folder / name), load_file(whole / folder / name)
            assert found.keys() == expected.keys()
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)
    model = GPT2ModernForCausalLM.from_pretrained(sharded)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_sharded_run_resumes_bit_identical(sharded, data_dir, tmp_path):
    checkpoint = sharded / "checkpoints" / "step_0000003"
    run = launch(data_dir, tmp_path, *TORCHRUN, "2", says=SHARDED, variables=FSDP2, resume_from_checkpoint=checkpoint)
    assert losses(run) == losses(sharded)[3:]
    assert_same_weights(run, sharded)


@pytest.mark.fault("F2 another number of processes or micro-batch")
def test_a_sharded_run_resumes_in_one_process(sharded, whole, data_dir, tmp_path):
    run = train(data_dir, tmp_path, resume_from_checkpoint=sharded / "checkpoints" / "step_0000003", **SETTINGS)
    assert losses(run) == pytest.approx(losses(whole)[3:], rel=1e-6)


@pytest.mark.parametrize(
    ("variables", "changes"), [(FSDP2, MUON_SETTINGS), ({}, {})], ids=["FSDP2, all settings", "DDP"]
)
def test_muon_resumes_in_two_processes_after_one(data_dir, tmp_path, variables, changes):
    """The head is not tied, and some scalars lie on one shard only.

    Over three steps at these rates Muon's products in bf16 amplify rounding little; test_train.py has the recipe's.
    """
    flags = SPEEDRUN | changes
    one = train(data_dir, tmp_path / "one", **SETTINGS, **flags)
    two = tmp_path / "two"
    flags["resume_from_checkpoint"] = one / "checkpoints" / "step_0000003"
    launch(data_dir, two, *TORCHRUN, "2", says=SHARDED if variables else "2 x cpu", variables=variables, **flags)
    assert losses(two) == pytest.approx(losses(one)[3:], rel=1e-5)
    states = [load_file(run / "checkpoints" / "step_0000006" / "optimizer.safetensors") for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], atol=1e-4, rtol=1e-2)


@pytest.fixture
def one_launched_process(monkeypatch):
    """Set the environment that torchrun gives a single process, and leave its process group afterwards."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(10000 + int(free_job_id())))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_bf16_shards_divide_by_the_exact_number_of_targets(
    data_dir, tmp_path, monkeypatch, one_launched_process, preset
):
    """FSDP2 would round every tensor that a forward pass is given, also what the loss is divided by: 257 to 256 or 258.

    One process is enough to see it, and needs no launch.
    """
    rows = {"train": [random_rows(64, 32, seed=1)], "validation": [random_rows(2, 32, seed=2)]}
    data = write_prepared(tmp_path / "data", rows, tokenizer_dir=data_dir / "tokenizer", block_size=32)
    changes = {"mixed_precision": "bf16", "total_batch_size": 512, "max_steps": 4, "model_preset": preset}
    whole = train(data, tmp_path / "whole", **(SETTINGS | changes))
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    sharded = train(data, tmp_path / "sharded", **(SETTINGS | changes))
    assert losses(sharded) == pytest.approx(losses(whole), rel=5e-4)
    assert {tensor.dtype for tensor in load_file(sharded / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend INDUCTOR"),
        (FSDP2 | {"FSDP_VERSION": "1"}, {}, "fsdp_version 1; only 2"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "use --gradient_checkpointing"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({}, {"ddp_timeout": 0}, "--ddp_timeout"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(
    data_dir, tmp_path, monkeypatch, capsys, one_launched_process, variables, flags, expected
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        train(data_dir, tmp_path / "run", **flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and expected in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fsdp_without_a_launcher_is_refused(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SystemExit):
        train(data_dir, tmp_path / "run")
    assert "needs processes started by accelerate launch or torchrun" in capsys.readouterr().err


PLACE = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def refusal(data_dir, tmp_path, monkeypatch, capsys):
    """Train in this process with variables of a launcher, and return the error; a variable that is None is not set."""

    def train_with(**variables):
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, str(value))
        begin = time.monotonic()
        with pytest.raises(SystemExit) as caught:
            train(data_dir, tmp_path / "run", ddp_timeout=1)
        assert caught.value.code == 2 and time.monotonic() - begin < 20 and not (tmp_path / "run").exists()
        assert not torch.distributed.is_initialized()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return train_with


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": 1, "RANK": 5}, "RANK=5 in the environment is not a number from 0 to 0; start with accelerate"),
        ({"WORLD_SIZE": 1, "RANK": 5, "LOCAL_RANK": 5, "MASTER_PORT": 29999}, "RANK=5 in the environment is not a num"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc in the environment is not a number from 1 to"),
        ({"WORLD_SIZE": "9" * 5000}, "in the environment is not a number from 1 to"),
        ({"WORLD_SIZE": 0}, "WORLD_SIZE=0 in the environment is not a number from 1 to"),
        ({"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 4}, "LOCAL_WORLD_SIZE=4 in the environment is not a number from 1 to 2"),
        ({**PLACE, "LOCAL_RANK": 1}, "LOCAL_RANK=1 in the environment is not a number from 0 to 0"),
        ({**PLACE, "MASTER_PORT": "abc"}, "MASTER_PORT=abc in the environment is not a number from 1 to 65535"),
        ({**PLACE, "MASTER_PORT": 99999}, "MASTER_PORT=99999 in the environment is not a number from 1 to 65535"),
        ({**PLACE, "MASTER_ADDR": None}, "but not MASTER_ADDR, MASTER_PORT; start with accelerate launch or torchrun"),
        ({"TORCHELASTIC_RESTART_COUNT": "abc"}, "TORCHELASTIC_RESTART_COUNT=abc in the environment is not a number"),
        ({"TORCHELASTIC_RESTART_COUNT": 1}, "but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; "),
        ({"TORCHELASTIC_RUN_ID": "x"}, "but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; "),
        ({"TORCHELASTIC_MAX_RESTARTS": "abc"}, "TORCHELASTIC_MAX_RESTARTS=abc in the environment is not a number"),
    ],
)
def test_variables_of_a_launcher_that_contradict_each_other_are_refused_at_once(refusal, variables, expected):
    assert expected in refusal(**variables)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": 1, "MASTER_ADDR": "unknown.invalid"}, "reach the first process at MASTER_ADDR=unknown.invalid"),
        ({"RANK": 0, "MASTER_ADDR": "unknown.invalid"}, "reach the first process at MASTER_ADDR=unknown.invalid"),
        ({"RANK": 1}, "cannot reach the first process at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "cannot reach the first process at MAS"),
        ({"RANK": 0}, "2 processes cannot meet at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} (--ddp_timeout 1): "),
    ],
)  # fmt: skip
def test_a_node_that_is_absent_is_one_line_with_its_address(refusal, variables, expected):
    port = 10000 + int(free_job_id())
    assert expected.format(port=port) in refusal(**(PLACE | {"MASTER_PORT": port} | variables))


def test_a_port_in_use_is_one_line(refusal):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = refusal(**PLACE, MASTER_PORT=port)
    assert f"MASTER_PORT={port} (--ddp_timeout 1): " in line and "EADDRINUSE" in line and "choose another one" in line


@pytest.mark.fault("F23 a process that hangs")
def test_a_process_that_hangs_is_named_and_the_run_ends(data_dir, tmp_path):
    run = tmp_path / "run"
    changes = {"ddp_timeout": 10, "max_steps": 1_000_000, "eval_steps": 0, "save_steps": 0, "config_overrides": TINY}
    launcher = subprocess.Popen(
        command(data_dir, run, *TORCHRUN, "2", **(SETTINGS | changes)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        os.kill(pid_of_rank(1, launcher.pid), signal.SIGSTOP)
        output, _ = launcher.communicate(timeout=100)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert f"of 2 processes these have ended or do not answer: 1 on {socket.gethostname()}" in output


def pid_of_rank(rank, launcher_pid):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            variables = (process / "environ").read_text().split("\0")
        except OSError:
            continue
        if parent == str(launcher_pid) and f"RANK={rank}" in variables:
            return int(process.name)
    raise AssertionError(f"no process has RANK={rank}")
