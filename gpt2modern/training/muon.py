"""Muon: update matrices by their momentum made orthogonal, each process a share of them."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from gpt2modern.training.distributed import has_bf16_instructions, shard_like, whole_tensor

ROW_BETA2, ROW_EPSILON = 0.95, 1e-10  # a row of an orthogonal matrix has a mean square of 1 / max(rows, columns)
# --muon_coefficients -> how much larger than its Frobenius norm a matrix is taken to be, and a, b, c of each step.
# Polar Express (arXiv:2505.16932) expects singular values of at most 1, which rounding to bf16 could exceed.
MUON_COEFFICIENTS = {
    "quintic": (1.0, [(3.4445, -4.7750, 2.0315)] * 5),
    "polar_express": (1.02, [
        (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ]),
}  # fmt: skip


def orthogonalize(matrix: torch.Tensor, margin: float, steps: list[tuple[float, float, float]]) -> torch.Tensor:
    """Return `matrix` (rows, columns) with singular values near 1 and the same singular vectors, in its dtype.

    It is divided by `margin` times its Frobenius norm; each step (a, b, c) maps X to a X + b X X^T X + c (X X^T)^2 X.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / (margin * wide.norm()).clamp(min=1e-7)
    for a, b, c in steps:
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.T if is_tall else wide).contiguous()


def computed_in_turn(
    function: Callable[[torch.Tensor], torch.Tensor], matrices: Iterator[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield function(matrix), of the same shape and dtype, for each of the matrices, which every process has.

    Each process computes every n-th result of n processes and sends it to the others.
    """
    count, index = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
    while turn := list(itertools.islice(matrices, count)):  # not all at once: they are unsharded
        results = [function(matrix) if n == index else torch.empty_like(matrix) for n, matrix in enumerate(turn)]
        works = [distributed.broadcast(result, n, async_op=True) for n, result in enumerate(results) if count > 1]
        for work in works:
            work.wait()
        yield from results


class Muon(torch.optim.Optimizer):
    """Update matrices by their Nesterov momentum made orthogonal (arXiv:2502.16982, github.com/KellerJordan/Muon): with
    the default settings identical to torch.optim.Muon, to the bit, where bf16 has instructions; elsewhere the products
    are in fp32, in a third of the time (Xeon without AVX-512 BF16).

    The learning rate of a matrix is multiplied by sqrt(max(1, rows / columns)). Each process orthogonalises a share of
    the matrices. Under FSDP2, weights and momentum are sharded. normalize_rows: divide the rows of an update as NorMuon
    does; cautious: decay only weights that the update, which is subtracted, moves towards zero (arXiv:2510.12402).
    """

    def __init__(self, groups: list[dict[str, Any]], *, coefficients="quintic", normalize_rows=False, cautious=False):
        super().__init__(groups, {"momentum": 0.95})
        self.margin, self.steps = MUON_COEFFICIENTS[coefficients]
        self.normalize_rows, self.cautious = normalize_rows, cautious

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            parameters.sort(key=torch.Tensor.numel, reverse=True)  # so that all processes get shares of one size
            momenta = (self._nesterov_momentum(parameter, group["momentum"]) for parameter in parameters)
            updates = computed_in_turn(partial(orthogonalize, margin=self.margin, steps=self.steps), momenta)
            for parameter, update in zip(parameters, updates, strict=True):
                if self.normalize_rows:
                    update = update * self._row_factors(parameter, update)
                update = shard_like(update, parameter)
                decays = parameter * update >= 0 if self.cautious else 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * decays)
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _nesterov_momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Add the gradient to its average; return their mix, an estimate of the next one (rows, columns), unsharded."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        dtype = torch.bfloat16 if has_bf16_instructions(gradient.device.type) else torch.float32
        return whole_tensor(gradient.lerp(average, momentum).to(dtype))

    def _row_factors(self, parameter: nn.Parameter, update: torch.Tensor) -> torch.Tensor:
        """Return the factors (rows, 1) that divide each row of `update` (rows, columns) by the root of its mean square,
        averaged over the steps, and keep the Frobenius norm (NorMuon, arXiv:2510.05491)."""
        mean_square = update.float().square().mean(dim=1, keepdim=True)
        average = self.state[parameter].setdefault("row_mean_square", torch.zeros_like(mean_square))  # not sharded
        divisor = average.lerp_(mean_square, 1 - ROW_BETA2).clamp(min=ROW_EPSILON)
        return (mean_square.sum() / (mean_square / divisor).sum().clamp(min=ROW_EPSILON) / divisor).sqrt()
