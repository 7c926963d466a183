"""Downloads: dataset shards from the Hugging Face hub, and upstream's evaluation bundle.

    size, SHA-256, commit --> file in .download --> size and SHA-256 checked --> final name

The hub's own client makes the requests: HF_ENDPOINT, proxies, HF_HUB_OFFLINE and the stored token
hold, and it waits as long as a server asks for (429, Retry-After). A file that was interrupted
starts again; one under its final name is whole and verified. All shards come from one commit of the
dataset, the one that was current at the first download.
"""

import errno
import hashlib
import os
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import hf_raise_for_status, http_backoff

from nanochat_jax.common import UserError, data_dir, locked, log, sha256_file, write_json
from nanochat_jax.data.shards import MANIFEST, is_recorded, read_manifest

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE = "eval_bundle"  # the folder inside the zip, and its name on our disk
# The client's own error is derived from those of its HTTP library (which changes) and OSError.
_NETWORK_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
WAITS_SECS = (5, 15, 30, 60)  # between our attempts, each of which is several of the client
_SPARE_BYTES = 1 << 28  # left free on the disk

# Plain HTTP is what the tests cover; the chunk protocol also keeps a cache in the home directory.
constants.HF_HUB_DISABLE_XET = True

T = TypeVar("T")


def download(
    repo_id: str,
    names: Iterable[str],
    directory: Path,
    *,
    workers: int = 8,
    endpoint: str = constants.ENDPOINT,
    waits_secs: Sequence[float] = WAITS_SECS,
) -> None:
    """Have the files `names` of a dataset in `directory`, whole and verified, or a UserError.

    The caller sees to it that only one process works in `directory`.
    """
    manifest = read_manifest(directory) or {"repo_id": repo_id, "revision": "", "shards": {}}
    missing = [name for name in names if not is_recorded(directory, manifest, name)]
    if not missing:
        return
    work, stop = directory / ".download", threading.Event()
    dataset: dict[str, Any] = {"repo_type": "dataset", "endpoint": endpoint}

    def ask(name: str) -> tuple[str, dict[str, Any]]:
        """(revision, what is recorded of a file)"""
        url = hf_hub_url(repo_id, name, revision=manifest["revision"] or "main", **dataset)
        found = get_hf_file_metadata(url, endpoint=endpoint, retry_on_errors=True)
        size, sha256, revision = found.size, found.etag or "", found.commit_hash
        if not (size and revision and re.fullmatch(r"[0-9a-f]{64}", sha256)):
            raise UserError(
                f"{url}: got size {size}, etag {sha256} and commit {revision}, expected a size, a "
                "SHA-256 and a commit; use huggingface.co or a full mirror of it (HF_ENDPOINT)"
            )
        return revision, {"bytes": size, "sha256": sha256}

    def fetch(name: str) -> dict[str, Any]:
        revision, facts = ask(name)
        path = directory / name
        if not (path.is_file() and _facts(path) == facts):  # not put there by other means
            got = Path(hf_hub_download(repo_id, name, revision=revision, local_dir=work, **dataset))
            if (received := _facts(got)) != facts:
                got.unlink()
                raise OSError(f"got {received}, expected {facts}")
            os.replace(got, path)
        return facts

    def patiently(action: Callable[[str], T], name: str) -> T:
        what = f"{name} of {repo_id} at {endpoint}"
        return _patiently(what, partial(action, name), waits_secs, stop)

    manifest["revision"], first = patiently(ask, missing[0])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _check_space(work, len(missing) * first["bytes"])
    log(f"{repo_id}: {len(missing)} shards of about {first['bytes'] / 1e6:,.0f} MB")
    with ThreadPool(workers) as pool:  # its threads do not keep an interrupted process waiting
        try:
            jobs = [(name, pool.apply_async(patiently, (fetch, name))) for name in missing]
            for name, job in jobs:
                while not job.ready():
                    job.wait(1)  # Ctrl-C is seen also when another thread received the signal
                manifest["shards"][name] = job.get()
                write_json(directory / MANIFEST, manifest)
        finally:
            stop.set()
    shutil.rmtree(work)
    log(f"{repo_id}: {len(missing)} shards verified in {directory}")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _check_space(directory: Path, num_bytes: int) -> None:
    free, needed = shutil.disk_usage(directory).free, num_bytes + _SPARE_BYTES
    if needed > free:
        raise UserError(
            f"got {free / 1e9:.1f} GB free for {directory}, expected at least {needed / 1e9:.1f} "
            "GB; free space, set NANOCHAT_BASE_DIR to another disk, or lower config.data.num_shards"
        )


