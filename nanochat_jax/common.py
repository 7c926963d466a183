"""Where files lie, how they are written, how errors are told. No JAX, so that `--help` is fast."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock

EXIT_RESUME_ME = 75  # of a run that saved its state when interrupted; sysexits' EX_TEMPFAIL


class UserError(ValueError):
    """Bad input from outside. Its one line says what was got, what was expected and what to do."""


def base_dir() -> Path:
    """Everything we write lies below it: `$NANOCHAT_BASE_DIR` or `~/.cache/nanochat_jax`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat_jax")


def data_dir() -> Path:
    return base_dir() / "data"


def run_dir(run_name: str) -> Path:
    return base_dir() / "runs" / run_name


def log(message: str = "") -> None:
    """Print a line on process 0 of a multi-process run; the others stay silent."""
    if os.environ.get("NANOCHAT_PROCESS_INDEX", "0") == "0":
        print(message, flush=True)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The rows of a table as lines: columns `left` begin, all others end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if column in left else ">" for column in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it: a reader never sees half, a crash never leaves half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {what_to_do}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {what_to_do}") from None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locked(path: Path) -> AbstractContextManager:
    """Hold `path`.lock, so that two processes never build the same artefact at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(f"{path}.lock")


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
