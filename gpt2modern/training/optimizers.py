"""Build the optimizers of a run, and list which parameters each one updates and how much state it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import is_sharded, shard_like

# Muon starts with a lower momentum, because the first gradients soon become outdated: it lowered the loss by 0.013 nats
# in modded-nanogpt's log of 2024-11-06.
MUON_MOMENTUM, MUON_FIRST_MOMENTUM = 0.95, 0.85


class ShardedMuon(torch.optim.Muon):
    """Update the matrices of a sharded (FSDP2) model exactly as torch.optim.Muon does, but gather each matrix once, not
    in each product that orthogonalises it. Weights and momentum stay sharded."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]).full_tensor()  # (rows, columns), unsharded
                update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                learning_rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                parameter.add_(shard_like(update, parameter), alpha=-learning_rate)


def matrices_in_layers(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable 2-D parameters inside the decoder layers of `model`."""
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in name]


def build_muon(parameters: list[nn.Parameter], config: TrainConfig, *, sharded: bool) -> torch.optim.Optimizer:
    """Build Muon (arXiv:2502.16982, github.com/KellerJordan/Muon), which orthogonalises the momentum of each matrix.

    It scales the learning rate of a matrix by sqrt(max(1, rows / columns)). sharded: whether FSDP2 has sharded the
    parameters. Raises GPT2ModernError if the run trains LoRA adapters.
    """
    if config.lora_rank:
        raise GPT2ModernError("--optimizer muon does not support LoRA; use --optimizer adamw with --lora_rank")

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
    """Describe one value of --optimizer.

    parameters: returns the parameters of a model that it updates; AdamW updates all others. build: makes the optimizer
    for these parameters; None if AdamW is the only one. state_bytes: size of its state per weight, in bytes. Settings
    that only this optimizer uses are fields of TrainConfig that are declared with optimizer="its name".
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
    """Return the entry `name` of OPTIMIZERS. Raises GPT2ModernError, which lists the known names, if there is none."""
    if name not in OPTIMIZERS:
        raise GPT2ModernError(f"--optimizer {name} is unknown; choose from {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Build AdamW and, if --optimizer names another optimizer, that one for the parameters that it updates.

    AdamW (arXiv:1711.05101) is fused and applies weight decay to matrices only, not to gains, biases and scalars. An
    embedding that is also the output head counts as an embedding. Every parameter group stores its highest scheduled
    learning rate under the key `peak_lr`.
    """
    kind = optimizer_kind(config.optimizer)
    embedding = model.get_input_embeddings().weight
    taken = kind.parameters(model)
    further = [kind.build(taken, config, sharded=is_sharded(model))] if kind.build else []
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
    return [adamw, *further]


def init_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Create the state tensors that the first update of each optimizer creates, by an update: the weights change."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def state_bytes(model: nn.Module, optimizer: str) -> int:
    """Return how many bytes the optimizer state of all trainable parameters of `model` takes under --optimizer."""
    kind = optimizer_kind(optimizer)
    taken = sum(parameter.numel() for parameter in kind.parameters(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return kind.state_bytes * taken + ADAMW_STATE_BYTES * (trained - taken)


def parameter_group(parameters: list[nn.Parameter], peak_lr: float, weight_decay: float) -> dict[str, Any]:
    """Return a parameter group for a torch optimizer, whose learning rate is a scheduled fraction of `peak_lr`.

    To schedule other values of the group too, add a key `values`: {name: function of the step}.
    """
    return {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay}


class OptimizerChain(torch.optim.Optimizer):
    """Combine several optimizers into one, so that under a loss scale (fp16) either all of them step or none does.

    `GradScaler` decides separately for each optimizer that it knows. With separate optimizers, one would update its
    parameters while another skips the same update because its gradients overflowed.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        # Optimizer.__init__ is not called: it would make parameter groups and a state of its own.
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
    """Set the learning rate and the other scheduled values of every parameter group for update `step` (from 0)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * learning_rate_factor
        group.update({name: value_at(step) for name, value_at in group.get("values", {}).items()})
