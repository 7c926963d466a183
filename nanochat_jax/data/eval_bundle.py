"""Have the evaluation bundle (the tasks of CORE): upstream's zip, or a folder of the user's.

    $NANOCHAT_BASE_DIR/data/eval_bundle/     core.yaml  eval_meta_data.csv  eval_data/...

    headers (size, ETag) --> .part, continued where it stopped --> size, MD5 and CRCs checked
    --> unpacked beside --> renamed to eval_bundle

A folder of that name is whole. The server publishes no SHA-256; the ETag of an object uploaded in
one part is its MD5 and is checked as such, and the CRC of every member always is. The name of the
part holds the ETag, so that it only ever continues the same file.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from nanochat_jax.common import UserError, data_dir, locked, log

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TOP = "eval_bundle"  # the folder inside the zip, and its name on our disk
LIST = "core*.yaml"
_ADVICE = "or unpack it elsewhere and set config.eval.core_dir to that folder"
_TIMEOUT_SECS = 30.0  # without any byte


def ensure(core_dir: str = "", url: str = URL) -> Path:
    """The bundle's folder: `core_dir` if given, else the downloaded one.

    Raises UserError when the folder is no bundle or the download fails; what was received is kept,
    so the next call continues. Processes that ask at once wait for the one that works.
    """
    if core_dir:
        return _checked(Path(core_dir).expanduser(), "set config.eval.core_dir to one, or to ''")
    folder = data_dir() / TOP
    with locked(folder):
        if not folder.exists():
            _unpack(_download(url, folder.parent), folder)
    return _checked(folder, "delete it and run the same command to download it again")


def _checked(folder: Path, what_to_do: str) -> Path:
    if not any(folder.glob(LIST)):
        raise UserError(
            f"got {folder} without core.yaml, expected an unpacked evaluation bundle; {what_to_do}"
        )
    return folder


def _download(url: str, directory: Path) -> Path:
    """The whole zip, as a .part file in `directory`."""
    # Not at the head: the hub's client takes a second to import. Its session knows proxies and
    # HF_HUB_OFFLINE; its token, which is not for this server, is only sent when asked for.
    from huggingface_hub.utils import get_session

    from nanochat_jax.data.hub import persistently

    plain = {"Accept-Encoding": "identity"}
    settings = {"follow_redirects": True, "timeout": _TIMEOUT_SECS}

    def ask() -> tuple[int, str]:
        reply = get_session().head(url, headers=plain, **settings)
        reply.raise_for_status()
        if "Content-Length" not in reply.headers:
            raise OSError("the server tells no size")
        return int(reply.headers["Content-Length"]), reply.headers.get("ETag", "").strip('"')

    def receive() -> None:
        """Add to `part` the bytes it lacks."""
        received = _num_bytes(part)
        if received == num_bytes:
            return
        headers = plain | ({"Range": f"bytes={received}-"} if received else {})
        with get_session().stream("GET", url, headers=headers, **settings) as reply:
            reply.raise_for_status()
            # Without 206 it sends the file from its beginning.
            with part.open("ab" if reply.status_code == 206 else "wb") as out:
                for chunk in reply.iter_bytes():
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
        if _num_bytes(part) != num_bytes:
            raise OSError(f"got {_num_bytes(part):,} bytes, expected {num_bytes:,}")

    try:
        num_bytes, etag = persistently(TOP, ask, time.sleep)
        tag = re.sub(r"[^0-9a-zA-Z]", "", etag)[:32]
        part = directory / f"{TOP}.zip.{tag or num_bytes}.part"
        log(f"eval bundle: {num_bytes / 1e6:,.1f} MB from {url}")
        persistently(part.name, receive, time.sleep, lambda: _num_bytes(part))
    except UserError as error:
        raise UserError(f"{error}; {_ADVICE}") from None
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        with part.open("rb") as file:
            digest = hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
        if digest != etag:
            part.unlink()
            raise UserError(
                f"{url}: got MD5 {digest}, expected {etag}; run the same command again, {_ADVICE}"
            )
    return part


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unpack(archive: Path, folder: Path) -> None:
    """Make `folder` of the zip's folder of that name, or nothing; a bad zip is deleted."""
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if name.startswith(f"{TOP}/")]
            if outside := [name for name in names if ".." in PurePosixPath(name).parts]:
                raise zipfile.BadZipFile(f"{outside[0]} lies outside its folder")
            if f"{TOP}/core.yaml" not in names:
                raise zipfile.BadZipFile(f"it holds no {TOP}/core.yaml")
            zipped.extractall(fresh, names)  # checks the CRC of each
        os.replace(fresh / TOP, folder)
        archive.unlink()
    except (zipfile.BadZipFile, zlib.error) as error:
        archive.unlink()
        raise UserError(
            f"{archive.name} cannot be unpacked ({error}); run the same command again, {_ADVICE}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{archive} cannot be unpacked ({error}); free space or permissions on the disk, or "
            "set NANOCHAT_BASE_DIR to another one, and run the same command again"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    log(f"eval bundle: {folder}")
