"""Downloads from a server on this machine that behaves like the hub, and like a bad day of it."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from copy import deepcopy
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.data import hub as client

ROOT = Path(__file__).parents[2]
REPO = "karpathy/fineweb-edu-100b-shuffle"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
SHARDS = {name: bytes(range(256)) * 500 + name.encode() for name in NAMES}
BUNDLE = {
    "eval_bundle/core.yaml": b"icl_tasks: []\n",
    "eval_bundle/eval_data/some/copa.jsonl": bytes(range(256)) * 40,
    "__MACOSX/eval_bundle/._core.yaml": b"left out",
}


def zipped(files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


class Server(ThreadingHTTPServer):
    """/datasets/REPO/resolve/REVISION/FILE tells size and hash and redirects to /cdn/FILE."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = SHARDS | {"eval_bundle.zip": zipped(BUNDLE)}
        self.asked: list[tuple[str, str]] = []  # (method, path)
        self.headers = ""  # of all requests
        self.failures: list[tuple[int, dict]] = []  # answers of the next requests for contents
        self.cut_after: list[int] = []  # bytes after which the next contents break off
        self.wrong = 0  # contents to send with a byte changed
        self.hold = threading.Event()  # contents stop half-way until it is set
        self.hold.set()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are expected here

    def contents(self) -> Counter:
        return Counter(path for method, path in self.asked if method == "GET" and "cdn" in path)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2])
            self.server.hold.wait()
            self.wfile.write(body[len(body) // 2 :])

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.asked.append((self.command, self.path))
        server.headers += str(self.headers)
        if name not in server.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        elif self.path.startswith("/cdn/"):
            self.content(server.files[name])
        elif self.path not in [f"/datasets/{REPO}/resolve/{r}/{name}" for r in ("main", COMMIT)]:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        else:
            sha256 = hashlib.sha256(server.files[name]).hexdigest()
            facts = {"X-Linked-Size": len(server.files[name]), "X-Linked-ETag": f'"{sha256}"'}
            facts["Location"] = f"http://localhost:{server.server_port}/cdn/{name}"  # another host
            self.answer(302, facts | {"X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def content(self, data):
        server, headers = self.server, {"Content-Length": len(data)}
        if server.failures:
            self.answer(*server.failures.pop(0))
            return
        if self.command == "GET" and server.wrong > 0:
            server.wrong -= 1
            data = data[:99] + bytes([data[99] ^ 1]) + data[100:]
        if self.command == "GET" and server.cut_after:
            data, self.close_connection = data[: server.cut_after.pop(0)], True
        self.answer(200, headers, data)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda secs: None)


def get(server, folder, names=NAMES, repo=REPO):
    client.download(repo, names, folder, endpoint=server.url)


def get_bundle(server):
    return client.eval_bundle(url=f"{server.url}/cdn/eval_bundle.zip")


def assert_whole(folder, names=NAMES):
    assert {p.name for p in folder.iterdir()} == {*names, "dataset.json"}
    manifest = json.loads((folder / "dataset.json").read_text())
    assert manifest["revision"] == COMMIT and list(manifest["shards"]) == names
    for name, facts in manifest["shards"].items():
        assert (folder / name).read_bytes() == SHARDS[name]
        sha256 = hashlib.sha256(SHARDS[name]).hexdigest()
        assert facts == {"bytes": len(SHARDS[name]), "sha256": sha256}


def assert_bundle_whole(folder):
    assert folder == data_dir() / "eval_bundle"
    there = {str(p.relative_to(folder.parent)): p for p in folder.rglob("*") if p.is_file()}
    whole = {name: data for name, data in BUNDLE.items() if name.startswith("eval_bundle/")}
    assert {name: path.read_bytes() for name, path in there.items()} == whole
    assert {p.name for p in data_dir().iterdir()} <= {"eval_bundle", "eval_bundle.lock"}


def test_downloads_once_and_more_from_the_same_commit(server, tmp_path):
    folder = tmp_path / "shards"
    get(server, folder, NAMES[:1])
    get(server, folder)
    assert_whole(folder)
    assert server.contents() == {f"/cdn/{name}": 1 for name in NAMES}
    asked = len(server.asked)
    get(server, folder)
    assert len(server.asked) == asked
    first = next(i for i, (_, path) in enumerate(server.asked) if NAMES[1] in path)
    assert not [path for _, path in server.asked[first:] if "/main/" in path]


BAD_DAYS = [dict(cut_after=[5_000, 3_000]), dict(failures=[(502, {}), (503, {})]), dict(wrong=1)]


@pytest.mark.parametrize("bad_day", BAD_DAYS)
def test_what_goes_wrong_is_tried_again(server, tmp_path, bad_day):
    vars(server).update(deepcopy(bad_day))
    get(server, tmp_path / "shards", NAMES[:1])
    assert_whole(tmp_path / "shards", NAMES[:1])
    vars(server).update(deepcopy(bad_day))
    assert_bundle_whole(get_bundle(server))


WORSE_DAYS = [dict(failures=[(502, {})] * 999), dict(wrong=999), dict(url="http://127.0.0.1:9")]


@pytest.mark.parametrize("bad_day", WORSE_DAYS)
def test_what_stays_wrong_is_one_line_and_no_file(server, tmp_path, bad_day):
    vars(server).update(deepcopy(bad_day))
    for call in (partial(get, server, tmp_path / "shards", NAMES[:1]), partial(get_bundle, server)):
        with pytest.raises(UserError, match=server.url) as error:
            call()
        assert "\n" not in str(error.value)
    assert "core_dir" in str(error.value)
    assert not list(tmp_path.glob("shards/*.parquet")) and not (data_dir() / "eval_bundle").exists()


def test_shards_put_there_by_hand_are_verified(server, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / NAMES[0]).write_bytes(SHARDS[NAMES[0]])
    (folder / NAMES[1]).write_bytes(b"x" * len(SHARDS[NAMES[1]]))
    get(server, folder)
    assert_whole(folder)
    assert server.contents() == {f"/cdn/{name}": 1 for name in NAMES[1:]}


def test_what_is_not_there_is_asked_for_once(server, tmp_path):
    with pytest.raises(UserError, match="shard_00009"):
        get(server, tmp_path / "shards", ["shard_00009.parquet"])
    assert len(server.asked) == 1
    with pytest.raises(UserError, match="someone/else"):
        get(server, tmp_path / "shards", repo="someone/else")


def test_the_bundle_comes_once_and_the_token_stays_here(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for _ in range(2):
        assert_bundle_whole(get_bundle(server))
        assert [method for method, _ in server.asked] == ["GET"]
    assert "hf_secret" not in server.headers


def test_an_archive_stays_in_its_folder(server, tmp_path):
    server.files["eval_bundle.zip"] = zipped({"other/core.yaml": b""})
    with pytest.raises(UserError, match="eval_bundle"):
        get_bundle(server)
    assert not (data_dir() / "eval_bundle").exists()
    server.files["eval_bundle.zip"] = zipped({"eval_bundle/../../out": b"", **BUNDLE})
    assert_bundle_whole(get_bundle(server))
    assert not list(tmp_path.rglob("out"))


def test_a_folder_of_ones_own_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine without core.yaml.*core_dir"):
        client.eval_bundle(str(tmp_path / "mine"))
    (tmp_path / "mine" / "core_offline.yaml").write_text("icl_tasks: []\n")
    assert client.eval_bundle("~/mine") == tmp_path / "mine"


def start_script(server, base_dir, limit_kib="unlimited"):
    """`scripts/data.py download` as people start it, perhaps with a limit on the size of files."""
    env = {"HF_ENDPOINT": server.url, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT)}
    download = [sys.executable, str(ROOT / "scripts" / "data.py"), "download"]
    download.append("--config.data.num_shards=2")
    limited = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "-", *download]
    return subprocess.Popen(limited, env=os.environ | env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end, status", [("full disk", 1), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_download_that_ended_half_way_is_done_by_the_next(server, tmp_path, end, status):
    folder = tmp_path / "data" / "fineweb_edu"
    if end == "full disk":
        process = start_script(server, tmp_path, limit_kib="100")
    else:
        server.hold.clear()
        process = start_script(server, tmp_path)
        while not server.contents() and process.poll() is None:
            threading.Event().wait(0.01)
        process.send_signal(getattr(signal, end))
    err = process.communicate(timeout=60)[1]
    server.hold.set()
    assert process.returncode == status, err
    assert "Traceback" not in err and not list(folder.glob("*.parquet"))
    process = start_script(server, tmp_path)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, err
    assert_whole(folder)
