"""gpu_check.py runs what fits into its time, loses nothing, and compares with the right numbers."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace as Made

import pytest

from nanochat_jax.config import CONFIGS
from scripts import gpu_check
from scripts.bench import common
from scripts.bench.common import Row
from scripts.gpu_check import Found, Part


def found_in(seconds: float, out=None) -> Found:
    return Found(out, time.monotonic() + seconds)


def test_ratios_to_ceiling_and_target():
    found = found_in(60)
    found.rows = [Row("d20 ceiling fp8", work=4e12, limit="fp8")]
    decode = Row("d20 a token, 1 at once", value=3_000, unit="tok/s", work=1e12, limit="fp8")
    assert found.ratios(decode) == {"of ceiling": 0.25, "of target": 2.0}
    assert found.ratios(Row("anything", 1.0)) == {"of ceiling": None, "of target": None}


def test_parts_that_fail_or_do_not_fit_hide_no_other(tmp_path, capsys):
    found, seen = found_in(60, tmp_path), []

    def results() -> dict:
        return json.loads((tmp_path / "results.json").read_text())

    def fail():
        seen.append(results()["parts"])  # what a kill in the middle of a part would leave
        raise RuntimeError("out of luck")

    parts = [
        Part("first", 1, lambda: [Row("a", 1.0)]),
        Part("bad", 1, fail),
        Part("not compiled", 1, lambda step: [], "job"),
        Part("long", 1e6, lambda: seen.append("never")),
        Part("last", 1, lambda: [Row("b", 2.0)]),
    ]
    gpu_check.run_parts(parts, {"job": fail, "not wanted": lambda: seen.append("never")}, found)
    assert found.parts.pop("long").startswith("skipped")
    ends = {"first": "ok", "bad": "FAILED", "not compiled": "FAILED", "last": "ok"}
    assert found.parts == ends and "never" not in seen
    assert seen[-1]["bad"] == "the time was up in the middle of it"
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    assert [row["what"] for row in results()["rows"]] == ["a", "b"]
    found.show()
    failed = ["bad", "not compiled"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"bench": "gpu_check", "failed": failed}


def test_what_is_timed_while_others_compile_says_so():
    found, compiled = found_in(60), threading.Event()
    parts = [
        Part("right: a", 40, lambda: [Row("a")]),
        Part("b", 40, lambda: compiled.set() or [Row("b")]),  # no time to wait for what comes after
        Part("c", 40, lambda _: [Row("c")], "slow"),
        Part("d", 1, lambda: [Row("d")]),
    ]
    gpu_check.run_parts(parts, {"slow": compiled.wait}, found)
    notes = {row.what: row.note for row in found.rows}
    assert notes["a"] == notes["d"] == "" and "others compiled" in notes["b"]


def test_all_parts_fit_into_the_time_and_measure_every_target():
    parts, jobs = gpu_check.make_parts(found_in(0), 6.0)
    assert sum(part.needs_secs for part in parts) <= 450
    assert {part.job for part in parts} - {""} == set(jobs)
    for what, (kind, _) in gpu_check.TARGETS.items():
        assert set(what.split()) & set(common.SHAPES) and kind in ("of peak", "value")


def test_kernels_of_a_gpu_are_those_of_its_streams():
    def line(name: str, **ms: float) -> Made:
        events = [
            Made(name=f"{n}", duration_ns=1e6 * t, stats=[("hlo_op", n)]) for n, t in ms.items()
        ]
        return Made(name=name, events=events)

    stream = line("Stream #13(Compute)", gemm_1=6, gemm_2=2, sort=2)
    planes = [
        Made(name="/device:GPU:0", lines=[stream, line("XLA Ops", gemm_1=6)]),
        Made(name="/host:CPU", lines=[line("python", gemm_1=9)]),
    ]
    rows = gpu_check.top_kernels(Made(planes=planes))
    found = [(row.what, row.value, row.ms, row.note) for row in rows]
    assert found == [("kernel gemm", 2, 8.0, "80.0%"), ("kernel sort", 1, 2.0, "20.0%")]


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
quick = gpu_check.Part("a", 0, lambda: [gpu_check.Row("quick", 1.0)])
slow = gpu_check.Part("b", 0, lambda: time.sleep(100))
gpu_check.main(lambda *_: ([quick, slow], {}))
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
    files = {"results.json", "tiny_float32.hlo.gz", "tiny_fp8.hlo.gz", "trace.json.gz"}
    assert {file.name for file in tmp_path.iterdir()} == files
    values = {row["what"]: row["value"] for row in found["rows"]}
    assert 0 < values["right: bf16 losses"] < values["right: fp8 losses"] < 0.03
