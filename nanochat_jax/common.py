"""Small things everything else needs: where files lie, how they are written, how errors are told.

Imports nothing of this package and no JAX, so data workers and `--help` start fast.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

# Exit status of a run that saved its state after SIGTERM/SIGINT: sysexits' EX_TEMPFAIL, "try
# again".
EXIT_RESUME_ME = 75


class UserError(ValueError):
    """Bad input from outside. Its one line says what was got, what was expected and what to do."""


def base_dir() -> Path:
    """`$NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat_jax`: everything we write lies below
    it."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat_jax")


def data_dir() -> Path:
    return base_dir() / "data"


def run_dir(run_name: str) -> Path:
    return base_dir() / "runs" / run_name


def log(message: str = "") -> None:
    """Print a line on process 0 of a multi-process run; the others stay silent."""
    if int(os.environ.get("NANOCHAT_PROCESS_INDEX", "0")) == 0:
        print(message, flush=True)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The rows of a table as lines: columns `left` begin, all others end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it: a reader never sees half, a crash never leaves half."""
    path = Path(path)
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what_to_do: str) -> Any:
    """Parse a JSON file; `what_to_do` completes the error when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {what_to_do}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {what_to_do}") from None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`.lock, so that two processes never build the same artefact at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        yield


def run_main(main: Callable[[], int | None]) -> None:
    """Entry point of every script: user errors become one line on stderr and exit status 1."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if code not in (0, EXIT_RESUME_ME) and "NANOCHAT_PROCESS_INDEX" in os.environ:
        sys.stdout.flush()
        os._exit(code)  # the other processes end when this one does: it must not wait for them
    sys.exit(code)
