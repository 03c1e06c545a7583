"""Compute bits per UTF-8 byte, which is comparable between tokenizers, from the nats and bytes of parts of a text."""

import math

import datasets
import evaluate

FEATURES = {"nats": datasets.Value("float64"), "bytes": datasets.Value("int64")}


class BitsPerByte(evaluate.Metric):
    """Divide the summed nats of all parts of a text by ln(2) and by their bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(FEATURES))

    def _compute(self, nats: list[float], bytes: list[int]) -> dict[str, float]:
        return {"bits_per_byte": math.fsum(nats) / math.log(2) / sum(bytes)}
