"""Joining the processes that a launcher started, and refusing a launch that would not train together."""

import os

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from command_line import UserError


def build_accelerator(*, mixed_precision: str | None, optimizer: str) -> Accelerator:
    """Raises UserError where a launch would silently train one copy per process."""
    disable_progress_bar()  # one bar is enough; transformers draws another for every file it writes
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    launched = os.environ.get("WORLD_SIZE", "1")
    if not launched.isdigit():
        raise UserError(f"the environment has WORLD_SIZE={launched!r}, which is no number: unset it, or use a launcher")
    try:
        # Accelerate joins CPU processes only if told that the CPU is meant; otherwise each would train alone.
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=mixed_precision)
    except ValueError as error:
        raise UserError(f"cannot set up {launched} process(es), precision {mixed_precision}: {error}") from None
    if int(launched) != accelerator.num_processes:
        raise UserError(
            f"the launcher started WORLD_SIZE={launched} processes but Accelerate joined "
            f"{accelerator.num_processes}: each would train alone; use a file of accelerate_configs/ for this machine"
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise UserError(f"the launcher asks for precision {accelerator.mixed_precision!r}; there are no, fp16 and bf16")
    if accelerator.mixed_precision == "fp16" and optimizer == "muon":
        raise UserError("--optimizer muon does not go with fp16: the loss scale serves one optimizer; use bf16 or no")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"the Accelerate configuration sets gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; "
            f"remove it: accumulation follows from --total_batch_size"
        )
    return accelerator
