"""Bring your own text: the documents of a folder, packed into the shards of the dataset `local`.

    .parquet  each row of the column `text`        .jsonl  the string `text` of each line's object
    .txt .md  the file, cut at blank lines into pieces of at most MAX_FILE_CHARS (of a document that
              is longer than a row, best-fit packing uses only the beginning)

Subfolders are searched, hidden files left out. Empty documents are skipped, and what is no UTF-8 in
.txt and .md becomes U+FFFD; both are counted.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanochat_jax.common import UserError, data_dir, log
from nanochat_jax.data.shards import write_shards
from nanochat_jax.data.sources import TEXT_COLUMN, Corpus
from nanochat_jax.tokenizer.bpe import well_formed

MAX_FILE_CHARS = 8_000  # about 2,000 tokens, a row of the large recipes


def _source(local_dir: str) -> Path:
    source = Path(local_dir).expanduser().resolve()
    if not local_dir or not source.is_dir():
        raise UserError(
            f"got config.data.local_dir = {local_dir!r}, expected an existing folder; "
            "add --config.data.local_dir=FOLDER"
        )
    return source


def dataset_directory(local_dir: str) -> Path:
    """The folder for the shards of the text in `local_dir`."""
    source = _source(local_dir)
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    return data_dir() / f"local_{re.sub(r'[^A-Za-z0-9_.-]', '_', source.name)}_{digest}"


def pack(local_dir: str, directory: Path) -> None:
    """Make shards in `directory` of the text in `local_dir`."""
    source = _source(local_dir)
    paths = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    visible = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    files = [source / path for path in visible if path.suffix.lower() in _READERS]
    if not files:
        raise UserError(
            f"got no {', '.join(_READERS)} files in {source}, expected at least one; "
            "put text there or change config.data.local_dir"
        )
    counts = Counter(files=len(files), documents=0, empty_documents=0, repaired_documents=0)
    num_bytes = sum(path.stat().st_size for path in files)
    texts = ((text, text) for text in _read_documents(files, num_bytes, counts))
    write_shards(texts, directory, about_chars=num_bytes, manifest={"source": str(source)})
    told = ", ".join(f"{name} {value:,}" for name, value in counts.items())
    log(f"local: packed {source} into {directory}: {told.replace('_', ' ')}")


def _read_documents(files: list[Path], num_bytes: int, counts: Counter[str]) -> Iterator[str]:
    """Non-empty documents of all files, in order; what was skipped or repaired is counted."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="packing", disable=None) as bar:
        for path in files:
            try:
                for text in _READERS[path.suffix.lower()](path):
                    filled, whole = bool(text.strip()), well_formed(text)
                    counts.update(documents=1, empty_documents=not filled)
                    counts["repaired_documents"] += whole != text
                    if filled:
                        yield whole
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; correct or remove it") from None
            bar.update(path.stat().st_size)


def _read_texts(path: Path) -> Iterator[str]:
    for where, value in read_jsonl(path):
        text = value.get(TEXT_COLUMN) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{where}: got {repr(value)[:60]}, expected an object with a string, "
                f'{{"{TEXT_COLUMN}": "..."}}; correct or remove the line'
            )
        yield text


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("path:line", value) of each line that is not blank."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except OSError as error:
        raise UserError(
            f"got {path} ({error.strerror}), expected a .jsonl file; correct the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}:{number}: not JSON ({error}), expected one JSON value a line; correct the line"
        ) from None


def _read_pieces(path: Path) -> list[str]:
    # Bytes that are no UTF-8 become lone surrogates, which are repaired and counted later.
    text = path.read_text("utf-8-sig", "surrogateescape")
    return split_text(text, MAX_FILE_CHARS)


_READERS = {".jsonl": _read_texts, ".txt": _read_pieces, ".md": _read_pieces}
_READERS |= {".parquet": lambda path: Corpus([path]).texts()}


def split_text(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars`, at blank lines, else lines, else spaces.

    Only white space is lost, where the cuts are.
    """
    pieces = []
    while len(text) > max_chars:
        # A cut in the first half would make crumbs; the next mark is tried then.
        cuts = (text.rfind(mark, max_chars // 2, max_chars) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut > 0), max_chars)
        pieces.append(text[:cut].rstrip())
        text = text[cut:].lstrip("\n ")
    return [*pieces, text] if text or not pieces else pieces
