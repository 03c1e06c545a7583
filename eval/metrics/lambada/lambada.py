"""Compute accuracy and perplexity of the last words of LAMBADA, with standard errors.

evaluate.load("eval/metrics/lambada").compute(log_prob=[-2.0, -1.0], is_greedy=[False, True])
"""

import datasets
import evaluate

from gpt2modern.evaluation.tasks import last_word_accuracy


class Lambada(evaluate.Metric):
    """Count the words that greedy decoding finds (acc), and average the log-probabilities of all words (perplexity)."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"log_prob": datasets.Value("float64"), "is_greedy": datasets.Value("bool")})
        description = last_word_accuracy.__doc__
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=description, features=features)

    def _compute(self, **columns: list) -> dict[str, float | None]:
        return last_word_accuracy(**columns)
