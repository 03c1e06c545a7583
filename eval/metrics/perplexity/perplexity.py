"""Compute loss (nats/token), its standard error and perplexity from nats and tokens of blocks of text."""

import math

import datasets
import evaluate

FEATURES = {"nats": datasets.Value("float64"), "tokens": datasets.Value("int64")}


class Perplexity(evaluate.Metric):
    """Divide the summed nats of all blocks by their tokens. Sums are exact, in whatever order blocks come.

    The tokens of a block are correlated, so the standard error is that of a mean over blocks: the standard deviation of
    their losses, weighted by their tokens (ratio estimator: Cochran, Sampling Techniques, chapter 6), / sqrt(blocks).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(FEATURES))

    def _compute(self, nats: list[float], tokens: list[int]) -> dict[str, float | None]:
        count, total = len(nats), sum(tokens)
        loss = math.fsum(nats) / total
        squares = math.fsum((of_block - loss * size) ** 2 for of_block, size in zip(nats, tokens, strict=True))
        error = math.sqrt(squares * count / (count - 1)) / total if count > 1 else None
        return {"loss": loss, "standard_error": error, "perplexity": math.inf if loss > 709 else math.exp(loss)}
