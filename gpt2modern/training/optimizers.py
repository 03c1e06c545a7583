"""Optimizers: which parameter gets which update, at which learning rate."""

from collections.abc import Sequence

import torch
from torch import nn

from gpt2modern.training.sharding import is_sharded, shard_like


def build_optimizers(
    model: nn.Module,
    *,
    optimizer: str,
    learning_rate: float,
    embedding_learning_rate: float | None,
    scalar_learning_rate: float | None,
    muon_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> list[torch.optim.Optimizer]:
    """`adamw` for every parameter, or `muon` for the matrices inside the layers and AdamW for the rest.

    AdamW (arXiv:1711.05101) decays matrices only: gains, biases and scalars are not pulled towards zero. Its fused
    kernel does the whole update in one launch per dtype. Muon (arXiv:2502.16982, github.com/KellerJordan/Muon)
    orthogonalises the momentum of a matrix, whose step is then sqrt(max(1, rows / columns)) times its learning rate.
    embedding_learning_rate: for the token embedding; scalar_learning_rate: for gains, biases and scalars; None: as
    the rest. A tied embedding is also the head, and counts as an embedding. Every group carries its peak as `peak_lr`.
    """
    embedding = model.get_input_embeddings().weight
    by_muon = muon_parameters(model) if optimizer == "muon" else []
    taken = {id(parameter) for parameter in [embedding, *by_muon]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in taken]
    embeddings = [embedding] if embedding.requires_grad else []
    groups = [
        _group(embeddings, _given(embedding_learning_rate, learning_rate), weight_decay),
        _group([p for p in rest if p.ndim >= 2], learning_rate, weight_decay),
        _group([p for p in rest if p.ndim < 2], _given(scalar_learning_rate, learning_rate), 0.0),
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=epsilon, fused=True)
    if not by_muon:
        return [adamw]
    muon = ShardedMuon if is_sharded(model) else torch.optim.Muon
    return [adamw, muon([_group(by_muon, muon_learning_rate, weight_decay)], nesterov=True)]


class OptimizerChain(torch.optim.Optimizer):
    """Several optimizers as one: under a loss scale gradients are unscaled once, and either all of them step or none.

    `GradScaler` decides for each optimizer by that one's own gradients; the layers would go on while the embedding,
    whose gradients overflowed, stays.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        # Not Optimizer.__init__, which takes parameters into groups and state of its own.
        self.optimizers = list(optimizers)
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict]:
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def muon_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices inside the layers."""
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in name]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _group(parameters: list[nn.Parameter], peak_lr: float, weight_decay: float) -> dict:
    return {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay}


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon for the matrices of a sharded model: identical, except that a matrix is gathered once and not in
    each of the products that orthogonalise it. Weights and momentum stay sharded."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]).full_tensor()
                update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                learning_rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                parameter.add_(shard_like(update, parameter), alpha=-learning_rate)


# Muon starts with a shorter memory, as its first gradients point elsewhere: worth 0.013 nats in modded-nanogpt's log of
# 2024-11-06.
MUON_MOMENTUM, MUON_FIRST_MOMENTUM = 0.95, 0.85


def set_schedule(
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    learning_rate_factor: float,
    muon_momentum_warmup_steps: int,
) -> None:
    """Give every group the learning rate, and Muon the momentum, of update `step`."""
    share = min(1.0, step / muon_momentum_warmup_steps) if muon_momentum_warmup_steps else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor
            if "ns_steps" in group:  # a group of Muon's
                group["momentum"] = MUON_FIRST_MOMENTUM + share * (MUON_MOMENTUM - MUON_FIRST_MOMENTUM)
