"""--document_masking: the loss of the documents in a block is the loss of each of them alone."""

import pytest
import torch

from gpt2modern.evaluation.loss import batch_loss, document_positions
from tests.support.models import random_ids, tiny_model

SEPARATOR = 95


def packed_rows():
    """Return two blocks of 24 tokens and one more target, which hold documents that end with the separator."""
    batch = random_ids(2, 25)
    batch[0, [6, 13, 14]] = SEPARATOR
    batch[1, [3, 23]] = SEPARATOR
    return batch


def documents_of(row):
    """Return the inputs and targets of each document of a row; a separator's target is the next document's first."""
    ends = [i + 1 for i, token in enumerate(row[:-1].tolist()) if token == SEPARATOR]
    starts, ends = [0, *ends], [*ends, len(row) - 1]
    return [row[start : end + 1][None] for start, end in zip(starts, ends, strict=True) if end > start]


def test_positions_begin_again_after_a_separator():
    row = torch.tensor([[5, 95, 7, 8, 95, 95, 9], [1, 2, 3, 4, 5, 6, 95]])
    assert document_positions(row, SEPARATOR).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("flag_set", ["gpt2", "modern", "speedrun"])
def test_the_loss_is_that_of_the_documents_alone(flag_set):
    model = tiny_model(flag_set, unpadded_vocab_size=None)
    batch = packed_rows()
    with torch.no_grad():
        alone = sum(batch_loss(model, document)[0] for row in batch for document in documents_of(row))
        masked, _ = batch_loss(model, batch, separator=SEPARATOR)
        plain, _ = batch_loss(model, batch)
    assert masked.item() == pytest.approx(alone.item(), rel=1e-6)
    assert abs(plain.item() - alone.item()) > 1e-3 * alone.item()


def test_positions_begin_again_in_a_long_document():
    row = torch.tensor([[5, 6, 7, 8, 95, 1, 2, 3, 4]])
    assert document_positions(row, SEPARATOR, 3).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("flag_set", ["modern", "speedrun"])
def test_the_loss_of_long_documents_is_that_of_their_parts_alone(flag_set):
    model = tiny_model(flag_set, unpadded_vocab_size=None)
    batch, length = packed_rows(), 5
    with torch.no_grad():
        alone = 0.0
        for document in (document for row in batch for document in documents_of(row)):
            for start in range(0, document.shape[1] - 1, length):
                alone += batch_loss(model, document[:, start : start + length + 1])[0].item()
        masked, _ = batch_loss(model, batch, separator=SEPARATOR, max_document_length=length)
        whole, _ = batch_loss(model, batch, separator=SEPARATOR)
    assert masked.item() == pytest.approx(alone, rel=1e-6)
    assert abs(whole.item() - alone) > 1e-3 * alone
