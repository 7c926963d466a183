"""Rows from a folder, and from a server on this machine that answers as the hub does."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.sources import LABELLED, NUMBER, SOURCES, TEXT, TEXTS, load_rows, read_jsonl

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]
# numpy.random.default_rng(42).permutation(20), the order of datasets.Dataset.shuffle(seed=42)
SHUFFLED = [15, 9, 14, 7, 12, 10, 6, 19, 3, 0, 16, 5, 11, 18, 2, 4, 17, 1, 13, 8]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_rows_of_a_folder_in_fixed_order(tmp_path, write, suffix):
    write(tmp_path / "gsm8k" / f"test.{suffix}", GSM8K)
    rows = load_rows("gsm8k", "test", str(tmp_path))
    assert list(rows) == [GSM8K[i] for i in SHUFFLED]
    assert [rows[i] for i in (3, 0)] == [GSM8K[7], GSM8K[15]]


@pytest.mark.parametrize(
    "name, split, path",
    [
        ("arc_easy", "train", "arc/arc_easy_train.jsonl"),
        ("arc_easy", "dev", "arc/arc_easy_dev.jsonl"),
        ("arc_challenge", "test", "arc/arc_challenge_test.jsonl"),
        ("mmlu", "test", "mmlu/test.jsonl"),
        ("mmlu", "dev", "mmlu/dev.jsonl"),
        ("mmlu", "auxiliary_train", "mmlu/auxiliary_train_from_elsewhere.jsonl"),
        ("gsm8k", "train", "gsm8k/train.jsonl"),
        ("humaneval", "test", "humaneval/HumanEval.jsonl"),
        ("smoltalk", "test", "chat/mixture/test.parquet"),
    ],
)
def test_layout_of_the_folder(tmp_path, name, split, path):
    labelled = {"text": ["a"], "label": ["A"]}
    fitting = {TEXT: "x", TEXTS: ["x"], NUMBER: 0, LABELLED: labelled}
    row = {column: fitting.get(kind, ["x"]) for column, kind in SOURCES[name].columns.items()}
    write = write_parquet if path.endswith("parquet") else write_jsonl
    write(tmp_path / path, [row])
    assert list(load_rows(name, split, str(tmp_path))) == [row]


def test_nested_columns_of_parquet(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_parquet(tmp_path / "chat/mixture/train.parquet", [{"messages": messages, "source": "x"}])
    assert list(load_rows("smoltalk", "train", str(tmp_path))) == [{"messages": messages}]
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    row = {"question": "?", "choices": choices, "answerKey": "3"}
    write_parquet(tmp_path / "arc/arc_easy_train.parquet", [row])
    assert list(load_rows("arc_easy", "train", str(tmp_path))) == [row]


@pytest.mark.parametrize("split", ["dev", "validation"])
@pytest.mark.parametrize("name", ["dev", "validation"])
def test_arc_has_one_split_of_two_names(tmp_path, split, name):
    row = {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
    write_jsonl(tmp_path / "arc" / f"arc_challenge_{name}.jsonl", [row])
    assert list(load_rows("arc_challenge", split, str(tmp_path))) == [row]


def test_several_files_are_joined_in_order_of_their_names(tmp_path):
    rows = [
        {"question": f"{i}?", "subject": "s", "choices": ["a", "b"], "answer": 0} for i in range(20)
    ]
    for part in (2, 0, 3, 1):  # rows 5 part, ...
        name = f"mmlu/auxiliary_train-{part}-of-4.parquet"
        write_parquet(tmp_path / name, rows[5 * part : 5 * part + 5])
    loaded = load_rows("mmlu", "auxiliary_train", str(tmp_path))
    assert list(loaded) == [rows[i] for i in SHUFFLED]


def test_worker_processes_get_paths_not_rows(tmp_path):
    write_parquet(tmp_path / "gsm8k/test.parquet", [{"question": "x" * 99_999, "answer": "y"}])
    rows = load_rows("gsm8k", "test", str(tmp_path))
    sent = pickle.dumps(rows)
    assert len(sent) < 2_000
    assert list(pickle.loads(sent)) == list(rows)


def test_a_missing_file_is_not_fetched_from_the_hub(tmp_path):
    with pytest.raises(UserError) as error:
        load_rows("mmlu", "validation", str(tmp_path))
    assert str(error.value) == (
        f"got no such file, expected in config.data.task_dir = {tmp_path} one of "
        "mmlu/validation.jsonl, mmlu/validation.parquet, with rows of cais/mmlu"
    )


def test_two_files_for_one_split(tmp_path):
    write_jsonl(tmp_path / "gsm8k/test.jsonl", GSM8K)
    write_parquet(tmp_path / "gsm8k/test.parquet", GSM8K)
    with pytest.raises(UserError, match=r"got .*test\.jsonl and .*test\.parquet, expected .* one"):
        load_rows("gsm8k", "test", str(tmp_path))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "?"}', "got question, expected question, answer"),
        ("[1]", "got list, expected an object"),
        ('{"question"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_bad_lines_are_told_with_their_number(tmp_path, line, message):
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    good = json.dumps(GSM8K[0]).encode()
    path.write_bytes(good + b"\n\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(UserError) as error:
        load_rows("gsm8k", "test", str(tmp_path))
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


ARC_ROW = {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
MMLU_ROW = {"question": "?", "subject": "s", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    "name, path, row, column, wrong, message",
    [
        ("gsm8k", "gsm8k/test", GSM8K[0], "answer", None, "None, expected text"),
        ("mmlu", "mmlu/test", MMLU_ROW, "answer", "B", "'B', expected a whole number"),
        ("mmlu", "mmlu/test", MMLU_ROW, "choices", "ab", "'ab', expected a list of texts"),
        ("arc_easy", "arc/arc_easy_test", ARC_ROW, "choices", ["a"], "['a'], expected {"),
    ],
)
def test_values_of_the_wrong_kind_are_told(tmp_path, name, path, row, column, wrong, message):
    file = tmp_path / f"{path}.jsonl"
    write_jsonl(file, [row, row | {column: wrong}])
    with pytest.raises(UserError) as error:
        load_rows(name, "test", str(tmp_path))
    assert str(error.value).startswith(f"{file}:2: {column} got {message}")
    assert str(error.value).endswith("correct the row") and "\n" not in str(error.value)
    file.unlink()
    write_parquet(tmp_path / f"{path}.parquet", [row | {column: wrong}])
    with pytest.raises(UserError, match="^row 0 of .*parquet: ") as error:
        load_rows(name, "test", str(tmp_path))[0]
    assert f"{column} got {message}" in str(error.value)


def test_bad_parquet(tmp_path):
    path = tmp_path / "gsm8k" / "test.parquet"
    write_parquet(path, [{"question": "?"}])
    with pytest.raises(UserError, match="got question, expected question, answer"):
        load_rows("gsm8k", "test", str(tmp_path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"test\.parquet cannot be read"):
        load_rows("gsm8k", "test", str(tmp_path))


def test_lines_of_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": "é"}\r\n\n  \n[1]'.encode())
    assert list(read_jsonl(path)) == [(f"{path}:1", {"a": "é"}), (f"{path}:4", [1])]
    with pytest.raises(UserError, match="cannot be read .*No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


class Hub(ThreadingHTTPServer):
    """The hub's addresses that `load_dataset` uses, for {repository: {path: bytes}}."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_GET(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {self.path} {asked[:200]}")
        parts = path.removeprefix("/api").split("/")  # "", datasets, owner, name, what, commit, ...
        files = self.server.repos.get("/".join(parts[2:4]))
        if files is None:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/"):
            self.api(parts[4] if len(parts) > 4 else "", files, "/".join(parts[6:]), asked)
        else:
            self.file(files.get("/".join(parts[6:])))

    def api(self, what, files, below, asked):
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        match what:
            case "" | "revision":
                siblings = [{"rfilename": path} for path in files]
                reply = {"id": "x/y", "sha": COMMIT, "siblings": siblings, "tags": []}
                reply |= {"private": False, "gated": False, "disabled": False}
            case "tree":
                folders = {path.rpartition("/")[0] for path in files} - {""}
                listed += [{"type": "directory", "path": path, "oid": COMMIT} for path in folders]
                reply = [file for file in listed if file["path"].rpartition("/")[0] == below]
            case "paths-info":
                reply = [file for file in listed if file["path"] in json.loads(asked)["paths"]]
            case _:
                self.answer(404)
                return
        self.answer(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def file(self, data):
        if data is None:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": etag})


@pytest.fixture
def hub():
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(GSM8K), buffer)
    card = (
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: test\n    path: main/test-*\n---\n"
    )
    files = {"README.md": card.encode(), "main/test-00000-of-00001.parquet": buffer.getvalue()}
    server = Hub({"openai/gsm8k": files})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_with_hub(hub, tmp_path, program):
    """The hub's address is read when its client is imported, so a process of its own."""
    own = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_rows_of_the_hub(hub, tmp_path):
    program = f"SHUFFLED = {SHUFFLED}\n" + (
        "import json, pickle\n"
        "from datasets import Dataset\n"
        "from nanochat_jax.common import UserError\n"
        "from nanochat_jax.tasks.sources import load_rows\n"
        "rows = load_rows('gsm8k', 'test')\n"
        "sent = pickle.dumps(rows)\n"
        "assert list(pickle.loads(sent)) == list(rows)\n"
        "try: load_rows('arc_easy', 'test')\n"
        "except UserError as error: print(json.dumps([list(rows), str(error)]))\n"
        "shuffled = Dataset.from_list([{'i': i} for i in range(20)]).shuffle(seed=42)\n"
        "assert shuffled.to_list() == [{'i': i} for i in SHUFFLED]\n"
    )
    done = run_with_hub(hub, tmp_path, program)
    assert done.returncode == 0, done.stderr + "\n".join(hub.asked)
    rows, error = json.loads(done.stdout)
    assert rows == [GSM8K[i] for i in SHUFFLED]
    assert error.startswith("allenai/ai2_arc did not come from the Hugging Face hub (")
    assert error.endswith("or put the files into a folder and set config.data.task_dir")
    assert list((tmp_path / "base" / "data" / "tasks").rglob("*.arrow"))
