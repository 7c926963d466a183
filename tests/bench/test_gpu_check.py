"""gpu_check.py loses nothing that it has found, and compares with the right numbers."""

import json
import subprocess
import sys
import threading
import time

import pytest

from nanochat_jax.config import CONFIGS
from scripts import gpu_check
from scripts.bench import common
from scripts.gpu_check import Found, Part


def test_rows_are_compared_with_their_target():
    found = Found(None)
    found.rows = [{"what": "d20 a token, 1 at once", "value": 3_000}, {"what": "anything"}]
    assert [row["of_target"] for row in found.compared()] == [2.0, None]


def test_parts_that_fail_hide_no_other(tmp_path, capsys):
    found, seen = Found(tmp_path), []

    def results() -> dict:
        return json.loads((tmp_path / "results.json").read_text())

    def fail(*_):
        seen.append(results()["parts"])  # what a kill in the middle of a part would leave
        raise RuntimeError("out of luck")

    parts = [
        Part("first", lambda _: [{"what": "a"}]),
        Part("bad", fail),
        Part("not compiled", lambda step: [], fail),
        Part("last", lambda given: [{"what": given}], lambda: "b"),
    ]
    gpu_check.run_parts(parts, found, 60)
    assert seen[-1]["bad"] == "the time was up in the middle of it"
    assert list(found.parts.values()) == ["ok", "FAILED", "FAILED", "ok"]
    assert [row["what"] for row in results()["rows"]] == ["a", "b"]
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    found.show()
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"bench": "gpu_check", "failed": ["bad", "not compiled"]}


def test_nothing_is_timed_while_others_compile():
    found, compiled = Found(None), threading.Event()
    parts = [
        Part("right: a", lambda _: compiled.set() or []),  # checks do not wait
        Part("b", lambda _: [{"what": str(compiled.is_set())}]),
        Part("c", lambda _: [], compiled.wait),
    ]
    gpu_check.run_parts(parts, found, 60)
    assert set(found.parts.values()) == {"ok"} and found.rows == [{"what": "True"}]


BARE = """
import sys
for name in ("grain", "ml_collections", "datasets", "rustbpe", "torch"):
    sys.modules[name] = None
from scripts import gpu_check
from scripts.bench import common, infer, kernels, memory, train
"""


def test_shapes_are_the_same_without_the_data_libraries():
    done = check("print([common.load_shape(n, 'gpu') for n in common.SHAPES])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([common.load_shape(n, "gpu") for n in common.SHAPES])


def check(program: str, *arguments: str) -> subprocess.CompletedProcess:
    program = f"{BARE}sys.argv = ['gpu_check.py', *{arguments}]\n{program}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_when_the_time_is_up_the_table_is_printed_all_the_same(tmp_path):
    program = """
import time
quick = gpu_check.Part("a", lambda _: [{"what": "quick", "ms": 1.0}])
slow = gpu_check.Part("b", lambda _: time.sleep(100))
gpu_check.main(lambda *_: [quick, slow])
"""
    began = time.monotonic()
    done = check(program, "--budget=2", f"--out={tmp_path}")
    assert done.returncode == 1 and time.monotonic() - began < 50
    assert "quick  1.00" in done.stdout and "b: the time was up" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["a"] == "ok"


@pytest.mark.long
def test_all_of_it_on_the_tiny_shape(tmp_path):
    done = check("gpu_check.main()", "--secs=0", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["parts"].values()) == {"ok"}
    files = {"results.json", "train_step_tiny_float32.hlo.gz", "train_step_tiny_fp8.hlo.gz"}
    assert {file.name for file in tmp_path.iterdir()} == files | {"profile"}
    values = {row["what"]: row.get("value") for row in found["rows"]}
    assert 0 < values["right: bf16 losses"] < values["right: fp8 losses"] < 30
