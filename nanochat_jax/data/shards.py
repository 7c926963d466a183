"""Folders of shards: their names and record, and how documents become shards.

    documents --> by hash of the key --> validation ----> shard_00000
                                     +-> training 1 ----> shard_00001   (each shuffled) ...

Documents of one key (the text itself, or what it was cut from) never stand on both sides. The same
documents in the same order give the same shards. One shard of text at a time is in memory.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.common import UserError, read_json, write_json

MANIFEST = "dataset.json"  # what is known of the shards in a folder
SHARD_CHARS = 250_000_000  # of the downloaded datasets' shards too
# Validation: a hundredth of the text within these bounds, and never more than a tenth.
_MIN_VALIDATION_CHARS = 1_000_000
_MAX_VALIDATION_CHARS = 50_000_000
# Small row groups give even a small dataset enough of them to deal out among lanes.
_ROW_GROUP_DOCS = 1_024
_MIN_ROW_GROUPS = 64
_MIN_ROW_GROUP_DOCS = 16
_SHUFFLE_SEED = 1337
HASH_RANGE = 1 << 64  # of text_hash

Shards = tuple[list[Path], Path]  # training shards in order, validation shard
KeyedText = tuple[str, str]  # (key, text): documents of one key stay on one side


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """dataset.json of a dataset's folder; None before there is one."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    return read_json(path, "delete it and run `python scripts/data.py` again for this dataset")


def is_recorded(directory: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether a shard is there with the size that the manifest tells."""
    path, known = directory / name, manifest["shards"].get(name)
    return known is not None and path.exists() and path.stat().st_size == known["bytes"]


def write_shards(
    documents: Iterable[KeyedText],
    directory: Path,
    *,
    about_chars: int,
    manifest: dict[str, Any],
    shard_chars: int = SHARD_CHARS,
) -> None:
    """Write `documents`, none empty, as shards into `directory`, with `manifest` in dataset.json.

    Shards of an earlier call are replaced once the new ones are complete. `about_chars`, the size
    of the text, sets the number of shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = min(max(about_chars / 100, _MIN_VALIDATION_CHARS), _MAX_VALIDATION_CHARS)
    validation_frac = min(wanted / max(about_chars, 1), 0.1)
    names = [shard_name(i) for i in range(1 + max(1, round(about_chars / shard_chars)))]
    shards = {}
    work = Path(tempfile.mkdtemp(dir=directory, prefix=".making."))
    try:
        dealt = _deal(documents, [work / f"{name}.jsonl" for name in names], validation_frac)
        for i, (name, texts) in enumerate(zip(names, dealt, strict=True)):
            random.Random(_SHUFFLE_SEED + i).shuffle(texts)
            write_shard(work / name, texts)
            shards[name] = {"bytes": (work / name).stat().st_size, "documents": len(texts)}
        (directory / MANIFEST).unlink(missing_ok=True)  # without it the folder is unfinished
        for old in directory.glob("shard_*.parquet"):
            old.unlink()
        for name in names:
            os.replace(work / name, directory / name)
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror or error}); free space or permissions "
            "there, or set NANOCHAT_BASE_DIR to another disk, and run the command again"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    record = {"validation": names[0], "train": names[1:], "shards": shards}
    write_json(directory / MANIFEST, {**manifest, **record})


def write_shard(path: Path, texts: list[str]) -> None:
    rows = min(max(len(texts) // _MIN_ROW_GROUPS, _MIN_ROW_GROUP_DOCS), _ROW_GROUP_DOCS)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="zstd")


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _deal(
    documents: Iterable[KeyedText], files: list[Path], validation_frac: float
) -> Iterator[list[str]]:
    """The texts of each shard, validation first, dealt out by way of `files`, one a shard."""
    limit = int(validation_frac * HASH_RANGE)
    with ExitStack() as stack:
        opened = [stack.enter_context(file.open("w")) for file in files]
        for key, text in documents:
            number = text_hash(key)
            shard = 1 + (number - limit) * (len(files) - 1) // (HASH_RANGE - limit)
            opened[shard if number >= limit else 0].write(json.dumps([number, text]) + "\n")
    dealt = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    if len(files) > 2 or all(file.stat().st_size for file in files):
        yield from ([text for _, text in documents] for documents in dealt)
        return
    # Of so few documents that one side got none, those with the smallest hash are validation.
    few = list(chain(*dealt))
    first = min((number for number, _ in few), default=0)
    if all(number == first for number, _ in few):
        raise UserError(
            f"got {len(few)} documents, expected at least two different ones, one for training "
            "and one for validation; add text"
        )
    yield [text for number, text in few if number == first]
    yield [text for number, text in few if number != first]
