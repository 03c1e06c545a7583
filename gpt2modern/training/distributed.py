"""Handle several processes: join them, make common decisions, name the lost ones, shard a model (FSDP2)."""

import contextlib
import math
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed import DistError, DistNetworkError, DistStoreError
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils.logging import disable_progress_bar

from gpt2modern.cores import available_cores, user_setting_of_threads
from gpt2modern.errors import GPT2ModernError, first_line, warn
from gpt2modern.training.models import COMPILE_OPTIONS
from modeling_gpt2modern import GPT2ModernForCausalLM

ADVICE = "start with accelerate launch or torchrun, or unset the variables that a launcher has left"
UNKNOWN_HOST_S = 10.0  # the name of a cluster's first node may be unknown while that node starts
_RUNNING = threading.Lock()  # runs of one process would share torch's random numbers and Accelerate's state


@contextlib.contextmanager
def joined_processes(mixed_precision: str | None, ddp_timeout: int) -> "Iterator[tuple[Accelerator, Processes]]":
    """Join the processes of this launch for the duration of the block; yield the Accelerator and the Processes.
    On a CPU, the block has the number of threads that the user set, or else all cores, divided among the processes.

    Models wrapped by DDP must be deleted inside the block. If a collective fails in it because processes are lost,
    raises GPT2ModernError that names them. The Python process may enter another block later; after an error, only if
    the launch has a single process.
    """
    setting = user_setting_of_threads(threads := torch.get_num_threads())
    if not _RUNNING.acquire(blocking=False):
        raise GPT2ModernError(
            "another run is training in this Python process; wait until it ends, or use a new process"
        )
    is_own = not AcceleratorState._shared_state  # an Accelerator that the caller has made stays as it is
    try:
        accelerator = build_accelerator(mixed_precision, ddp_timeout)
        processes = Processes(accelerator, ddp_timeout)
        with processes.lost_ones_named():
            if accelerator.device.type == "cpu":
                place = socket.gethostname(), getattr(os, "sched_getaffinity", str)(0)
                cores, sharing = available_cores(physical=True), gather_object([place]).count(place)
                torch.set_num_threads(threads if setting else max(1, cores // sharing))  # also of oneDNN and Inductor
                number, total = torch.get_num_threads(), psutil.cpu_count(logical=False) or os.cpu_count()
                processes.threads = (
                    f"CPU threads per process: {number}{f', by {setting}' if setting else ''} "
                    f"(cores: {cores} of {total}, processes that share them: {sharing})"
                )
            yield accelerator, processes
        accelerator.wait_for_everyone()
        accelerator.free_memory()
        accelerator.end_training()
    finally:
        torch.set_num_threads(threads)
        _RUNNING.release()
        if is_own and not torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)


def resolved_precision(mixed_precision: str | None) -> str | None:
    """Return `mixed_precision`; for "auto": "bf16" if the device of the run has instructions for it, otherwise "no"."""
    if mixed_precision != "auto":
        return mixed_precision
    device = None if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.current_accelerator(True)
    return "bf16" if has_bf16_instructions(device.type if device else "cpu") else "no"


def has_bf16_instructions(device_type: str) -> bool:
    """Return whether the CPU or GPU computes in bf16 itself: by conversion to fp32 it is slower than in fp32."""
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def build_accelerator(mixed_precision: str | None, ddp_timeout: int) -> Accelerator:
    """Join the processes of this launch and return their Accelerator.

    ddp_timeout: seconds that a process waits for the others before the run ends with an error. Raises GPT2ModernError
    if every process would silently train its own copy, or if the launcher's settings are invalid or unsupported.
    """
    disable_progress_bar()  # one bar is enough; transformers draws another for every file it writes
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # of Accelerate's number, replaced later
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    launched = launched_processes()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in ("", "-1") and torch.version.cuda and not torch.cuda.is_available():
        warn(f"no GPU is usable (CUDA_VISIBLE_DEVICES={visible} may be wrong, or no driver): training on the CPU")
    _refuse_other_engines()
    try:
        if launched > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            _wait_for_first_process(ddp_timeout)
        _join_after_restart(ddp_timeout)
        # Accelerate joins CPU processes only with cpu=True; otherwise each would train alone.
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=resolved_precision(mixed_precision),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout)),
                # No buffer changes in training, and gradients need no copy beside the buckets that they are summed in.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    except DistError as error:
        raise GPT2ModernError(
            f"{launched} processes cannot meet at MASTER_ADDR={os.environ['MASTER_ADDR']} "
            f"MASTER_PORT={os.environ['MASTER_PORT']} (--ddp_timeout {ddp_timeout}): {first_line(error)}; start this "
            "command on every node, each with its own rank, or, if the port is in use, choose another one (accelerate "
            "launch --main_process_port, torchrun --master_port)"
        ) from None
    except (ValueError, AssertionError, RuntimeError) as error:
        raise GPT2ModernError(
            f"cannot set up {launched} process(es) with mixed precision {mixed_precision}: {first_line(error)}; check "
            "the environment variables (ACCELERATE_*, RANK, MASTER_ADDR, ...), or start with accelerate launch"
        ) from None
    if launched != accelerator.num_processes:
        raise GPT2ModernError(
            f"the launcher started WORLD_SIZE={launched} processes but Accelerate joined "
            f"{accelerator.num_processes}: each would train its own model; use --config_file with the file of "
            "accelerate_configs/ that fits this machine"
        )
    _refuse_precision(accelerator)
    if accelerator.gradient_accumulation_steps != 1:
        raise GPT2ModernError(
            f"the Accelerate configuration sets gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; "
            "remove it; the number of accumulated micro-batches follows from --total_batch_size"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        _set_up_fsdp(accelerator)
    return accelerator


def launched_processes() -> int:
    """Return the number of processes of this launch: WORLD_SIZE of the environment, or 1 if that is not set.

    Raises GPT2ModernError if a variable of the launcher is missing, no number or out of range: this process would then
    wait for processes that do not exist.
    """
    size = _launch_number("WORLD_SIZE", 1, least=1)
    local_size = _launch_number("LOCAL_WORLD_SIZE", size, least=1, most=size)
    _launch_number("RANK", 0, most=size - 1)
    _launch_number("LOCAL_RANK", 0, most=local_size - 1)
    _launch_number("MASTER_PORT", 1, least=1, most=65535)
    restarts = _launch_number("TORCHELASTIC_RESTART_COUNT", 0) + _launch_number("TORCHELASTIC_MAX_RESTARTS", 0)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and (size > 1 or restarts or "TORCHELASTIC_RUN_ID" in os.environ):
        raise GPT2ModernError(
            f"WORLD_SIZE={size}: the environment has variables of a launcher, but not {', '.join(missing)}; {ADVICE}"
        )
    return size


def _launch_number(name: str, default: int, *, least: int = 0, most: int = 10**9) -> int:
    text = os.environ.get(name, str(default))
    if not (re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most):
        raise GPT2ModernError(f"{name}={text:.20} in the environment is not a number from {least} to {most}; {ADVICE}")
    return int(text)


def _wait_for_first_process(ddp_timeout: int) -> None:
    """Wait until the first process of the launch, or the launcher, listens at MASTER_ADDR and MASTER_PORT; torch would
    not say what it waits for. Raises GPT2ModernError if the host stays unknown or does not answer."""
    host, port, started, warned = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], time.monotonic(), False
    while True:
        try:
            if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                socket.getaddrinfo(host, port)  # this is the first process
            else:
                socket.create_connection((host, port), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:
            waited = time.monotonic() - started
            is_unknown = isinstance(error, socket.gaierror | UnicodeError)
            if waited > min(ddp_timeout, UNKNOWN_HOST_S if is_unknown else math.inf):
                raise GPT2ModernError(
                    f"cannot reach the first process at MASTER_ADDR={host} MASTER_PORT={port} from "
                    f"{socket.gethostname()}: {error}; start it, and give every node its address (accelerate launch "
                    "--main_process_ip, torchrun --master_addr)"
                ) from None
            if waited > 5 and not warned:
                warned = True
                warn(f"{host}:{port} does not answer yet ({error}); waiting for it up to --ddp_timeout {ddp_timeout} s")
        time.sleep(0.5)


def _refuse_precision(accelerator: Accelerator) -> None:
    precision, device = accelerator.mixed_precision, accelerator.device
    if precision not in ("no", "fp16", "bf16"):
        raise GPT2ModernError(f"mixed precision {precision!r} of the launcher is unknown; choose from no, fp16, bf16")
    if precision == "bf16" and device.type == "cuda" and not has_bf16_instructions("cuda"):
        raise GPT2ModernError(  # GPUs before the A100's generation emulate it, slowly
            f"{torch.cuda.get_device_name(device)} does not support bf16; use --mixed_precision fp16 (scales the loss)"
        )


def refuse_fp16_on_cpu(accelerator: Accelerator) -> None:
    """Raise GPT2ModernError for fp16 on a CPU, where Accelerate would silently train in fp32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise GPT2ModernError("--mixed_precision fp16 needs a GPU, but this run uses the CPU; use bf16 or no")


def _join_after_restart(ddp_timeout: int) -> None:
    """Create the process group if torchrun --max_restarts has restarted this run; otherwise do nothing.

    On a first start Accelerate creates it. After a restart the launcher's key-value store still has the addresses of
    the ended processes, which torch would use (seen with 2.13 and --standalone: connection refused); new keys avoid it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and not torch.distributed.is_initialized():
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        torch.distributed.init_process_group(
            torch.distributed.get_default_backend_for_device(device),
            store=_launcher_store("attempt"),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=ddp_timeout),
        )


