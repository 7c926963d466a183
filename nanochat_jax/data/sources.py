"""Read documents from parquet shards: the row groups of all shards are one numbered list.

A shard is a parquet file with a string column `text`, one row a document; other columns are
ignored. A null is an empty document. A shard that cannot be read is an error that names it.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.common import UserError

TEXT_COLUMN = "text"
_MAKE_AGAIN = "run `python scripts/data.py download` (or `pack`, `demo`) with the same --config"
# Lanes that share row groups need the same one at about the same time; two cover a boundary.
_KEPT_ROW_GROUPS = 2


class RowGroup(NamedTuple):
    path: Path
    index: int  # in the shard
    num_documents: int
    first_document: int  # documents in the row groups before it


class Corpus:
    """The documents of several shards, addressed by (row group, row). Opening reads the footers."""

    def __init__(self, paths: Sequence[Path]):
        if not paths:
            raise UserError(f"got no data shards, expected at least one; {_MAKE_AGAIN}")
        self.paths, self.num_documents = paths, 0
        self.row_groups: list[RowGroup] = []
        for path in paths:
            for index, size in enumerate(_row_group_sizes(path)):
                self.row_groups.append(RowGroup(path, index, size, self.num_documents))
                self.num_documents += size
        self.read = lru_cache(_KEPT_ROW_GROUPS)(self._read)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and ends of the shards: footers have statistics of every column."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 65_536))
                digest.update(f"{path.name} {size}\n".encode() + file.read())
        return digest.hexdigest()[:16]

    def texts(self) -> Iterator[str]:
        for group in range(len(self.row_groups)):
            yield from self.read(group)

    def name(self, group: int, row: int) -> str:
        """A document's name for people: shard_00003:12:417 is row 417 of its row group 12."""
        path, index, *_ = self.row_groups[group]
        return f"{path.stem}:{index}:{row}"

    def _read(self, group: int) -> list[str]:
        path, index, *_ = self.row_groups[group]
        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(index, columns=[TEXT_COLUMN], use_threads=False)
            return [text or "" for text in table.column(TEXT_COLUMN).to_pylist()]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _corrupt_shard(path, error) from None


def _row_group_sizes(path: Path) -> list[int]:
    try:
        with pq.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            sizes, schema = [group.num_rows for group in groups], file.schema_arrow
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {_MAKE_AGAIN}") from None
    except (pa.ArrowException, OSError) as error:
        raise _corrupt_shard(path, error) from None
    if TEXT_COLUMN not in schema.names or schema.field(TEXT_COLUMN).type not in (
        pa.string(),
        pa.large_string(),
    ):
        raise UserError(
            f"{path}: got columns {schema.names}, expected a string column named "
            f"{TEXT_COLUMN!r}; rename the column that holds the documents"
        )
    return sizes


def _corrupt_shard(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path} cannot be read as a shard ({reason}); delete it and {_MAKE_AGAIN}")
