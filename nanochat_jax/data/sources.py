"""Read documents from parquet shards, and make shards from other text.

    paths --> Corpus: the row groups of all shards as one numbered list --> texts of one row group

A shard is a parquet file with a string column `text`, one row a document; other columns are
ignored. A null is an empty document. Bytes that are not UTF-8 become U+FFFD, and the documents they
stood in are counted. A shard that cannot be read is an error that names it.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.common import UserError

TEXT_COLUMN = "text"
# Lanes that share row groups need the same one at about the same time; two cover a boundary.
_SHARED_ROW_GROUPS = 2


class Texts(NamedTuple):
    """The documents of one row group, and the indices of those that were not valid UTF-8."""

    texts: list[str]
    repaired: frozenset[int]


class RowGroup(NamedTuple):
    shard: int  # position in `paths`
    index: int  # in the shard
    num_documents: int
    first_document: int  # documents in the row groups before it


class Corpus:
    """The documents of several shards, in the order of `paths`, addressed by (row group, row).

    Row groups are numbered through all shards. Opening reads only the shards' footers.
    """

    def __init__(self, paths: Sequence[Path | str]):
        if not paths:
            raise UserError(
                "got no data shards, expected at least one; run `python scripts/data.py download` "
                "(or `pack`, `demo`) with the same --config"
            )
        self.paths = [Path(path) for path in paths]
        self.row_groups: list[RowGroup] = []
        self.num_documents = 0
        for shard, path in enumerate(self.paths):
            for index, size in enumerate(row_group_sizes(path)):
                self.row_groups.append(RowGroup(shard, index, size, self.num_documents))
                self.num_documents += size
        self._shared: dict[int, Texts] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed, renamed or rewritten; blind to folders."""
        return hashlib.sha256(b"".join(map(_tail, self.paths))).hexdigest()[:16]

    def read(self, group: int) -> Texts:
        """Decode row group number `group`."""
        shard, index, *_ = self.row_groups[group]
        return read_row_group(self.paths[shard], index)

    def read_shared(self, group: int) -> Texts:
        """As `read`, for lanes of one thread that come for the same row group one after another."""
        if group not in self._shared:
            if len(self._shared) == _SHARED_ROW_GROUPS:
                del self._shared[next(iter(self._shared))]
            self._shared[group] = self.read(group)
        return self._shared[group]

    def name(self, group: int, row: int) -> str:
        """A document's name for people: shard_00003:12:417 is row 417 of its row group 12."""
        shard, index, *_ = self.row_groups[group]
        return f"{self.paths[shard].stem}:{index}:{row}"


def _tail(path: Path) -> bytes:
    """Name, size and end of a shard: its footer holds offsets and statistics of every column."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_536))
        return f"{path.name} {size}\n".encode() + file.read()


def corrupt_shard(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{path} cannot be read as a parquet shard ({reason}); delete it and run "
        "`python scripts/data.py download` (or `pack`, `demo`) with the same --config"
    )


def row_group_sizes(path: Path) -> list[int]:
    """Number of documents in each row group of a shard, from its footer."""
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            schema = file.schema_arrow
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; run `python scripts/data.py download` (or `pack`, `demo`) "
            "with the same --config"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise corrupt_shard(path, error) from None
    if TEXT_COLUMN not in schema.names or not _is_text(schema.field(TEXT_COLUMN).type):
        raise UserError(
            f"{path}: got columns {schema.names}, expected a string column named "
            f"{TEXT_COLUMN!r}; rename the column that holds the documents"
        )
    return sizes


def read_row_group(path: Path, index: int) -> Texts:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(index, columns=[TEXT_COLUMN], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise corrupt_shard(path, error) from None
    return decode_column(table.column(TEXT_COLUMN))


def decode_column(column: pa.ChunkedArray) -> Texts:
    """Python strings of a text column, its bad UTF-8 repaired."""
    try:
        return Texts([text or "" for text in column.to_pylist()], frozenset())
    except UnicodeDecodeError:
        # A cast would validate; viewing the same buffers as binary does not.
        binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        raws = [raw or b"" for chunk in column.chunks for raw in chunk.view(binary).to_pylist()]
    decoded = [decode(raw) for raw in raws]
    repaired = frozenset(i for i, (_, bad) in enumerate(decoded) if bad)
    return Texts([text for text, _ in decoded], repaired)


def decode(raw: bytes) -> tuple[str, bool]:
    """Text of some bytes, and whether any had to be replaced by U+FFFD."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
