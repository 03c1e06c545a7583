"""Update a model by Muon in two processes, whole and sharded, and save what one process must get too.

torchrun --nproc_per_node 2 -m tests.support.muon FILE
"""

import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from gpt2modern.training import muon
from gpt2modern.training.checkpoints import optimizer_state
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import shard_like, whole_tensor
from gpt2modern.training.optimizers import build_optimizers
from tests.support.models import tiny_model
from tests.support.trainer import MUON_SETTINGS

STEPS = 3
SETTINGS = {"muon": {}, "all settings": MUON_SETTINGS}


def build(settings=(), *, sharded=False):
    """Build a model whose matrices have rows that two processes share unevenly, and its Muon."""
    model = tiny_model("speedrun", intermediate_size=45)
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    config = TrainConfig(dry_run=True, optimizer="muon", weight_decay=0.5, **dict(settings))
    return model, build_optimizers(model, config)[1]


def updated(settings, *, sharded=False):
    """Return the matrices and their state after three updates, by name, and how many matrices this process has
    orthogonalised."""
    model, optimizer = build(settings, sharded=sharded)
    calls, orthogonalize = [], muon.orthogonalize

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return orthogonalize(*arguments, **keywords)

    muon.orthogonalize = counted
    for step in range(STEPS):
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = shard_like(torch.randn(parameter.shape, generator=generator), parameter)
        optimizer.step()
    muon.orthogonalize = orthogonalize
    weights = {name: whole_tensor(parameter.detach()) for name, parameter in model.named_parameters()}
    return weights | optimizer_state([optimizer], model), len(calls)


def main(path):
    distributed.init_process_group("gloo")
    found = {}
    for kind, settings in SETTINGS.items():
        for place in ("whole", "sharded"):
            tensors, calls = updated(settings, sharded=place == "sharded")
            shares = [None, None]
            distributed.all_gather_object(shares, calls)
            found[kind, place] = tensors, shares
    if distributed.get_rank() == 0:
        torch.save(found, path)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
