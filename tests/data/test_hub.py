"""Downloads from a server on this machine that behaves like the hub, and like a bad day of it."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.data import hub as module
from nanochat_jax.data.hub import download

ROOT = Path(__file__).parents[2]
REPO = "karpathy/fineweb-edu-100b-shuffle"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
FILES = {name: bytes(range(256)) * 500 + name.encode() for name in NAMES}


class Hub(ThreadingHTTPServer):
    """The two addresses a download uses: /datasets/REPO/resolve/REVISION/FILE, which tells size and
    hash and redirects, and the content behind it, which serves ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str, str]] = []  # (method, path, range)
        self.cut_after: list[int] = []  # bytes after which the next contents break off
        self.fail_heads = 0  # requests to answer with 503
        self.fail_contents = 0
        self.wrong_contents = 0  # contents to send with a byte changed
        self.ignore_range = False

    def handle_error(self, request, client_address):
        pass  # clients that hang up are expected here

    def ranges(self, name):
        return [r for method, path, r in self.asked if method == "GET" and path == f"/cdn/{name}"]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, name = self.server, self.path.rpartition("/")[2]
        hub.asked.append((self.command, self.path, self.headers.get("Range", "")))
        if name not in FILES:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        elif self.path.startswith("/cdn/"):
            self.content(FILES[name])
        elif self.path not in [f"/datasets/{REPO}/resolve/{r}/{name}" for r in ("main", COMMIT)]:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif self.command == "HEAD" and hub.fail_heads > 0:
            hub.fail_heads -= 1
            self.answer(503, {})
        else:
            facts = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": len(FILES[name]),
                "X-Linked-ETag": f'"{hashlib.sha256(FILES[name]).hexdigest()}"',
                # Another host than the hub, as in reality: it tells size and hash, the hub does.
                "Location": f"http://localhost:{hub.server_port}/cdn/{name}",
            }
            self.answer(302, facts)

    def content(self, data):
        hub, status, start = self.server, 200, 0
        if hub.fail_contents > 0:
            hub.fail_contents -= 1
            self.answer(502, {})
            return
        if hub.wrong_contents > 0:
            hub.wrong_contents -= 1
            data = b"?" + data[1:]
        headers = {}
        if (asked := self.headers.get("Range")) and not hub.ignore_range:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        headers["Content-Length"] = len(body)
        if hub.cut_after:
            body = body[: hub.cut_after.pop(0)]
            self.close_connection = True
        self.answer(status, headers, body)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT_SECS", 0.001)


def get(hub, folder, names=NAMES):
    download(REPO, names, folder, workers=3, endpoint=hub.url)


def assert_whole(folder, names=NAMES):
    assert {p.name for p in folder.iterdir()} == {*names, "dataset.json"}
    manifest = json.loads((folder / "dataset.json").read_text())
    assert manifest["revision"] == COMMIT and set(manifest["shards"]) == set(names)
    for name in names:
        assert (folder / name).read_bytes() == FILES[name]
        facts = manifest["shards"][name]
        assert facts["sha256"] == hashlib.sha256(FILES[name]).hexdigest()
        assert facts["bytes"] == len(FILES[name])


def test_downloads_once(hub, tmp_path):
    get(hub, tmp_path)
    assert_whole(tmp_path)
    assert Counter(path for method, path, _ in hub.asked if "/cdn/" in path) == {
        f"/cdn/{name}": 1 for name in NAMES
    }
    hub.asked.clear()
    get(hub, tmp_path)
    assert hub.asked == []


def test_more_shards_come_from_the_same_commit(hub, tmp_path):
    get(hub, tmp_path, NAMES[:1])
    hub.asked.clear()
    get(hub, tmp_path, NAMES)
    assert_whole(tmp_path)
    assert not [path for _, path, _ in hub.asked if "/main/" in path or NAMES[0] in path]


def test_cut_connections_continue_where_they_broke_off(hub, tmp_path):
    hub.cut_after = [50_000, 30_000]
    get(hub, tmp_path, NAMES[:1])
    assert_whole(tmp_path, NAMES[:1])
    assert hub.ranges(NAMES[0]) == ["", "bytes=50000-", "bytes=80000-"]


def test_partial_file_is_continued_by_the_next_call(hub, tmp_path):
    hub.cut_after = [20_000] + [0] * 100
    with pytest.raises(UserError, match=r"shard_00000.*gave up after.*run the same command"):
        get(hub, tmp_path, NAMES[:1])
    (part,) = tmp_path.glob("*.part")
    assert part.read_bytes() == FILES[NAMES[0]][:20_000]
    assert not (tmp_path / NAMES[0]).exists()
    hub.cut_after = []
    hub.asked.clear()
    get(hub, tmp_path, NAMES[:1])
    assert_whole(tmp_path, NAMES[:1])
    assert hub.ranges(NAMES[0]) == ["bytes=20000-"]


