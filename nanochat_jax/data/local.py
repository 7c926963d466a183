"""Bring your own text: the documents of a folder, and how the `local` dataset is made of them.

    .parquet  each row of the column `text`        .jsonl  the string `text` of each line's object
    .txt .md  the file, cut at blank lines into pieces of at most MAX_FILE_CHARS (of a document that
              is longer than a row, best-fit packing uses only the beginning)

Subfolders are searched, hidden files and other kinds are left out, files are read in order of their
paths. Empty documents are skipped; bytes that are not UTF-8 become U+FFFD; both are counted.

A folder that already holds shards (two or more files, all named shard_NNNNN.parquet) is used in
place. Its validation shard, the one with the highest number, is recorded at first use and stays the
same when shards are added.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from nanochat_jax.common import UserError, data_dir, log, write_json
from nanochat_jax.data import shards
from nanochat_jax.data.datasets import MANIFEST, read_manifest
from nanochat_jax.data.sources import TEXT_COLUMN, decode, read_row_group, row_group_sizes

SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
MAX_FILE_CHARS = 8_000  # about 2,000 tokens, a row of the large recipes


@dataclass
class Counts:
    files: int = 0
    documents: int = 0
    empty_documents: int = 0
    repaired_documents: int = 0


def dataset_directory(local_dir: str) -> Path:
    """Our own folder for what is made of, or known about, the text in `local_dir`."""
    if not local_dir:
        raise UserError(
            "got config.data.name = 'local' without config.data.local_dir, expected a folder; "
            "add --config.data.local_dir=FOLDER"
        )
    source = Path(local_dir).expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"got config.data.local_dir = {local_dir}, expected an existing folder")
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    return data_dir() / f"local_{re.sub(r'[^A-Za-z0-9_.-]', '_', source.name)}_{digest}"


def shard_paths(local_dir: str) -> tuple[list[Path], Path] | None:
    """Training shards and validation shard of a folder that was packed or is used in place."""
    directory = dataset_directory(local_dir)
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    if not manifest["in_place"]:
        return [directory / name for name in manifest["train"]], directory / manifest["validation"]
    source = Path(manifest["source"])
    validation = source / manifest["validation"]
    return [path for path in sorted(source.glob("*.parquet")) if path != validation], validation


def prepare(local_dir: str) -> None:
    """Pack the folder's text into shards, or record that its own shards are used in place."""
    directory = dataset_directory(local_dir)
    source = Path(local_dir).expanduser().resolve()
    files = find_files(source)
    if is_sharded(files, source):
        directory.mkdir(parents=True, exist_ok=True)
        old = read_manifest(directory) or {}
        highest = max(files, key=lambda path: int(path.stem.removeprefix("shard_"))).name
        validation = old["validation"] if old.get("in_place") else highest
        write_json(
            directory / MANIFEST,
            {"source": str(source), "in_place": True, "validation": validation},
        )
        log(f"local: the shards in {source} are used in place, {validation} is validation")
        return
    counts = Counts(files=len(files))
    manifest: dict[str, Any] = {
        "source": str(source),
        "in_place": False,
        "files": fingerprint(files, source),
    }
    shards.write_shards(
        ((text, text) for text in read_documents(files, counts)),
        directory,
        about_chars=sum(path.stat().st_size for path in files),
        manifest=manifest,
    )
    skipped = ", ".join(f"{name} {value:,}" for name, value in asdict(counts).items())
    log(f"local: packed {source} into {directory}: {skipped.replace('_', ' ')}")


def find_files(source: Path) -> list[Path]:
    paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    visible = (p for p in paths if not any(part.startswith(".") for part in p.parts))
    files = sorted(source / path for path in visible if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(
            f"got no {', '.join(SUFFIXES)} files in {source}, expected at least one; "
            "put text there or change config.data.local_dir"
        )
    return files


def is_sharded(files: list[Path], source: Path) -> bool:
    """Whether a folder holds ready shards and nothing else."""
    names_fit = all(re.fullmatch(r"shard_\d+\.parquet", path.name) for path in files)
    return len(files) > 1 and names_fit and all(path.parent == source for path in files)


def fingerprint(files: list[Path], source: Path) -> str:
    """Changes when a file is added, removed, renamed or written again."""
    facts = [(str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def read_documents(files: list[Path], counts: Counts) -> Iterator[str]:
    """Non-empty documents of all files, in order; what was skipped is counted in `counts`."""
    readers = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".txt": _read_text,
        ".md": _read_text,
    }
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="packing", disable=None) as bar:
        for path in files:
            for text, repaired in readers[path.suffix.lower()](path):
                counts.documents += 1
                counts.repaired_documents += repaired
                counts.empty_documents += not text.strip()
                if text.strip():
                    yield text
            bar.update(path.stat().st_size)


def _read_parquet(path: Path) -> Iterator[tuple[str, bool]]:
    for group in range(len(row_group_sizes(path))):
        texts, repaired = read_row_group(path, group)
        yield from ((text, row in repaired) for row, text in enumerate(texts))


def _read_jsonl(path: Path) -> Iterator[tuple[str, bool]]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            line, bad_bytes = decode(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error}); each line of a .jsonl file must "
                    f'be an object such as {{"{TEXT_COLUMN}": "..."}}; correct or remove the line'
                ) from None
            text = value.get(TEXT_COLUMN) if isinstance(value, dict) else None
            if not isinstance(text, str):
                got = sorted(value) if isinstance(value, dict) else type(value).__name__
                raise UserError(
                    f"{path}, line {number}: got {got}, expected an object with a string "
                    f"{TEXT_COLUMN!r}; rename the field that holds the documents"
                )
            # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
            raw_text = text.encode("utf-16", "surrogatepass")
            whole = raw_text.decode("utf-16", "replace")
            yield whole, bad_bytes or whole != text


def _read_text(path: Path) -> Iterator[tuple[str, bool]]:
    with _open(path) as file:
        text, repaired = decode(file.read())
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    for piece in split_text(text, MAX_FILE_CHARS):
        yield piece, repaired
        repaired = False  # once a file


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct or remove it") from None


def split_text(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars`, at blank lines, else lines, else spaces.

    Only white space is lost, where the cuts are.
    """
    pieces = []
    while len(text) > max_chars:
        for separator in ("\n\n", "\n", " "):
            # A cut in the first half would make crumbs; the next separator is tried then.
            cut = text.rfind(separator, max_chars // 2, max_chars)
            if cut > 0:
                break
        else:
            cut = max_chars
        pieces.append(text[:cut].rstrip())
        text = text[cut:].lstrip("\n ")
    return [*pieces, text] if text or not pieces else pieces
