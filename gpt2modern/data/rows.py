"""Write rows of token ids to an Arrow file, and read them back by their place in it.

A row has the columns input_ids and labels, as Trainer and TRL expect them (they shift labels themselves). Both columns
refer to the same bytes of the file, so that labels take no space.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gpt2modern.data.packing import Rows
from gpt2modern.errors import GPT2ModernError

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
    body, copied = (pa.ipc.read_message(each.serialize()) for each in (batch, labelled))
    counts = [len(column.buffers()) for column in labelled.columns]
    words = np.frombuffer(bytearray(copied.metadata), dtype="<i8")
    values = words.tolist()
    words[values.index(copied.body.size)] = body.body.size
    first = values.index(sum(counts) << 32) + 1  # the number of buffers is the int32 before them
    buffers = words[first : first + 2 * sum(counts)].reshape(-1, 2)
    buffers[-counts[-1] :] = buffers[: counts[0]]
    return CONTINUATION + struct.pack("<i", words.nbytes) + words.tobytes() + body.body.to_pybytes()


class Segment(NamedTuple):
    """Locate consecutive tokens in an open file. place: byte of the first token; size: number of tokens."""

    file: object
    place: int
    size: int
    dtype: np.dtype

    def split(self, size: int) -> tuple["Segment", "Segment"]:
        """Divide the segment after `size` tokens."""
        rest = self.place + size * self.dtype.itemsize
        return self._replace(size=size), self._replace(place=rest, size=self.size - size)

    def read(self, offset: int, count: int) -> np.ndarray:
        """Return at most `count` tokens from number `offset` of the segment on.

        Raises GPT2ModernError if the file cannot be read or has become shorter. A memory map would end the process by
        SIGBUS then.
        """
        item = self.dtype.itemsize
        size = min(count, self.size - offset) * item
        try:
            data = os.pread(self.file.fileno(), size, self.place + offset * item)
            problem = "it was truncated while it was read"
        except OSError as error:
            data, problem = b"", error.strerror
        if len(data) != size:
            raise GPT2ModernError(f"{self.file.name}: {problem}; prepare the data again, then resume the run")
        return np.frombuffer(data, self.dtype)


def open_rows(path: Path) -> tuple[pa.Schema, list[Segment], np.ndarray, np.ndarray | None]:
    """Open a file written by `RowWriter`. Returns its schema, one segment per record batch, (rows,) int64 tokens per
    row, and the (rows,) previous tokens (None without this column).

    The file is mapped only during this call. Raises OSError or ValueError if it is not a valid Arrow file.
    """
    file = path.open("rb", buffering=0)
    mapped = pa.memory_map(str(path)).read_buffer()
    table = pa.ipc.open_stream(mapped).read_all()
    if not {"input_ids", "labels"} <= set(table.column_names) or not pa.types.is_list(table.schema.field(0).type):
        return table.schema, [], np.empty(0, np.int64), None
    segments, lengths = [], [np.empty(0, np.int64)]
    for chunk in table.column("input_ids").chunks:
        chunk.validate(full=True)  # of the offsets
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=True)
        place = values.ctypes.data - mapped.address + int(offsets[0]) * values.itemsize
        segments.append(Segment(file, place, int(offsets[-1] - offsets[0]), values.dtype))
        lengths.append(np.diff(offsets).astype(np.int64))
    has_previous = "previous_token" in table.column_names
    previous = table.column("previous_token").to_numpy().copy() if has_previous else None
    return table.schema, segments, np.concatenate(lengths), previous
