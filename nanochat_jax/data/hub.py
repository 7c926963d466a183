"""Downloads: dataset shards from the Hugging Face hub, and upstream's evaluation bundle.

    size, SHA-256, commit --> file --> size and SHA-256 checked --> recorded in dataset.json

The hub's own client makes the requests: HF_ENDPOINT, proxies, HF_HUB_OFFLINE and the stored token
hold, and it waits as long as a server asks for. Only a recorded shard counts. All shards come from
the commit of the dataset that was current at the first download.
"""

import errno
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get

from nanochat_jax.common import UserError, data_dir, locked, log, sha256_file, write_json
from nanochat_jax.data.shards import MANIFEST, is_recorded, read_manifest

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE = "eval_bundle"  # the folder inside the zip, and its name on our disk
# The client's own error is derived from those of its HTTP library (which changes) and OSError.
_NETWORK_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
WORKERS = 8  # files at a time
WAITS_SECS = (5, 15, 30, 60)  # between our attempts, each of which is several of the client

# Plain HTTP is what the tests cover; the chunk protocol also keeps a cache in the home directory.
constants.HF_HUB_DISABLE_XET = True


def download(
    repo_id: str, names: Iterable[str], directory: Path, *, endpoint: str = constants.ENDPOINT
) -> None:
    """Have the files `names` in `directory`, whole and verified; the caller has locked it."""
    manifest = read_manifest(directory) or {"repo_id": repo_id, "revision": "", "shards": {}}
    missing = [name for name in names if not is_recorded(directory, manifest, name)]
    if not missing:
        return
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
        # A file that was put there by other means is not fetched if its SHA-256 is right.
        got = hf_hub_download(repo_id, name, revision=revision, local_dir=directory, **dataset)
        if (received := {"bytes": os.stat(got).st_size, "sha256": sha256_file(Path(got))}) != facts:
            os.unlink(got)
            raise OSError(f"got {received}, expected {facts}")
        return facts

    def patiently(action: Callable[[str], Any], name: str) -> Any:
        return _patiently(f"{name} of {repo_id} at {endpoint}", partial(action, name))

    manifest["revision"], first = patiently(ask, missing[0])
    directory.mkdir(parents=True, exist_ok=True)
    log(f"{repo_id}: {len(missing)} shards of about {first['bytes'] / 1e6:,.0f} MB")
    with ThreadPool(WORKERS) as pool:  # its threads do not keep an interrupted process waiting
        jobs = [(name, pool.apply_async(patiently, (fetch, name))) for name in missing]
        for name, job in jobs:
            while not job.ready():
                job.wait(1)  # Ctrl-C is seen also when another thread received the signal
            manifest["shards"][name] = job.get()
            write_json(directory / MANIFEST, manifest)
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the client's notes on files
    log(f"{repo_id}: {len(missing)} shards verified in {directory}")


def eval_bundle(core_dir: str = "", url: str = BUNDLE_URL) -> Path:
    """The folder of the tasks of CORE: `core_dir` if given, else upstream's zip, unpacked."""
    folder = Path(core_dir).expanduser() if core_dir else data_dir() / BUNDLE
    if not core_dir:
        with locked(folder):
            if not folder.exists():
                otherwise = ", or unpack it elsewhere and set config.eval.core_dir to that folder"
                _patiently(url, partial(_fetch_bundle, url, folder), otherwise)
    if not any(folder.glob("core*.yaml")):
        raise UserError(
            f"got {folder} without core.yaml, expected an unpacked evaluation bundle; set "
            "config.eval.core_dir to one, or delete this folder and leave core_dir empty"
        )
    return folder


def _fetch_bundle(url: str, folder: Path) -> None:
    """Make `folder` of the zip's folder BUNDLE; OSError when what came is not whole."""
    work = folder.with_name(f".{BUNDLE}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with (work / "bundle.zip").open("wb") as archive:
            http_get(url, archive, displayed_filename=BUNDLE)
        shutil.unpack_archive(work / "bundle.zip", work)  # checks the CRC of each file
    except (zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"got a damaged zip ({error})") from None
    if not (work / BUNDLE / "core.yaml").exists():
        raise UserError(f"{url}: got a zip without {BUNDLE}/core.yaml, expected the evaluations")
    os.replace(work / BUNDLE, folder)
    shutil.rmtree(work)


def _patiently(what: str, action: Callable[[], Any], otherwise: str = "") -> Any:
    """`action`, again after each of WAITS_SECS when network or server fail; then a UserError."""
    for wait_secs in (*WAITS_SECS, None):
        try:
            return action()
        except _NETWORK_ERRORS as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404):
            advice = "check that it exists there and that HF_TOKEN may read it"
        elif isinstance(cause, OfflineModeIsEnabled):
            advice = "unset HF_HUB_OFFLINE"
        elif isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            advice = "free space or permissions on the disk, or set NANOCHAT_BASE_DIR to another"
        elif wait_secs is None:
            advice = f"gave up after {len(WAITS_SECS) + 1} attempts; check the network"
        else:
            log(f"{what}: {reason}; again in {wait_secs:g} s")
            time.sleep(wait_secs)
            continue
        raise UserError(f"{what}: {reason}; {advice}, then run the same command again{otherwise}")
    raise AssertionError("the last wait is None")
