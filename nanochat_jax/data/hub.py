"""Download dataset shards from the Hugging Face hub: many at a time, resumed, verified, atomic.

    name --> metadata (size, SHA-256, commit) --> shard.part, continued where it stopped
         --> size and SHA-256 checked --> renamed to shard --> recorded in dataset.json

A file under its final name is whole and verified. All shards come from one commit of the dataset,
the one that was current at the first download. The hub's own client makes the requests (so
HF_ENDPOINT and the stored token hold), but its `hf_hub_download` starts an interrupted file again
from zero in a new process and checks no hash, hence this layer. Its chunk protocol (xet) and its
telemetry are not used.
"""

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from nanochat_jax.common import UserError, log, sha256_file, write_json
from nanochat_jax.data.datasets import MANIFEST, read_manifest

# The client's own error is derived from those of its HTTP library (which changes) and OSError.
_NETWORK_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
_MAX_ATTEMPTS = 6
_FIRST_WAIT_SECS = 1.0
_MAX_WAIT_SECS = 30.0
_TIMEOUT_SECS = 30.0  # without any byte
_SPARE_BYTES = 1 << 28  # left free on the disk

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file before it is downloaded."""

    name: str
    url: str
    num_bytes: int
    sha256: str
    revision: str


def download(
    repo_id: str,
    names: Iterable[str],
    directory: Path,
    *,
    workers: int = 8,
    endpoint: str | None = None,
) -> None:
    """Have the files `names` of a dataset in `directory`, whole and verified.

    Raises UserError when one cannot be had; what was received is kept, so the next call continues.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(directory) or {"repo_id": repo_id, "revision": "", "shards": {}}
    missing = [name for name in names if not _is_recorded(directory, manifest, name)]
    if not missing:
        return
    if not manifest["revision"]:
        manifest["revision"] = _ask(repo_id, missing[0], "main", endpoint).revision
    with ThreadPoolExecutor(workers) as pool:
        files = list(pool.map(lambda n: _ask(repo_id, n, manifest["revision"], endpoint), missing))
    have_bytes = {file.name: _received_bytes(directory, file) for file in files}
    total_bytes = sum(file.num_bytes for file in files)
    _check_space(directory, total_bytes - sum(have_bytes.values()))

    stop = threading.Event()
    bar = tqdm(
        total=total_bytes,
        initial=sum(have_bytes.values()),
        unit="B",
        unit_scale=True,
        desc=f"{repo_id.split('/')[-1]}, {len(files)} shards",
        disable=None,
    )
    with bar, ThreadPoolExecutor(workers) as pool:
        started = [pool.submit(_fetch, file, directory, bar.update, stop) for file in files]
        try:
            for done in as_completed(started):
                file = done.result()
                manifest["shards"][file.name] = {"bytes": file.num_bytes, "sha256": file.sha256}
                write_json(directory / MANIFEST, manifest)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    log(f"{repo_id}: {len(files)} shards, {total_bytes / 1e9:.2f} GB verified in {directory}")


def _is_recorded(directory: Path, manifest: dict[str, Any], name: str) -> bool:
    path = directory / name
    known = manifest["shards"].get(name)
    return known is not None and path.exists() and path.stat().st_size == known["bytes"]


def _ask(repo_id: str, name: str, revision: str, endpoint: str | None) -> RemoteFile:
    url = hf_hub_url(repo_id, name, repo_type="dataset", revision=revision, endpoint=endpoint)
    found = persistently(name, lambda: get_hf_file_metadata(url, endpoint=endpoint), time.sleep)
    if found.size is None or not re.fullmatch(r"[0-9a-f]{64}", found.etag or ""):
        raise UserError(
            f"{url}: got size {found.size} and etag {found.etag}, expected a size and a SHA-256; "
            "use huggingface.co or a mirror that passes its headers on (HF_ENDPOINT)"
        )
    return RemoteFile(name, url, found.size, found.etag or "", found.commit_hash or revision)