def _launcher_store(prefix: str) -> torch.distributed.Store:
    """Return the launcher's key-value store, with a key prefix that no earlier attempt (restart) of this run uses."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
    return torch.distributed.PrefixStore(f"{prefix}/{attempt}", store)


def _refuse_other_engines() -> None:
    for variable, what in {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported, because it replaces optimizers and checkpoints",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported, because it replaces model and training loop",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported: every process reads its own data",
    }.items():
        if os.environ.get(variable, "").lower() == "true":
            raise GPT2ModernError(
                f"{what}; use another Accelerate configuration, such as accelerate_configs/fsdp2_one_node.yaml"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise GPT2ModernError(
            f"the Accelerate configuration sets dynamo_backend {backend}; remove it and use --torch_compile true"
        )


def _set_up_fsdp(accelerator: Accelerator) -> None:
    """Apply the FSDP part of the Accelerate configuration, also on CPUs, where Accelerate silently ignores it.

    Raises GPT2ModernError without a launcher, for FSDP settings that `shard_model` does not support, and for fp16.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):  # Accelerate fills the second from the first at times
            state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        raise GPT2ModernError(
            "the Accelerate configuration selects FSDP, which needs processes started by accelerate launch or torchrun"
        )
    plugin = accelerator.state.fsdp_plugin
    for what, is_set in {
        f"fsdp_version {plugin.fsdp_version}; only 2 is supported": plugin.fsdp_version != 2,
        "fsdp_activation_checkpointing; use --gradient_checkpointing true instead": plugin.activation_checkpointing,
        "fsdp_offload_params, which is not supported; remove it": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }.items():
        if is_set:
            raise GPT2ModernError(f"the Accelerate configuration sets {what}")
    if accelerator.mixed_precision == "fp16":
        raise GPT2ModernError("FSDP cannot be used with --mixed_precision fp16; use bf16 or no")


