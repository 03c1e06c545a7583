"""Build the optimizers of a run, and list which parameters each one updates and how much state it needs."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.muon import Muon

# Muon starts with a lower momentum, because the first gradients soon become outdated: it lowered the loss by 0.013 nats
# in modded-nanogpt's log of 2024-11-06. Its later records end with the lower one too.
MUON_MOMENTUM, MUON_LOW_MOMENTUM = 0.95, 0.85


@torch.no_grad()
def decay_cautiously(adamw: torch.optim.AdamW, *arguments: Any) -> None:
    """Decay the weights that the next step of AdamW moves towards zero (arXiv:2510.12402): those with the sign of the
    next average of gradients. Reads `cautious_weight_decay` of each parameter group."""
    for group in adamw.param_groups:
        decay = group["lr"] * group["cautious_weight_decay"]
        for parameter in [p for p in group["params"] if p.grad is not None and decay]:
            average = adamw.state[parameter].get("exp_avg")
            update = parameter.grad if average is None else average.lerp(parameter.grad, 1 - group["betas"][0])
            parameter.mul_(1 - decay * (parameter * update >= 0))


def matrices_in_layers(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable weights of all Linear modules inside the decoder layers of `model`."""
    modules = [each for name, each in model.named_modules() if ".layers." in name and isinstance(each, nn.Linear)]
    return [module.weight for module in modules if module.weight.requires_grad]


def embedding_tables(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable tables of `model` that are looked up by token ids: all embeddings but those of positions."""
    modules = [each for name, each in model.named_modules() if not re.search("position|wpe", name)]
    tables = {id(each.weight): each.weight for each in modules if isinstance(each, nn.Embedding)}
    return [table for table in tables.values() if table.requires_grad]


def without(parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trainable ones of `parameters` that are not in `others`."""
    others = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in others]


def build_muon(parameters: list[nn.Parameter], config: TrainConfig) -> Muon:
    """Build Muon for these matrices. Raises GPT2ModernError if the run trains LoRA adapters."""
    if config.lora_rank:
        raise GPT2ModernError("--optimizer muon does not support LoRA; use --optimizer adamw with --lora_rank")

    def momentum_at(step: int) -> float:
        warmup_steps, cooldown_steps = config.muon_momentum_warmup_steps, config.muon_momentum_cooldown_steps
        share = step / warmup_steps if warmup_steps else 1.0
        share = min(1.0, share, (config.max_steps - step) / cooldown_steps if cooldown_steps else 1.0)
        return MUON_LOW_MOMENTUM + share * (MUON_MOMENTUM - MUON_LOW_MOMENTUM)

    group = parameter_group(parameters, config.muon_learning_rate, config.weight_decay) | {
        "values": {"momentum": momentum_at}
    }
    return Muon(
        [group],
        coefficients=config.muon_coefficients,
        normalize_rows=config.muon_normalize_rows,
        cautious=config.cautious_weight_decay,
    )


@dataclass(frozen=True)
class OptimizerKind:
    """Describe one value of --optimizer.

    parameters: returns the parameters of a model that it updates; AdamW updates all others. build: makes the optimizer
    for these parameters; None if AdamW is the only one. state_bytes: size of its state per weight, in bytes. row_bytes:
    size of what it stores per row of a matrix, in bytes, under a configuration. Settings that only this optimizer uses
    are fields of TrainConfig that are declared with optimizer="its name".
    """

    parameters: Callable[[nn.Module], list[nn.Parameter]]
    build: Callable[..., torch.optim.Optimizer] | None
    state_bytes: int
    row_bytes: Callable[[TrainConfig], int] = lambda config: 0


OPTIMIZERS = {
    "adamw": OptimizerKind(lambda model: [], None, state_bytes=0),
    "muon": OptimizerKind(  # an fp32 average for each weight, and for each row
        matrices_in_layers, build_muon, state_bytes=4, row_bytes=lambda config: 4 * config.muon_normalize_rows
    ),
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
    taken = kind.parameters(model)
    further = [kind.build(taken, config)] if kind.build else []
    embeddings = without(embedding_tables(model), taken)
    head = without([model.get_output_embeddings().weight], [*taken, *embeddings])
    rest = without(model.parameters(), [*taken, *embeddings, *head])
    roles = [
        (embeddings, config.embedding_learning_rate, config.weight_decay),
        (head, config.head_learning_rate, config.weight_decay),
        ([p for p in rest if p.ndim >= 2], None, config.weight_decay),
        ([p for p in rest if p.ndim < 2], config.scalar_learning_rate, 0.0),
    ]
    adamw = torch.optim.AdamW(
        [parameter_group(p, config.learning_rate if rate is None else rate, decay) for p, rate, decay in roles if p],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    if config.cautious_weight_decay:
        for group in adamw.param_groups:
            group["cautious_weight_decay"], group["weight_decay"] = group["weight_decay"], 0.0
        adamw.register_step_pre_hook(decay_cautiously)
    return [adamw, *further]


def init_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Create the state tensors that the first update of each optimizer creates, by an update: the weights change."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def state_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Return how many bytes the optimizer state of all trainable parameters of `model` takes under --optimizer."""
    kind = optimizer_kind(config.optimizer)
    taken = kind.parameters(model)
    rest = sum(parameter.numel() for parameter in without(model.parameters(), taken))
    return ADAMW_STATE_BYTES * rest + sum(
        kind.state_bytes * matrix.numel() + kind.row_bytes(config) * len(matrix) for matrix in taken
    )


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
