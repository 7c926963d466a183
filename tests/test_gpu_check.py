"""gpu_check.py runs what fits into its time, loses nothing, and compares with the right numbers."""

import importlib
import json
import subprocess
import sys
import time

import pytest

from nanochat_jax import bench
from nanochat_jax import config as cfg

ROOT = cfg.CONFIGS.parent
# As on a machine that was borrowed to measure: no modules that read data.
BARE = """
import sys
for name in ('grain', 'ml_collections', 'datasets', 'rustbpe', 'torch'):
    sys.modules[name] = None
sys.path.insert(0, 'scripts')
import gpu_check
"""


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gpu_check")


def test_ratios_to_peak_ceiling_and_target(gpu_check):
    peaks, ceilings = {"bf16": 1e15, "copy": 4e12}, {"bf16": 0.8e15, "copy": 3e12}
    step = gpu_check.Row("train step d20 bf16", 400.0, 160e3, "tok/s", 0.6e15, "bf16")
    judged = gpu_check.judge(step, peaks, ceilings)
    assert judged["of peak"] == pytest.approx(0.6)
    assert judged["of ceiling"] == pytest.approx(0.75)
    assert judged["of target"] == pytest.approx(0.6 / 0.52)
    assert gpu_check.judge(step, {}, ceilings)["of target"] is None  # no peak: no MFU
    decode = gpu_check.Row("decode d20, rows 1", 0.5, 2_000, "tok/s", 1e12, "copy")
    judged = gpu_check.judge(decode, peaks, ceilings)
    assert judged["of target"] == pytest.approx(2_000 / 1_500)
    assert judged["of ceiling"] == pytest.approx(1 / 3)
    muon = gpu_check.Row("Muon d20", 30.0, 3.0, "%")  # twice the target's time: half of it
    assert gpu_check.judge(muon, peaks, ceilings)["of target"] == pytest.approx(0.5)
    other = gpu_check.Row("anything", 1.0, 1.0, "ms")
    assert gpu_check.judge(other, peaks, ceilings)["target"] == ""


def test_every_target_is_a_row_of_a_shape_that_is_measured(gpu_check):
    for what, target in gpu_check.TARGETS.items():
        assert any(word.strip(",") in bench.SHAPES for word in what.split()), what
        assert target.source and target.measure in ("of peak", "value", "value at most")


def test_parts_that_fail_or_do_not_fit_hide_no_other(gpu_check, tmp_path, capsys):
    Part, found = gpu_check.Part, gpu_check.Found(tmp_path)
    seen = []  # what a kill in the middle of a part would leave

    def fail():
        seen.append(json.loads((tmp_path / "results.json").read_text())["parts"])
        raise RuntimeError("out of luck")

    parts = [
        Part("first", 1, lambda: ([gpu_check.Row("a", 1.0, 2.0, "ms")], {"x": 1})),
        Part("bad", 1, fail),
        Part("long", 1e6, lambda: seen.append("never")),
        Part("elsewhere", 1, lambda: seen.append("never"), False),
        Part("last", 1, lambda: ([], {"y": 2})),
    ]
    gpu_check.run_parts(parts, found, time.monotonic() + 60)
    assert found.parts.pop("long").startswith("skipped: needs 1000000 s, ")
    assert found.parts == {
        "first": "ok",
        "bad": "FAILED",
        "elsewhere": "skipped: needs a GPU that can",
        "last": "ok",
    }
    assert seen == [{"first": "ok", "bad": "the time was up in the middle of it"}]
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["failed"] == ["bad"] and kept["results"] == {"first": {"x": 1}, "last": {"y": 2}}
    assert [row["what"] for row in kept["rows"]] == ["a"]


def check(program: str, *arguments: str) -> subprocess.CompletedProcess:
    program = f"{BARE}\nsys.argv = ['gpu_check.py', *{arguments}]\n{program}\ngpu_check.main()"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_when_the_time_is_up_the_table_is_printed_all_the_same(tmp_path):
    program = """
import time
slow = lambda: time.sleep(100)
quick = lambda: ([gpu_check.Row('quick', 1.0, 2.0, 'ms')], {})
gpu_check.make_parts = lambda *_: [gpu_check.Part('a', 0, quick), gpu_check.Part('b', 0, slow)]
"""
    began = time.monotonic()
    done = check(program, "--budget=2", f"--out={tmp_path}")
    assert done.returncode == 1 and time.monotonic() - began < 50
    assert "\nquick  1.00" in done.stdout
    assert "b: the time was up in the middle of it" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["a"] == "ok"


def test_measuring_without_the_data_libraries(tmp_path):
    done = check("", "--secs=0", "--parts", "tiled loss", "float32", "optimizer", "matmuls")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {end for name, end in found["parts"].items() if "gpt2" not in name} == {"ok"}
    assert list(found["parts"])[:2] == ["right: tiled loss", "ceilings"]
    rows = {row["what"]: row for row in found["rows"]}
    step = rows["train step tiny float32"]
    assert step["of ceiling"] == pytest.approx(step["work"] / found["ceilings"]["bf16"])
    # 1,024 batches of 512 tokens in an optimizer step, less all updates but one.
    ms = found["results"]["optimizer"]["ms"]
    whole = 1024 * (step["ms"] - ms["both"]) + ms["both"]
    assert rows["Muon tiny"]["value"] == pytest.approx(100 * ms["muon"] / whole)
    assert len([what for what in rows if what.startswith(("attn", "mlp", "head"))]) == 24
    assert found["machine"]["platform"] == "cpu"


@pytest.mark.long
def test_all_of_it_on_the_tiny_shape(tmp_path):
    done = check("", "--secs=0", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    skipped = [name for name, end in found["parts"].items() if end != "ok"]
    assert skipped == ["start gpt2", "train step gpt2 float32", "train step gpt2 fp8"]
    losses = found["results"]["right: bf16 and fp8 losses"]
    assert 0 < losses["bfloat16"] < losses["fp8"] < 0.03