def _fetch(
    file: RemoteFile, directory: Path, progress: Callable[[int], Any], stop: threading.Event
) -> RemoteFile:
    """Receive the rest of one file, verify it and give it its name."""
    path, part = directory / file.name, _part(directory, file)
    if path.exists() and path.stat().st_size == file.num_bytes and not part.exists():
        if sha256_file(path) == file.sha256:  # put there by other means
            progress(file.num_bytes)
            return file

    def attempt() -> None:
        _receive(file, part, progress, stop)
        digest = sha256_file(part)
        if digest != file.sha256:
            part.unlink()
            progress(-file.num_bytes)
            raise _WrongHash(f"got SHA-256 {digest}, expected {file.sha256}")

    persistently(file.name, attempt, stop.wait, lambda: _received_bytes(directory, file))
    os.replace(part, path)
    return file


def _receive(
    file: RemoteFile, part: Path, progress: Callable[[int], Any], stop: threading.Event
) -> None:
    """Add to `part` the bytes it lacks."""
    with part.open("ab") as out:
        received = out.tell()
        if received > file.num_bytes:  # not a beginning of this file
            out.truncate(0)
            progress(-file.num_bytes)
            received = 0
        if received == file.num_bytes:
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if received:
            headers["Range"] = f"bytes={received}-"
        with get_session().stream("GET", file.url, headers=headers, timeout=_TIMEOUT_SECS) as reply:
            hf_raise_for_status(reply)
            if received and reply.status_code != 206:  # it sends the file from its beginning
                out.truncate(0)
                progress(-received)
                received = 0
            for chunk in reply.iter_bytes():
                if stop.is_set():
                    raise _Stopped
                out.write(chunk)
                progress(len(chunk))
                received += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    if received != file.num_bytes:
        raise OSError(f"got {received:,} bytes, expected {file.num_bytes:,}")


def _part(directory: Path, file: RemoteFile) -> Path:
    """The unfinished file; its name holds the hash, so that it only ever continues the same one."""
    return directory / f"{file.name}.{file.sha256[:12]}.part"


def _received_bytes(directory: Path, file: RemoteFile) -> int:
    part = _part(directory, file)
    return min(part.stat().st_size, file.num_bytes) if part.exists() else 0


class _WrongHash(OSError):
    """The bytes received are not those announced."""


class _Stopped(Exception):
    """Another file failed for good."""


def persistently(
    name: str,
    action: Callable[[], T],
    pause: Callable[[float], Any],
    received: Callable[[], int] = lambda: 0,
) -> T:
    """`action`, again after a pause when the network or the server fails; UserError in the end.

    The end are _MAX_ATTEMPTS in a row in which `received` did not grow, or an error that would come
    again.
    """
    failures = wrong_hashes = 0
    most_received = received()
    while True:
        try:
            return action()
        except _NETWORK_ERRORS as error:
            wrong_hashes += isinstance(error, _WrongHash)
            failures = 1 if received() > most_received else failures + 1
            most_received = max(received(), most_received)
            advice = _advice(error, failures, wrong_hashes)
            summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        if advice is not None:
            raise UserError(f"{name}: {summary}: {advice}")
        wait_secs = min(_FIRST_WAIT_SECS * 2 ** (failures - 1), _MAX_WAIT_SECS)
        log(f"{name}: {summary}; again in {wait_secs:g} s")
        if pause(wait_secs):
            raise _Stopped


def _advice(error: Exception, failures: int, wrong_hashes: int) -> str | None:
    """What to do about an error that ends the attempts; None for another attempt."""
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE to download"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return "check that the dataset and the file exist and that HF_TOKEN may read them"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return (
            "free space or permissions on the disk, or set NANOCHAT_BASE_DIR to another one, and "
            "run the same command to continue"
        )
    if wrong_hashes > 1:
        return "twice the server sent other bytes than it announced; tell its owner"
    if failures >= _MAX_ATTEMPTS:
        return (
            f"gave up after {failures} attempts; what was received is kept: check the network and "
            "run the same command to continue"
        )
    return None


def _check_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise UserError(
            f"got {free_bytes / 1e9:.1f} GB free for {directory}, expected at least "
            f"{(needed_bytes + _SPARE_BYTES) / 1e9:.1f} GB; free space, set NANOCHAT_BASE_DIR to "
            "another disk, or lower config.data.num_shards"
        )