def eval_bundle(
    core_dir: str = "", url: str = BUNDLE_URL, waits_secs: Sequence[float] = WAITS_SECS
) -> Path:
    """The folder of the tasks of CORE: `core_dir` if given, else upstream's zip, unpacked.

    $NANOCHAT_BASE_DIR/data/eval_bundle is whole when it is there. The server publishes no SHA-256;
    the ETag of an object uploaded in one part is its MD5 and is checked as such, and so is the CRC
    of every file. Processes that ask at once wait for the one that works.
    """
    folder = Path(core_dir).expanduser() if core_dir else data_dir() / BUNDLE
    work = folder.with_name(f".{BUNDLE}")
    if not core_dir:
        with locked(folder):
            if not folder.exists():
                fetch = partial(_fetch_bundle, url, work)
                otherwise = ", or unpack it elsewhere and set config.eval.core_dir to that folder"
                _patiently(url, fetch, waits_secs, threading.Event(), otherwise)
                os.replace(work / BUNDLE, folder)
                shutil.rmtree(work)
    if not any(folder.glob("core*.yaml")):
        raise UserError(
            f"got {folder} without core.yaml, expected an unpacked evaluation bundle; set "
            "config.eval.core_dir to one, or delete this folder and leave core_dir empty"
        )
    return folder


def _fetch_bundle(url: str, work: Path) -> None:
    """Unpack the zip's folder BUNDLE into `work`; OSError when what came is not whole."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    head = http_backoff("HEAD", url, headers={"Accept-Encoding": "identity"}, timeout=30)
    hf_raise_for_status(head)
    archive = work / "bundle.zip"
    with archive.open("wb") as out:
        http_get(url, out, displayed_filename=BUNDLE)
    etag = head.headers.get("ETag", "").strip('"')
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    if re.fullmatch(r"[0-9a-f]{32}", etag) and md5 != etag:
        raise OSError(f"got MD5 {md5}, expected {etag}")
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if name.startswith(f"{BUNDLE}/")]
            outside = any(".." in PurePosixPath(name).parts for name in names)
            if outside or f"{BUNDLE}/core.yaml" not in names:
                raise UserError(f"{url}: got a zip that is not one folder {BUNDLE} with core.yaml")
            zipped.extractall(work, names)  # checks the CRC of each
    except (zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"got a damaged zip ({error})") from None


def _patiently(
    what: str,
    action: Callable[[], T],
    waits_secs: Sequence[float],
    stop: threading.Event,
    otherwise: str = "",
) -> T:
    """`action`, again after each of `waits_secs` when network or server fail; then a UserError."""
    for wait_secs in (*waits_secs, None):
        try:
            return action()
        except _NETWORK_ERRORS as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
            reason = str(cause).partition("\n")[0] or type(cause).__name__
        if isinstance(cause, OfflineModeIsEnabled):
            advice = "unset HF_HUB_OFFLINE"
        elif isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404):
            advice = "check that it exists there and that HF_TOKEN may read it"
        elif isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            advice = "free space or permissions on the disk, or set NANOCHAT_BASE_DIR to another"
        elif wait_secs is None:
            advice = f"gave up after {len(waits_secs) + 1} attempts; check the network"
        elif not stop.is_set():
            log(f"{what}: {reason}; again in {wait_secs:g} s")
            stop.wait(wait_secs)
            continue
        else:
            advice = "another file failed"
        raise UserError(f"{what}: {reason}; {advice}, then run the same command again{otherwise}")
    raise AssertionError("the last wait is None")
