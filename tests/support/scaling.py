"""Count the bytes that a launched run sends in a step, and write the table of predictions into docs/scaling.md.

torchrun --nproc_per_node 2 -m tests.support.scaling FLAGS of train_accelerate.py   (counts)
python -m tests.support.scaling                                                     (writes the table)
"""

import functools
import os
import re
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_accelerate
from gpt2modern.cli import parse_arguments
from gpt2modern.training.batches import plan_batches
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.dry_run import named_devices, predict_run
from gpt2modern.training.models import DataShape, build_model

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
TABLE = re.compile(r"(?<=\n)\| devices.*?\n(?=\n)", re.DOTALL)
RECIPES = {  # 64 processes need passes of 8,192 tokens
    "124M": ("gpt2-124m-fineweb-edu", ("--per_device_train_batch_size", "8")),
    "xl": ("gpt2-xl-fineweb-edu", ()),
}
DEVICES = [f"{number} x {kind}" for kind in ("H100", "A100", "RTX 4090") for number in (1, 8, 16, 64)][:-2]


class SentBytes(TorchDispatchMode):
    """Add up what one of two processes sends: all of a tensor that is summed, half of one gathered or scattered."""

    def __init__(self):
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shares = {"c10d::allreduce_": 1.0, "c10d::_allgather_base_": 0.5, "c10d::_reduce_scatter_base_": 0.5}
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        self.total += shares.get(func._schema.name, 0) * max([t.nbytes for t in tensors], default=0)
        return func(*args, **(kwargs or {}))


def count(argv: list[str]) -> None:
    """Train, and print how many bytes this process has sent between the first two updates. Code is not generated for a
    compiled model, which would take minutes."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    seen = []
    with SentBytes() as sent:

        def callback(event, **details):
            if event == "before_update":
                seen.append(sent.total)

        train_accelerate.main(argv, callback)
    if os.environ["RANK"] == "0":
        print(f"sent {seen[1] - seen[0]:.0f} bytes")


def table() -> str:
    """Return the table of docs/scaling.md: what a dry run predicts, without its estimates of memory."""
    cells = ("ms per step (DDP)", "hours, DDP", "hours, FSDP2")
    header = ["devices", *(f"{size}: {cell}" for size in RECIPES for cell in cells)]
    rows = {devices: [devices] for devices in DEVICES}
    for recipe, flags in RECIPES.values():
        config = parse_arguments(TrainConfig, ["--config", recipe, *flags, "--dry_run", "true"])
        shape = DataShape(50257, 50256, config.block_size)
        with torch.device("meta"):
            model = build_model(config, shape)
        for devices, row in rows.items():
            count, _, device = named_devices(devices)
            plan = plan_batches(config, block_size=config.block_size, num_processes=count)
            facts = predict_run(config, model, plan, device)
            hours = [re.search(r"[\d.,]+(?= hours)", facts[f"  {name}"])[0] for name in ("DDP", "FSDP2")]
            row += [re.match(r"[\d.,]+", facts["  DDP"])[0], *hours]
    lines = [header, ["---"] * len(header), *rows.values()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        count(sys.argv[1:])
    else:
        PAGE.write_text(TABLE.sub(table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
