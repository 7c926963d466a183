"""Make shards of documents: shuffle, set validation aside, write parquet.

    documents --> by hash of the key --> validation ----> shard_00000
                                     +-> training 1 ----> shard_00001   (each shuffled)
                                     +-> training 2 ...

Which side a document falls to depends on its key alone (the text itself, or what it was cut from),
so documents of one key never stand on both sides. The result is the same for the same documents in
the same order. At most about one shard of text is in memory.
"""

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.common import UserError, write_json
from nanochat_jax.data.datasets import MANIFEST, shard_name
from nanochat_jax.data.sources import TEXT_COLUMN

SHARD_CHARS = 250_000_000  # of the downloaded datasets' shards too
# Validation: a hundredth of the text within these bounds, and never more than a tenth.
_MIN_VALIDATION_CHARS = 1_000_000
_MAX_VALIDATION_CHARS = 50_000_000
# Small row groups give even a small dataset enough of them to deal out among lanes.
_ROW_GROUP_DOCS = 1_024
_MIN_ROW_GROUPS = 64
_MIN_ROW_GROUP_DOCS = 16
_SHUFFLE_SEED = 1337
_HASH_RANGE = 1 << 64

VALIDATION_SHARD = shard_name(0)

KeyedText = tuple[str, str]  # (key, text): documents of one key stay on one side


def write_shards(
    documents: Iterable[KeyedText], directory: Path, *, about_chars: int, manifest: dict[str, Any]
) -> None:
    """Write `documents` as shards into `directory`, and `manifest` and their names as dataset.json.

    Shards of an earlier call are replaced once the new ones are complete. `about_chars`, the size
    of the text, sets the number of shards. Empty documents must be left out by the caller.
    """
    directory.mkdir(parents=True, exist_ok=True)
    num_train = max(1, round(about_chars / SHARD_CHARS))
    wanted = min(max(about_chars / 100, _MIN_VALIDATION_CHARS), _MAX_VALIDATION_CHARS)
    validation_frac = min(wanted / max(about_chars, 1), 0.1)
    work = Path(tempfile.mkdtemp(dir=directory, prefix=".making."))
    try:
        buckets = [_Bucket(work, i) for i in range(1 + num_train)]
        _deal(documents, buckets, validation_frac)
        _fill_validation(buckets)
        totals = []
        for i, bucket in enumerate(buckets):
            texts = bucket.texts()
            random.Random(_SHUFFLE_SEED + i).shuffle(texts)
            totals.append({"documents": len(texts), "chars": sum(map(len, texts))})
            write_shard(work / shard_name(i), texts)
        _replace_shards(directory, work, len(buckets))
    except OSError as error:
        raise disk_error(directory, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    names = [shard_name(i) for i in range(len(buckets))]
    sizes = {name: (directory / name).stat().st_size for name in names}
    shards = {name: {"bytes": sizes[name], **totals[i]} for i, name in enumerate(names)}
    record = {"validation": VALIDATION_SHARD, "train": names[1:], "shards": shards}
    write_json(directory / MANIFEST, {**manifest, **record})


def write_shard(path: Path, texts: list[str]) -> None:
    """Write one shard under its final name only when it is complete."""
    rows = min(max(len(texts) // _MIN_ROW_GROUPS, _MIN_ROW_GROUP_DOCS), _ROW_GROUP_DOCS)
    unfinished = path.with_suffix(".tmp")
    pq.write_table(
        pa.table({TEXT_COLUMN: texts}), unfinished, row_group_size=rows, compression="zstd"
    )
    os.replace(unfinished, path)


def disk_error(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {directory} ({error.strerror or error}); free space or permissions "
        "there, or set NANOCHAT_BASE_DIR to another disk, and run the command again"
    )


@dataclass
class _Bucket:
    """The documents of one shard to be, spilled to files in order when there are many."""

    work: Path
    index: int
    held: list[tuple[int, str]] = field(default_factory=list)  # (hash of the key, text)
    spilled: list[Path] = field(default_factory=list)

    def spill(self) -> None:
        if self.held:
            path = self.work / f"bucket_{self.index}_{len(self.spilled)}.parquet"
            pq.write_table(pa.table({TEXT_COLUMN: [text for _, text in self.held]}), path)
            self.spilled.append(path)
            self.held = []

    def texts(self) -> list[str]:
        texts = [t for path in self.spilled for t in pq.read_table(path)[TEXT_COLUMN].to_pylist()]
        for path in self.spilled:
            path.unlink()
        texts += [text for _, text in self.held]
        self.held, self.spilled = [], []
        return texts


def _deal(documents: Iterable[KeyedText], buckets: list[_Bucket], validation_frac: float) -> None:
    limit = int(validation_frac * _HASH_RANGE)
    num_train = len(buckets) - 1
    held_chars = 0
    for key, text in documents:
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        if number < limit:
            index = 0
        else:
            index = 1 + (number - limit) * num_train // (_HASH_RANGE - limit)
        buckets[index].held.append((number, text))
        held_chars += len(text)
        if held_chars > SHARD_CHARS:
            for bucket in buckets:
                bucket.spill()
            held_chars = 0


def _fill_validation(buckets: list[_Bucket]) -> None:
    """Of so few documents that one side got none, those with the smallest hash are validation."""
    validation, train = buckets[0], buckets[1]
    if len(buckets) > 2 or validation.spilled or train.spilled:
        return
    if not validation.held or not train.held:
        documents = validation.held + train.held
        numbers = {number for number, _ in documents}
        if len(numbers) < 2:
            raise UserError(
                f"got {len(numbers)} different documents, expected at least two, one for training "
                "and one for validation; add text"
            )
        chosen = min(numbers)
        validation.held = [document for document in documents if document[0] == chosen]
        train.held = [document for document in documents if document[0] != chosen]


def _replace_shards(directory: Path, work: Path, num_shards: int) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)  # without it the folder counts as unfinished
    for old in directory.glob("shard_*.parquet"):
        old.unlink()
    for i in range(num_shards):
        os.replace(work / shard_name(i), directory / shard_name(i))
