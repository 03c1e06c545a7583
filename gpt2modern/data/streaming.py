"""The first documents of a Hub dataset, without downloading the rest of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import cause_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BATCH = 256  # documents between two looks at the bounds


def spool(
    stream: "IterableDataset",
    folder: Path,
    *,
    name: str,
    column: str,
    max_documents: int | None,
    max_tokens: int | None,
    count_tokens: Callable[[list], list[int]],
) -> "Dataset":
    """Write the documents of `stream` up to `max_documents` or `max_tokens` to `folder`, and open it.

    The bounds are met exactly: the last document is the one that reaches `max_tokens`. A finished spool is used again.
    column: the one that is kept; count_tokens: of each document of a list, its EOS included; name: for messages.
    Raises GPT2ModernError where the column is not there or the stream breaks off by an error.
    """
    from datasets import Dataset
    from tqdm import tqdm

    finished, unfinished = folder / "documents.arrow", folder / "unfinished.arrow"
    if finished.is_file():
        return Dataset.from_file(str(finished))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = tokens = 0
    writer = None
    bar = tqdm(total=max_tokens or max_documents, desc="Streaming", unit_scale=True)
    try:
        for table in stream.with_format("arrow").iter(BATCH):
            if column not in table.column_names:
                raise GPT2ModernError(f"{name}: no column {column!r}; there is {', '.join(table.column_names)}")
            table = table.select([column])
            if max_documents is not None:
                table = table.slice(0, max_documents - documents)
            if max_tokens is not None:
                totals = tokens + np.cumsum(count_tokens(table.column(0).to_pylist()))
                table = table.slice(0, int(np.searchsorted(totals, max_tokens)) + 1)
                tokens = int(totals[len(table) - 1])
            writer = writer or pa.ipc.new_stream(str(unfinished), table.schema)
            writer.write_table(table)
            documents += len(table)
            bar.update((tokens if max_tokens else documents) - bar.n)
            if documents == max_documents or (max_tokens is not None and tokens >= max_tokens):
                break
    except GPT2ModernError:
        raise
    except Exception as error:  # the network, the Hub, the dataset's own files
        raise GPT2ModernError(
            f"{name}: the stream ended with an error after {documents} documents ({cause_of(error)}); "
            "run the same command again"
        ) from error
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    if writer is None:
        raise GPT2ModernError(f"{name}: the stream has no documents")
    unfinished.rename(finished)
    return Dataset.from_file(str(finished))
