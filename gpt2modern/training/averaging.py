"""Average the weights of a model over the last updates of a run."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from gpt2modern.training.distributed import reshard
from gpt2modern.training.schedules import Schedule


class WeightMean(torch.optim.Optimizer):
    """Keep the mean of a model's trained weights over the last updates of a run (arXiv:1803.05407, arXiv:2306.03241).

    An optimizer that changes no weight, so that checkpoints save and restore the mean like the states of the others,
    also if it is sharded; torch's AveragedModel copies the module, which FSDP2 refuses. Without --average_last it does
    nothing and takes no memory.
    """

    def __init__(self, model: PreTrainedModel, schedule: Schedule):
        super().__init__([parameter for parameter in model.parameters() if parameter.requires_grad], {})
        self.model, self.schedule = model, schedule

    @torch.no_grad()
    def step(self, closure: None = None, *, step: int = -1) -> None:
        """Add the weights after update `step` (the first is 0) to the mean, if that is one of the last updates. The
        first call already takes the memory of the mean, so that a run does not first run out of it near its end."""
        if self.schedule.average_last and not self.state:
            self.state.update({p: {"mean": p.detach().clone()} for p in self.param_groups[0]["params"]})
        if self.has_begun(step + 1):
            means = [state["mean"] for state in self.state.values()]
            torch._foreach_lerp_(means, list(self.state), self.schedule.average_weight(step))

    def has_begun(self, step: int) -> bool:
        """Return whether the mean after `step` updates has any weights in it."""
        return bool(self.state) and self.schedule.average_weight(step - 1) > 0

    @contextlib.contextmanager
    def in_place_of_weights(self, step: int) -> Iterator[None]:
        """Exchange weights and mean during the block, if the mean after `step` updates has any weights in it."""
        self._exchange(step)
        yield
        self._exchange(step)

    @torch.no_grad()
    def _exchange(self, step: int) -> None:
        reshard(self.model)  # weights that are still gathered would stay as they are
        for weight, state in self.state.items() if self.has_begun(step) else ():
            copy = weight.clone()
            weight.copy_(state["mean"])
            state["mean"].copy_(copy)