class Processes:
    """Let all processes of a run make common decisions, and find out which of them do not answer.

    Messages are sent between the CPUs, so that no process has to wait for its GPU. ddp_timeout: in seconds.
    """

    def __init__(self, accelerator: Accelerator, ddp_timeout: int):
        self.ddp_timeout = ddp_timeout
        self.is_main = accelerator.is_main_process
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.roll_calls = 0
        self.threads: str | None = None  # of a run on a CPU: a line about their number
        if self.count > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=ddp_timeout))
            self.store = _launcher_store("roll_call")
            self.store.set(f"host/{self.index}", socket.gethostname())
            self.hosts = self.store.multi_get([f"host/{index}" for index in range(self.count)])

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that all processes pass; every process must call this."""
        if self.count == 1:
            return number
        message = torch.tensor([number], dtype=torch.int64)
        torch.distributed.all_reduce(message, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(message)

    @contextlib.contextmanager
    def errors_of_main(self) -> Iterator[None]:
        """Raise on every process the GPT2ModernError that the main process raises in this block; all must enter it."""
        problem = None
        try:
            yield
        except GPT2ModernError as error:
            problem = str(error)
        (of_main,) = broadcast_object_list([problem])
        if of_main or problem:
            raise GPT2ModernError(of_main or problem)

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Call `action` on the main process only, and return its result, or raise its GPT2ModernError, on all."""
        with self.errors_of_main():
            answer = action() if self.is_main else None
        return broadcast_object_list([answer])[0]

    def call_roll(self, wait_s: float | None = None) -> None:
        """Wait until every process has called this method. Raises GPT2ModernError that names the processes which have
        not called it after `wait_s` seconds (default: 0.9 x --ddp_timeout).

        A collective that times out names no process, and NCCL's timeout ends the process without a message: hence the
        shorter default. Does nothing for a single process.
        """
        if self.count == 1:
            return
        self.roll_calls += 1
        keys, lost = [f"{self.roll_calls}/{index}" for index in range(self.count)], []
        try:
            self.store.set(keys[self.index], "here")
            self.store.delete_key(f"{self.roll_calls - 2}/{self.index}")  # every process has read it by now
            if self.store.check(["failed"]):
                lost = [int(self.store.get("failed"))]
            else:
                self.store.wait(keys, timedelta(seconds=0.9 * self.ddp_timeout if wait_s is None else wait_s))
        except DistNetworkError:  # the store is in process 0, if no launcher holds it
            lost = [0]
        except DistStoreError:
            lost = [index for index, key in enumerate(keys) if not self.store.check([key])]
        if lost:
            names = ", ".join(f"{index} on {self.hosts[index].decode()}" for index in lost)
            raise GPT2ModernError(
                f"of {self.count} processes these have ended or do not answer: {names}; start all again to resume from "
                "the newest checkpoint"
            )

    @contextlib.contextmanager
    def lost_ones_named(self) -> Iterator[None]:
        """Replace the error of a collective that fails in this block by a GPT2ModernError that names the processes
        which do not answer. If all of them answer, the original error is raised. An error that is not of a collective
        ends the other processes at their next one."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error)):
                self.call_roll(wait_s=min(30, 1 + self.ddp_timeout / 10))  # the others have failed, or will soon
            elif self.count > 1:
                with contextlib.suppress(RuntimeError):
                    self.store.set("failed", str(self.index))
            raise


def all_finite(loss: torch.Tensor, grad_norm: torch.Tensor, accelerator: Accelerator, processes: Processes) -> bool:
    """Return whether the losses of all processes and the gradient norm are finite; the result is the same on all.

    loss: scalar, of this process's part of the step; grad_norm: scalar. With loss scaling (fp16) a non-finite gradient
    norm is ignored, because the scaler skips that update itself. Waits for the device, once per step.
    """
    loss_value, norm_value = torch.stack((loss.float(), grad_norm.float())).tolist()
    finite = math.isfinite(loss_value) and (accelerator.scaler is not None or math.isfinite(norm_value))
    return not processes.largest(int(not finite))


def shard_model(model: GPT2ModernForCausalLM, accelerator: Accelerator, *, torch_compile: bool) -> torch.nn.Module:
    """Shard the model's parameters in place with FSDP2 and return the model: one unit per decoder layer, and one root
    unit for all other parameters.

    Each process stores one shard of the weights, gradients and optimizer state; a layer's weights are gathered only
    while they are used (settings: accelerate_configs/fsdp2_*.yaml). Accelerate's own units are not used: its unit of
    the output head is gathered when the head is called, but the loss reads the head's matrix without calling it. The
    root unit stays gathered from forward to backward. Under bf16 the layers compute in bf16 and the residual stream is
    bf16 too; gradients are summed over processes in fp32, and the inputs of forward (rotary embeddings, number of
    targets) keep their precision. torch_compile: compile each layer, without the gathering.
    """
    # The values that later layers mix in are a view. This would matter only if it were changed in place.
    warnings.filterwarnings("ignore", message=".* returned a view tensor")
    precision = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    reshard_after_forward = accelerator.state.fsdp_plugin.reshard_after_forward
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            if torch_compile:
                module.compile(options=COMPILE_OPTIONS)
            fully_shard(module, reshard_after_forward=reshard_after_forward, mp_policy=precision)
    return fully_shard(model, mp_policy=precision)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that forward passes without a backward pass (evaluation, sampling) have left gathered. Does
    nothing if the model is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor gathered from all processes, each of which must call this; return any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """Return an unsharded tensor, which every process has, on the device of `example` and sharded like it."""
    tensor = tensor.to(example.device)
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def whole_model(model: GPT2ModernForCausalLM, *, keep: bool) -> GPT2ModernForCausalLM | None:
    """Return an unsharded copy of a sharded model in CPU memory, ready to be saved; return any other model itself.

    Every process must call this; those with keep=False get None for a sharded model.
    """
    if not is_sharded(model):
        return model
    weights = {}
    for name, parameter in model.named_parameters():
        weight = whole_tensor(parameter.detach())
        if keep:
            weights[name] = weight.cpu()
    if not keep:
        return None
    with torch.device("meta"):
        whole = GPT2ModernForCausalLM(model.config)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    return whole