def test_server_that_sends_everything_when_asked_for_the_rest(hub, tmp_path):
    hub.cut_after, hub.ignore_range = [50_000], True
    get(hub, tmp_path, NAMES[:1])
    assert_whole(tmp_path, NAMES[:1])


def test_server_errors_are_tried_again(hub, tmp_path, capsys):
    hub.fail_heads, hub.fail_contents = 2, 3
    get(hub, tmp_path)
    assert_whole(tmp_path)
    assert "503" in capsys.readouterr().out


def test_server_that_stays_down(hub, tmp_path):
    hub.fail_contents = 10_000
    with pytest.raises(UserError, match=r"502.*gave up after"):
        get(hub, tmp_path)
    assert not list(tmp_path.glob("*.parquet"))


def test_wrong_bytes_once(hub, tmp_path, capsys):
    hub.wrong_contents = 1
    get(hub, tmp_path, NAMES[:1])
    assert_whole(tmp_path, NAMES[:1])
    assert "got SHA-256" in capsys.readouterr().out


def test_wrong_bytes_twice(hub, tmp_path):
    hub.wrong_contents = 10_000
    with pytest.raises(UserError, match="got SHA-256 .*twice the server sent other bytes"):
        get(hub, tmp_path, NAMES[:1])
    assert not list(tmp_path.glob("*.parquet*"))


def test_damaged_partial_file(hub, tmp_path):
    sha = hashlib.sha256(FILES[NAMES[0]]).hexdigest()
    for garbage in (b"x" * 1_000, b"x" * 1_000_000, b"x" * len(FILES[NAMES[0]])):
        (tmp_path / f"{NAMES[0]}.{sha[:12]}.part").write_bytes(garbage)
        get(hub, tmp_path, NAMES[:1])
        assert_whole(tmp_path, NAMES[:1])
        (tmp_path / "dataset.json").unlink()
        (tmp_path / NAMES[0]).unlink()


def test_shards_put_there_by_hand(hub, tmp_path):
    (tmp_path / NAMES[0]).write_bytes(FILES[NAMES[0]])
    (tmp_path / NAMES[1]).write_bytes(b"x" * len(FILES[NAMES[1]]))
    get(hub, tmp_path)
    assert_whole(tmp_path)
    assert hub.ranges(NAMES[0]) == [] and len(hub.ranges(NAMES[1])) == 1


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(UserError, match=r"shard_00009.*404.*check that the dataset"):
        get(hub, tmp_path, ["shard_00009.parquet"])
    with pytest.raises(UserError, match="404.*check that the dataset"):
        download("someone/else", NAMES, tmp_path, endpoint=hub.url)
    assert len([path for _, path, _ in hub.asked if "shard_00009" in path]) == 1


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="gave up after"):
        download(REPO, NAMES, tmp_path, endpoint="http://127.0.0.1:9")


def test_disk_too_small_is_told_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=module._SPARE_BYTES + 100_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="got 0.3 GB free .*expected at least .*num_shards"):
        get(hub, tmp_path)
    assert not [path for _, path, _ in hub.asked if "/cdn/" in path]


def test_disk_that_fills_up(hub, tmp_path, monkeypatch):
    def full(file_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(UserError, match="No space left.*free space"):
            get(hub, tmp_path)
    assert not list(tmp_path.glob("*.parquet")) and list(tmp_path.glob("*.part"))
    get(hub, tmp_path)
    assert_whole(tmp_path)


def run_script(hub, base_dir, limit_kib="unlimited"):
    """`scripts/data.py download` as people start it, perhaps with a limit on the size of files."""
    return subprocess.run(
        ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "-", sys.executable]
        + [str(ROOT / "scripts" / "data.py"), "download", "--num-shards=2"],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_script_meets_a_full_disk_and_continues_in_a_new_process(hub, tmp_path):
    failed = run_script(hub, tmp_path, limit_kib=100)
    assert failed.returncode == 1
    assert "File too large: free space" in failed.stderr and "Traceback" not in failed.stderr
    folder = tmp_path / "data" / "fineweb_edu"
    assert not list(folder.glob("*.parquet")) and list(folder.glob("*.part"))
    hub.asked.clear()
    done = run_script(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 training shards and shard_01822.parquet" in done.stdout
    assert_whole(folder)
    assert "bytes=102400-" in [r for _, _, r in hub.asked]
