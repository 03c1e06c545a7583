"""Optimizers: which parameters each one updates, at which learning rate, with how much state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import is_sharded, shard_like

# Muon starts with a shorter memory, as its first gradients point elsewhere: worth 0.013 nats in modded-nanogpt's log of
# 2024-11-06.
MUON_MOMENTUM, MUON_FIRST_MOMENTUM = 0.95, 0.85


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon for the matrices of a sharded model: identical, except that a matrix is gathered once and not in
    each of the products that orthogonalise it. Weights and momentum stay sharded."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]).full_tensor()  # (rows, columns), whole
                update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                learning_rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                parameter.add_(shard_like(update, parameter), alpha=-learning_rate)


def matrices_in_layers(model: nn.Module) -> list[nn.Parameter]:
    """List the trained matrices inside the decoder layers."""
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in name]


def build_muon(parameters: list[nn.Parameter], config: TrainConfig, *, sharded: bool) -> torch.optim.Optimizer:
    """Make Muon (arXiv:2502.16982, github.com/KellerJordan/Muon), which orthogonalises the momentum of a matrix.

    A step is sqrt(max(1, rows / columns)) times the learning rate. Raises GPT2ModernError for LoRA adapters.
    """
    if config.lora_rank:
        raise GPT2ModernError("--optimizer muon is for whole matrices; use adamw with --lora_rank")

    def momentum_at(step: int) -> float:
        warmup_steps = config.muon_momentum_warmup_steps
        share = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return MUON_FIRST_MOMENTUM + share * (MUON_MOMENTUM - MUON_FIRST_MOMENTUM)

    group = parameter_group(parameters, config.muon_learning_rate, config.weight_decay) | {
        "values": {"momentum": momentum_at}
    }
    return (ShardedMuon if sharded else torch.optim.Muon)([group], nesterov=True)


@dataclass(frozen=True)
class OptimizerKind:
    """What is known of one value of --optimizer.

    parameters: those of a model that it updates; AdamW updates all others. build: makes it for these parameters.
    state_bytes: of its state per weight. Its own settings are fields of TrainConfig with optimizer="its name".
    """

    parameters: Callable[[nn.Module], list[nn.Parameter]]
    build: Callable[..., torch.optim.Optimizer] | None
    state_bytes: int


OPTIMIZERS = {
    "adamw": OptimizerKind(lambda model: [], None, state_bytes=0),
    "muon": OptimizerKind(matrices_in_layers, build_muon, state_bytes=4),  # one fp32 average
}
ADAMW_STATE_BYTES = 8  # two fp32 averages


def optimizer_kind(name: str) -> OptimizerKind:
    """Return the entry of OPTIMIZERS; raises GPT2ModernError, listing them, for another name."""
    if name not in OPTIMIZERS:
        raise GPT2ModernError(f"--optimizer {name} is unknown; choose from {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make AdamW and, by --optimizer, another optimizer for the parameters that it takes.

    AdamW (arXiv:1711.05101) decays matrices only: gains, biases and scalars are not pulled towards zero. Its fused
    kernel does the whole update in one launch per dtype. A tied embedding is also the head, and counts as an embedding.
    Every parameter group carries its peak learning rate as `peak_lr`.
    """
    kind = optimizer_kind(config.optimizer)
    embedding = model.get_input_embeddings().weight
    taken = kind.parameters(model)
    beside = [kind.build(taken, config, sharded=is_sharded(model))] if kind.build else []
    others = {id(parameter) for parameter in [embedding, *taken]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in others]
    embeddings = [embedding] if embedding.requires_grad else []
    rates = [config.embedding_learning_rate, config.learning_rate, config.scalar_learning_rate]
    rates = [config.learning_rate if rate is None else rate for rate in rates]
    groups = [
        parameter_group(embeddings, rates[0], config.weight_decay),
        parameter_group([p for p in rest if p.ndim >= 2], rates[1], config.weight_decay),
        parameter_group([p for p in rest if p.ndim < 2], rates[2], 0.0),
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    return [adamw, *beside]


def state_bytes(model: nn.Module, optimizer: str) -> int:
    """Return the bytes of all optimizers' state for the trained parameters of `model`."""
    kind = optimizer_kind(optimizer)
    taken = sum(parameter.numel() for parameter in kind.parameters(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return kind.state_bytes * taken + ADAMW_STATE_BYTES * (trained - taken)


def parameter_group(parameters: list[nn.Parameter], peak_lr: float, weight_decay: float) -> dict[str, Any]:
    """Make a group of an optimizer whose learning rate follows the schedule below `peak_lr`.

    A key `values`, {name: function of the step}, gives the group other scheduled values.
    """
    return {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay}


class OptimizerChain(torch.optim.Optimizer):
    """Several optimizers as one: under a loss scale gradients are unscaled once, and either all of them step or none.

    `GradScaler` decides for each optimizer by that one's own gradients; the layers would be updated while the
    embedding, whose gradients overflowed, stays.
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


def set_schedules(optimizer: torch.optim.Optimizer, *, step: int, learning_rate_factor: float) -> None:
    """Give every parameter group its learning rate and its other scheduled values for update number `step`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * learning_rate_factor
        group.update({name: value_at(step) for name, value_at in group.get("values", {}).items()})
