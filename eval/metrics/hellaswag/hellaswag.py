"""Compute the accuracies of HellaSwag from sums of log-probabilities, with standard errors.

evaluate.load("eval/metrics/hellaswag").compute(log_probs=[[-4, -3]], tokens=[[2, 1]], characters=[[9, 3]], labels=[1])
"""

import datasets
import evaluate

from gpt2modern.evaluation.tasks import choice_accuracy


class HellaSwag(evaluate.Metric):
    """Compare the endings of an item by sum (acc), sum per character (acc_norm), sum per token (acc_token_norm)."""

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.List(datasets.Value("int64"))
        columns = {"log_probs": datasets.List(datasets.Value("float64")), "tokens": counts, "characters": counts}
        features = datasets.Features(columns | {"labels": datasets.Value("int64")})
        description = choice_accuracy.__doc__
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=description, features=features)

    def _compute(self, **columns: list) -> dict[str, float | None]:
        return choice_accuracy(**columns)
