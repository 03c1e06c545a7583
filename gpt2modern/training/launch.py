"""Joining the processes that a launcher started, and refusing a launch that would not train together."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.utils.logging import disable_progress_bar

from gpt2modern.errors import GPT2ModernError, first_line, warn


def build_accelerator(*, mixed_precision: str | None, ddp_timeout: int) -> Accelerator:
    """Join the processes. ddp_timeout: seconds that one waits for the others before the run ends with an error.

    Raises GPT2ModernError where a launch would silently train one copy per process, or asks for what this loop cannot do.
    """
    disable_progress_bar()  # one bar is enough; transformers draws another for every file it writes
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    launched = os.environ.get("WORLD_SIZE", "1")
    if not launched.isdigit():
        raise GPT2ModernError(
            f"the environment has WORLD_SIZE={launched!r}, which is no number: unset it, or use a launcher"
        )
    refuse_other_engines()
    check_visible_devices()
    join_after_restart(ddp_timeout)
    try:
        # Accelerate joins CPU processes only if told that the CPU is meant; otherwise each would train alone.
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))],
        )
    except (ValueError, AssertionError, RuntimeError) as error:
        if isinstance(error, torch.distributed.DistError):
            raise
        raise GPT2ModernError(
            f"cannot set up {launched} process(es), precision {mixed_precision}: {first_line(error)}; check the "
            "environment (ACCELERATE_*, RANK, MASTER_ADDR, ...) or use a launcher"
        ) from None
    if int(launched) != accelerator.num_processes:
        raise GPT2ModernError(
            f"the launcher started WORLD_SIZE={launched} processes but Accelerate joined "
            f"{accelerator.num_processes}: each would train alone; use a file of accelerate_configs/ for this machine"
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise GPT2ModernError(
            f"the launcher asks for precision {accelerator.mixed_precision!r}; there are no, fp16 and bf16"
        )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda":
        refuse_emulated_bf16(accelerator.device)
    if accelerator.gradient_accumulation_steps != 1:
        raise GPT2ModernError(
            f"the Accelerate configuration sets gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; "
            f"remove it: accumulation follows from --total_batch_size"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        set_up_fsdp(accelerator)
    return accelerator


def refuse_fp16_on_cpu(accelerator: Accelerator) -> None:
    """Raise GPT2ModernError where Accelerate would train in fp32 without a word, its fp16 being for GPUs alone."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise GPT2ModernError("--mixed_precision fp16 is for GPUs, and there is none here: use bf16 or no")


def join_after_restart(ddp_timeout: int) -> None:
    """Form the process group of a run that torchrun --max_restarts has started again; otherwise Accelerate does.

    The launcher's key-value store outlives its processes, with the addresses of those that are gone; torch would read
    these (seen with 2.13 and --standalone: connection refused). The group therefore meets under keys of its own.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and not torch.distributed.is_initialized():
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        torch.distributed.init_process_group(
            torch.distributed.get_default_backend_for_device(device),
            store=torch.distributed.PrefixStore(f"attempt/{attempt}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=ddp_timeout),
        )


def check_visible_devices() -> None:
    """Raise GPT2ModernError for a CUDA_VISIBLE_DEVICES that no GPU can be named by: CUDA would see none, without a word."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not re.fullmatch(r"|-1|NoDevFiles|(\d+|(GPU|MIG)-[\w/-]+)(, *(\d+|(GPU|MIG)-[\w/-]+|-1))*,?", names.strip()):
        raise GPT2ModernError(
            f"the environment has CUDA_VISIBLE_DEVICES={names!r}; give numbers as 0,1, or nothing to train on the CPU"
        )
    if names.strip()[:1].isdigit() and torch.version.cuda and not torch.cuda.is_available():
        warn(f"CUDA_VISIBLE_DEVICES={names}: there is no such GPU, or no driver; the CPU is used")


def refuse_emulated_bf16(device: torch.device) -> None:
    """Raise GPT2ModernError on GPUs older than the A100's generation, which have no matrix units for bf16 and emulate it."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise GPT2ModernError(
            f"{torch.cuda.get_device_name(device)} has no bf16: use --mixed_precision fp16, which scales the loss"
        )


def refuse_other_engines() -> None:
    """Raise GPT2ModernError for what an Accelerate configuration can ask for and the loop has no part for."""
    for variable, what in {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported, as the loop keeps its own optimizers and checkpoints",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported, as it brings its own model and loop",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported: every process sees its own data",
    }.items():
        if os.environ.get(variable, "").lower() == "true":
            raise GPT2ModernError(f"the Accelerate configuration: {what}; use accelerate_configs/fsdp2_one_node.yaml")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise GPT2ModernError(
            f"the Accelerate configuration sets dynamo_backend {backend}; remove it: --torch_compile does"
        )


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Take up the FSDP part of the configuration on the CPU too, where Accelerate leaves it aside without a word.

    Raises GPT2ModernError for FSDP settings that training/sharding.py does not follow.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):  # the second is filled from the first every now and then
            state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        raise GPT2ModernError(
            "the Accelerate configuration asks for FSDP, which needs processes started by accelerate launch or torchrun"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise GPT2ModernError(
            f"the Accelerate configuration sets fsdp_version {plugin.fsdp_version}; only 2 is supported"
        )
    if plugin.activation_checkpointing:
        raise GPT2ModernError(
            "the Accelerate configuration sets fsdp_activation_checkpointing; use --gradient_checkpointing"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise GPT2ModernError(
            "the Accelerate configuration sets fsdp_offload_params, which is not supported; remove it"
        )
    if accelerator.mixed_precision == "fp16":
        raise GPT2ModernError("FSDP does not go with fp16: its loss scale is for whole gradients; use bf16 or no")


class RollCall:
    """Says which process does not answer, where a collective that times out would name none.

    The processes sign in at the launcher's key-value store, beside whatever they reduce over.
    ddp_timeout: of the collectives, in seconds.
    """

    def __init__(self, accelerator: Accelerator, ddp_timeout: int):
        self.ddp_timeout = ddp_timeout
        self.process_index, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.count = 0
        if self.num_processes > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
            self.store = torch.distributed.PrefixStore(f"roll_call/{attempt}", store)
            self.store.set(f"host/{self.process_index}", socket.gethostname())

    def __call__(self, wait_s: float | None = None) -> None:
        """Wait until every process has called; raise GPT2ModernError naming those that have not after `wait_s` seconds.

        By default it gives up a little before NCCL does, which would end the process without naming anyone.
        """
        if self.num_processes == 1:
            return
        self.count += 1
        self.store.set(f"{self.count}/{self.process_index}", "here")
        self.store.delete_key(f"{self.count - 2}/{self.process_index}")  # by now everybody has read it
        keys = [f"{self.count}/{index}" for index in range(self.num_processes)]
        try:
            self.store.wait(keys, timedelta(seconds=0.9 * self.ddp_timeout if wait_s is None else wait_s))
        except torch.distributed.DistStoreError:
            lost = [index for index, key in enumerate(keys) if not self.store.check([key])]
            if lost:
                names = ", ".join(f"{index} on {self.store.get(f'host/{index}').decode()}" for index in lost)
                raise GPT2ModernError(
                    f"of {self.num_processes} processes these did not answer in --ddp_timeout {self.ddp_timeout} s: "
                    f"{names}; start all again to go on from the newest checkpoint"
                ) from None

    @contextlib.contextmanager
    def on_failure(self) -> Iterator[None]:
        """Call the roll where a collective has failed, and let its answer stand for the error if somebody is lost."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                self(wait_s=1 + self.ddp_timeout / 10)  # the others have failed, or will soon
            raise
