"""Write rows of token ids to an Arrow file.

A row has the columns input_ids and labels, as Trainer and TRL expect them (they shift labels themselves). Both columns
refer to the same bytes of the file, so that labels take no space.
"""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpt2modern.data.packing import Rows

ROWS_PER_BATCH = 1000  # in an Arrow record batch, as `datasets` writes
TOKENS_PER_BATCH = 1 << 28  # most; a list's offsets are int32
CONTINUATION = b"\xff\xff\xff\xff"  # starts each message of an Arrow stream


def schema_of(dtype: str, packing: str) -> pa.Schema:
    """Return the columns of a file: input_ids, labels and, for best_fit, previous_token (see `packing.Rows`).
    dtype: uint16 or uint32."""
    ids = pa.type_for_alias(dtype)
    previous = {"previous_token": ids} if packing == "best_fit" else {}
    return pa.schema({"input_ids": pa.list_(ids), **previous, "labels": pa.list_(ids)})


class RowWriter:
    """Write rows to an Arrow file in the stream format, as `datasets` does. To be used in a `with` block.

    num_rows: rows written so far.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema, self.num_rows = schema, 0
        self._file = path.open("wb")

    def __enter__(self) -> "RowWriter":
        self._file.write(self.schema.serialize())
        return self

    def __exit__(self, *_) -> None:
        with self._file:
            self._file.write(CONTINUATION + bytes(4))  # end of the stream

    def write(self, rows: Rows) -> None:
        """Write rows, ROWS_PER_BATCH or fewer in a record batch."""
        ends = np.append(0, np.cumsum(rows.lengths))
        step = max(1, min(ROWS_PER_BATCH, TOKENS_PER_BATCH // max(1, rows.lengths.max(initial=1))))
        for first in range(0, len(rows.lengths), step):
            offsets = ends[first : first + step + 1]
            tokens = pa.array(rows.input_ids[offsets[0] : offsets[-1]])
            lists = pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), tokens)
            columns = {"input_ids": lists, "previous_token": pa.array(rows.previous_tokens[first : first + step])}
            batch = pa.record_batch({name: columns[name] for name in self.schema.names[:-1]})
            self._file.write(_message_with_labels(batch))
            self.num_rows += len(lists)


def _message_with_labels(batch: pa.RecordBatch) -> bytes:
    """Serialize a record batch to an Arrow message with one more column, labels, equal to its first column.

    The message describes each column by buffers, pairs of int64 (place in the body, number of bytes). Those of labels
    are made equal to those of the first column, which the format permits, and the copy of the bytes is omitted.
    """
    labelled = batch.append_column("labels", batch.column(0))
    message = pa.ipc.read_message(labelled.serialize())
    counts = [len(column.buffers()) for column in labelled.columns]
    words = np.frombuffer(bytearray(message.metadata), dtype="<i8")
    values = words.tolist()
    first = values.index(sum(counts) << 32) + 1  # the number of buffers is the int32 before them
    buffers = words[first : first + 2 * sum(counts)].reshape(-1, 2)
    size = int(buffers[-counts[-1], 0])  # the copy for labels is the last part of the body
    words[values.index(message.body.size)] = size
    buffers[-counts[-1] :] = buffers[: counts[0]]
    return CONTINUATION + struct.pack("<i", words.nbytes) + words.tobytes() + message.body[:size].to_pybytes()
