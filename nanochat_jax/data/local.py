"""Bring your own text: the documents of a folder, and how the `local` dataset is made of them.

    .parquet  each row of the column `text`        .jsonl  the string `text` of each line's object
    .txt .md  the file, cut at blank lines into pieces of at most MAX_FILE_CHARS (of a document that
              is longer than a row, best-fit packing uses only the beginning)

Subfolders are searched, hidden files and other kinds are left out, files are read in order of their
paths. Empty documents are skipped; bytes that are not UTF-8 become U+FFFD; both are counted.

A folder that already holds shards (two or more files, all named shard_NNNNN.parquet) is used in
place. Its validation shard, the one with the highest number, is recorded at first use and stays the
same when shards are added.

The readers are our own: the package `datasets` refuses bad UTF-8 and lines of different columns,
and copies the text into a cache in the home directory first.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from nanochat_jax.common import UserError, data_dir, log, write_json
from nanochat_jax.data.shards import MANIFEST, Shards, read_manifest, write_shards
from nanochat_jax.data.sources import TEXT_COLUMN, Corpus, decode

MAX_FILE_CHARS = 8_000  # about 2,000 tokens, a row of the large recipes

Texts = Iterable[tuple[str, bool]]  # document, whether it had bytes that are not UTF-8


def source_folder(local_dir: str) -> Path:
    if not local_dir:
        raise UserError(
            "got config.data.name = 'local' without config.data.local_dir, expected a folder; "
            "add --config.data.local_dir=FOLDER"
        )
    source = Path(local_dir).expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"got config.data.local_dir = {local_dir}, expected an existing folder")
    return source


def dataset_directory(local_dir: str) -> Path:
    """Our own folder for what is made of, or known about, the text in `local_dir`."""
    source = source_folder(local_dir)
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    return data_dir() / f"local_{re.sub(r'[^A-Za-z0-9_.-]', '_', source.name)}_{digest}"


def find(local_dir: str) -> Shards | None:
    """Shards of a folder that was packed or is used in place; None before."""
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
    directory, source = dataset_directory(local_dir), source_folder(local_dir)
    files = _find_files(source)
    names_fit = all(re.fullmatch(r"shard_\d+\.parquet", path.name) for path in files)
    if len(files) > 1 and names_fit and all(path.parent == source for path in files):
        old = read_manifest(directory) or {}
        highest = max(files, key=lambda path: int(path.stem.removeprefix("shard_"))).name
        validation = old["validation"] if old.get("in_place") else highest
        manifest = {"source": str(source), "in_place": True, "validation": validation}
        write_json(directory / MANIFEST, manifest)
        log(f"local: the shards in {source} are used in place, {validation} is validation")
        return
    counts = Counter(files=len(files), documents=0, empty_documents=0, repaired_documents=0)
    manifest = {"source": str(source), "in_place": False, "files": _fingerprint(source)}
    num_bytes = sum(path.stat().st_size for path in files)
    texts = ((text, text) for text in _read_documents(files, num_bytes, counts))
    write_shards(texts, directory, about_chars=num_bytes, manifest=manifest)
    told = ", ".join(f"{name} {value:,}" for name, value in counts.items())
    log(f"local: packed {source} into {directory}: {told.replace('_', ' ')}")


def tell_changes(local_dir: str) -> None:
    """Say so when files have changed since they were packed."""
    manifest, source = read_manifest(dataset_directory(local_dir)), source_folder(local_dir)
    if manifest and not manifest["in_place"] and manifest["files"] != _fingerprint(source):
        log(
            f"local: files in {source} changed since they were packed; the packed text is used. "
            "`python scripts/data.py pack` with the same --config packs them again"
        )


def _find_files(source: Path) -> list[Path]:
    paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    visible = (p for p in paths if not any(part.startswith(".") for part in p.parts))
    files = sorted(source / path for path in visible if path.suffix.lower() in _READERS)
    if not files:
        raise UserError(
            f"got no {', '.join(_READERS)} files in {source}, expected at least one; "
            "put text there or change config.data.local_dir"
        )
    return files


def _fingerprint(source: Path) -> str:
    """Changes when a file is added, removed, renamed or written again."""
    stats = [(str(path.relative_to(source)), path.stat()) for path in _find_files(source)]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read_documents(files: list[Path], num_bytes: int, counts: Counter[str]) -> Iterator[str]:
    """Non-empty documents of all files, in order; what was skipped is counted."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="packing", disable=None) as bar:
        for path in files:
            try:
                for text, repaired in _READERS[path.suffix.lower()](path):
                    empty = not text.strip()
                    counts.update(documents=1, empty_documents=empty, repaired_documents=repaired)
                    if not empty:
                        yield text
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; correct or remove it") from None
            bar.update(path.stat().st_size)


def _read_parquet(path: Path) -> Texts:
    corpus = Corpus([path])
    for group in range(len(corpus.row_groups)):
        texts, repaired = corpus.read(group)
        yield from ((text, row in repaired) for row, text in enumerate(texts))


def _read_jsonl(path: Path) -> Texts:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line, bad_bytes = decode(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            text = value.get(TEXT_COLUMN) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f"{path}, line {number}: got {line[:60]!r}, expected a JSON object with a "
                    f'string, {{"{TEXT_COLUMN}": "..."}}; correct or remove the line'
                )
            # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield whole, bad_bytes or whole != text


def _read_text(path: Path) -> Texts:
    text, repaired = decode(path.read_bytes())
    for piece in split_text(text.removeprefix("\ufeff").replace("\r\n", "\n"), MAX_FILE_CHARS):
        yield piece, repaired
        repaired = False  # once a file


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_text, ".md": _read_text}


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
