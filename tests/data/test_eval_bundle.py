"""The bundle's download from a server on this machine, on good days and bad ones."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.data import eval_bundle
from nanochat_jax.data import hub as download

FILES = {
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
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/eval_bundle.zip"
        self.body = zipped(FILES)
        self.etag = ""  # "": the MD5 of the body
        self.asked: list[tuple[str, str]] = []  # (method, range)
        self.headers: list[dict] = []
        self.cut_after: list[int] = []  # bytes after which the next contents break off
        self.ignore_range = False

    def handle_error(self, request, client_address):
        pass  # clients that hang up are expected here


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, start = self.server, 0
        asked = self.headers.get("Range", "")
        server.asked.append((self.command, asked))
        server.headers.append(dict(self.headers))
        if asked and not server.ignore_range:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        etag = server.etag or hashlib.md5(server.body).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            if server.cut_after:
                body = body[: server.cut_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(download, "_FIRST_WAIT_SECS", 0.001)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def assert_whole(folder):
    assert folder == data_dir() / "eval_bundle"
    there = {str(p.relative_to(folder.parent)): p for p in folder.rglob("*") if p.is_file()}
    assert set(there) == {name for name in FILES if name.startswith("eval_bundle/")}
    assert all(path.read_bytes() == FILES[name] for name, path in there.items())
    assert {p.name for p in data_dir().iterdir()} <= {"eval_bundle", "eval_bundle.lock"}


def test_downloads_once_and_tells_nobody_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_whole(eval_bundle.ensure(url=server.url))
    assert server.asked == [("HEAD", ""), ("GET", "")]
    assert not any("hf_secret" in str(headers) for headers in server.headers)
    assert_whole(eval_bundle.ensure(url="http://127.0.0.1:1/never asked"))


def test_a_cut_connection_continues_where_it_broke_off(server):
    server.cut_after = [3000, 2000]
    assert_whole(eval_bundle.ensure(url=server.url))
    assert [r for method, r in server.asked if method == "GET"] == [
        "",
        "bytes=3000-",
        "bytes=5000-",
    ]


def test_what_was_received_is_kept_for_the_next_call(server):
    server.cut_after = [3000] + [0] * 100
    with pytest.raises(UserError, match=r"gave up after.*set config\.eval\.core_dir") as error:
        eval_bundle.ensure(url=server.url)
    assert "\n" not in str(error.value) and not (data_dir() / "eval_bundle").exists()
    (part,) = data_dir().glob("*.part")
    assert part.read_bytes() == server.body[:3000]
    server.cut_after, server.asked, server.ignore_range = [], [], True  # sends all of it again
    assert_whole(eval_bundle.ensure(url=server.url))
    assert server.asked == [("HEAD", ""), ("GET", "bytes=3000-")]


def test_another_file_of_that_name_is_not_continued(server):
    server.cut_after = [3000] + [0] * 100
    with pytest.raises(UserError):
        eval_bundle.ensure(url=server.url)
    server.cut_after, server.asked = [], []
    server.body = zipped(FILES | {"eval_bundle/more": b"more"})
    assert (eval_bundle.ensure(url=server.url) / "more").read_bytes() == b"more"
    assert server.asked == [("HEAD", ""), ("GET", "")]


def test_wrong_bytes_are_noticed(server):
    server.etag = "0" * 32
    with pytest.raises(UserError, match="got MD5 .*expected 0000"):
        eval_bundle.ensure(url=server.url)
    server.etag = f"{'0' * 32}-12"  # of an upload in parts: says nothing about the whole
    server.body = server.body.replace(bytes(range(100, 200)), bytes(range(99, 199)))
    with pytest.raises(UserError, match="cannot be unpacked.*run the same command"):
        eval_bundle.ensure(url=server.url)
    assert not (data_dir() / "eval_bundle").exists() and not list(data_dir().glob("*.part"))
    server.body = zipped(FILES)
    assert_whole(eval_bundle.ensure(url=server.url))


@pytest.mark.parametrize(
    "files, said",
    [
        (
            {"eval_bundle/../../out": b"", **FILES},
            "cannot be unpacked.*out lies outside its folder",
        ),
        ({"other/core.yaml": b""}, "holds no eval_bundle/core.yaml"),
    ],
)
def test_an_archive_stays_in_its_folder(server, tmp_path, files, said):
    server.body = zipped(files)
    with pytest.raises(UserError, match=said):
        eval_bundle.ensure(url=server.url)
    assert {p.name for p in data_dir().iterdir()} == {"eval_bundle.lock"}
    assert not list(tmp_path.rglob("out"))


def test_no_network_is_said_in_one_line(server):
    server.shutdown()
    server.socket.close()
    with pytest.raises(UserError, match=r"^eval_bundle: .*core_dir to that folder$") as error:
        eval_bundle.ensure(url=server.url)
    assert "\n" not in str(error.value)


def test_a_folder_of_ones_own_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine without core.yaml.*core_dir"):
        eval_bundle.ensure(str(tmp_path / "mine"))
    (tmp_path / "mine" / "core_offline.yaml").write_text("icl_tasks: []\n")
    assert eval_bundle.ensure("~/mine") == tmp_path / "mine"
