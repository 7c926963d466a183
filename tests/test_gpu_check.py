"""gpu_check.py runs what fits into its time, loses nothing, and compares with the right numbers."""

import gzip
import importlib
import json
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
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
def load(monkeypatch):
    """A script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


@pytest.fixture
def gpu_check(load):
    return load("gpu_check")


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
    other = gpu_check.Row("anything", 1.0, None, "")
    assert gpu_check.judge(other, peaks, ceilings)["target"] == ""


def test_every_target_is_a_row_of_a_shape_that_is_measured(load):
    for what, target in load("gpu_check_targets").TARGETS.items():
        assert any(word.strip(",") in bench.SHAPES for word in what.split()), what
        assert target.source and target.measure in ("of peak", "value", "value at most")


def test_parts_that_fail_or_do_not_fit_hide_no_other(gpu_check, tmp_path, capsys):
    Part, found = gpu_check.Part, gpu_check.Found(tmp_path, time.monotonic() + 60)
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
    gpu_check.run_parts(parts, found)
    assert found.parts.pop("long").startswith("skipped: needs 1000000 s, ")
    assert found.parts == {
        "first": "ok",
        "bad": "FAILED",
        "elsewhere": "skipped: not for this device",
        "last": "ok",
    }
    assert seen == [{"first": "ok", "bad": "the time was up in the middle of it"}]
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["failed"] == ["bad"] and kept["results"] == {"first": {"x": 1}, "last": {"y": 2}}
    assert [row["what"] for row in kept["rows"]] == ["a"]


def test_a_late_compilation_lets_others_go_first_and_marks_what_they_measure(gpu_check, capsys):
    found = gpu_check.Found(None, time.monotonic() + 60)
    found.compiling = {"slow": Future(), "quick": Future()}
    found.compiling["quick"].set_result("compiled")
    ran = []

    def part(name: str, awaits: str = "", ends: bool = False):
        def run():
            ran.append(name)
            if ends:
                found.compiling["slow"].set_result("compiled")
            return [gpu_check.Row(name, 1.0, 2.0, "ms")], {"x": 1.0}

        return gpu_check.Part(name, 0, run, awaits=awaits)

    parts = [part("a", "slow"), part("b", "quick"), part("c", ends=True), part("right: d")]
    gpu_check.run_parts(parts, found)
    assert ran == ["b", "c", "a", "right: d"]
    assert [row.disturbed for row in found.rows] == [True, True, False, False]
    found.compiling["late"] = Future()
    gpu_check.run_parts([part("e", "late")], found)  # alone it waits for itself, undisturbed
    assert not found.rows[-1].disturbed
    capsys.readouterr()
    found.show()
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == "right: d: ok, differs by 1.0e+00 at most"
    columns = ["what", "ms", "achieved", "unit", "of peak", "of ceiling", "target"]
    assert lines[2].split("  ")[0] == "what" and all(column in lines[2] for column in columns)
    assert [line[:3] for line in lines[3:]] == [
        "b *",
        "c *",
        "a  ",
        "rig",
        "e  ",
        "how",
        "  a",
        "pro",
        "* m",
    ]
    assert json.loads(last) == {"bench": "gpu_check", "failed": []}


def test_all_parts_fit_into_the_time(gpu_check):
    found = gpu_check.Found(None, 0.0)
    parts = gpu_check.make_parts(found, 6.0, ThreadPoolExecutor(1))
    assert sum(part.needs_secs for part in parts) <= 450
    assert len({part.name for part in parts}) == len(parts)


def test_rows_that_fit(load):
    train = load("gpu_check_train")
    shape = replace(bench.SHAPES["tiny"], rows=32, accumulate=8)
    # 10 held, 2 for each row: of 74 bytes there are 45, so 17 rows, of which 16 divide 256.
    assert train.rows_that_fit(shape, 10, 74, 45) == 16
    assert train.rows_that_fit(shape, 10, 74, 41) == 8
    assert train.rows_that_fit(shape, 10, 74, 3) == 1
    other = train.with_rows(shape, 16)
    assert (other.rows, other.accumulate, other.step_tokens) == (16, 16, shape.step_tokens)


class Compiled:
    def __init__(self, shape, num_bytes: int):
        self.shape, self.num_bytes = shape, num_bytes

    def memory_analysis(self):
        return self

    argument_size_in_bytes = 0

    def as_text(self):
        return TEXT


TEXT = """
custom_call_target="__cublas$lt$matmul$f8", custom_call_target="__cublas$lt$matmul$f8"
custom_call_target="__cublas$lt$matmul" custom_call_target="__cublas$gemm"
custom_call_target="__cudnn$fmhaSoftmaxBackward" custom_call_target="__cudnn$fmhaSoftmax"
backend_config={"kind":"__triton_gemm"} {"kind":"__triton_nested_gemm_fusion"} {"kind":"__triton"}
"""


@pytest.fixture
def training(load, monkeypatch):
    """Steps that need 10 bytes a row and 100 more, without compiling or running any."""
    train = load("gpu_check_train")
    compiled = []

    def compile(self, label):
        compiled.append(self.shapes[label].rows)
        return Compiled(self.shapes[label], 100 + 10 * self.shapes[label].rows)

    def run(shape, secs, *, rivals, compiled):
        assert compiled.shape == shape
        if shape.rows > run.most_rows:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"rows": shape.rows, "tokens_per_sec": 1.0}

    run.most_rows = 1_000
    monkeypatch.setattr(train.Training, "compile", compile)
    monkeypatch.setattr(train, "compiled_bytes", lambda step: step.num_bytes)
    monkeypatch.setattr(train, "held_bytes", lambda shape, step: 100)
    monkeypatch.setattr(train.bench_train, "run", run)
    made = train.Training(ThreadPoolExecutor(1), {}, 0.0)
    made.submit("x bf16", replace(bench.SHAPES["tiny"], rows=32))
    made.train, made.run, made.compiled = train, run, compiled
    return made


def test_a_step_that_does_not_fit_is_compiled_once_more(training, monkeypatch):
    monkeypatch.setattr(training.train, "available_bytes", lambda mesh: 200)
    assert training.measure("x bf16", 10)["rows"] == 8  # of the 10 that would fit
    assert training.compiled == [32, 8]
    assert training.shapes["x bf16"].step_tokens == 32 * 64


def test_out_of_memory_halves_the_rows_once(training, monkeypatch):
    monkeypatch.setattr(training.train, "available_bytes", lambda mesh: 10_000)
    training.run.most_rows = 16
    assert training.measure("x bf16", 10)["rows"] == 16
    assert training.compiled == [32, 16]
    training.run.most_rows = 4
    with pytest.raises(jax.errors.JaxRuntimeError):
        training.measure("x bf16", 10)


def test_libraries_are_required_on_a_gpu(training, monkeypatch):
    counts = {"f8": 2, "cublas": 2, "cudnn": 2, "triton": 2}
    monkeypatch.setattr(training.train, "available_bytes", lambda mesh: 10_000)
    assert training.measure("x bf16", 10)["kernels"] == counts
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    training.measure("x bf16", 10)
    monkeypatch.setattr(Compiled, "as_text", lambda self: TEXT.replace("cudnn", "other"))
    with pytest.raises(AssertionError, match="runs at 1 tok/s, but without cudnn"):
        training.measure("x bf16", 10)


def test_kernels_of_a_trace(load, tmp_path, monkeypatch):
    trace = load("gpu_check_trace")
    x = jnp.linspace(0.0, 1.0, 2**18).reshape(512, 512)
    double = jax.jit(lambda x: jnp.sort(x @ x))
    kernels = trace.top_kernels(trace.trace(lambda: double(x), tmp_path / "trace"))
    by_name = {kernel.name: kernel for kernel in kernels}
    assert by_name["sort"].calls == 2  # of two steps; the one before them is not traced
    assert kernels == sorted(kernels, key=lambda kernel: -kernel.ms)
    assert sum(kernel.share for kernel in kernels) == pytest.approx(1)
    for most, kept in ((2**30, {"gz", "pb"}), (1, {"gz"})):  # xplane.pb is the larger one
        monkeypatch.setattr(trace, "MAX_BYTES", most)
        trace.archive(tmp_path / "trace", tmp_path / "out" / "trace.tar.gz")
        with tarfile.open(tmp_path / "out" / "trace.tar.gz") as tar:
            assert {name.rsplit(".")[-1] for name in tar.getnames()} == kept


def test_kernels_of_a_gpus_trace(load, tmp_path):
    """Streams count, XLA's lines about the same time do not; what is inside is told apart."""
    trace = load("gpu_check_trace")

    def named(kind: str, name: str, **where):
        return {"ph": "M", "name": f"{kind}_name", "args": {"name": name}, **where}

    def span(name: str, tid: int, ts: float, dur: float, pid: int = 1):
        return dict(ph="X", name=name, pid=pid, tid=tid, ts=ts, dur=dur, args={"hlo_op": name})

    events = [
        named("process", "/device:GPU:0", pid=1),
        named("process", "/host:CPU", pid=2),
        named("thread", "Stream #13(Compute)", pid=1, tid=1),
        named("thread", "XLA Ops", pid=1, tid=2),
        span("gemm_1", 1, 0, 6_000),
        span("gemm_2", 1, 6_000, 2_000),
        span("outer", 1, 10_000, 2_000),
        span("inner.3", 1, 10_500, 500),
        span("gemm_1", 2, 0, 6_000),
        span("host", 1, 0, 9_000, pid=2),
    ]
    file = tmp_path / "perfetto_trace.json.gz"
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": events}, text)
    found = trace.top_kernels(file)
    assert found == [("gemm", 2, 8.0, 0.8), ("outer", 1, 1.5, 0.15), ("inner", 1, 0.5, 0.05)]
    lines = trace.table(found, most=1).splitlines()
    assert lines[1].split() == ["gemm", "2", "8.00", "80.0%"]
    assert lines[2].split() == ["all", "4", "10.00", "100.0%"]


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
    assert "\nquick  1.00 " in done.stdout
    assert "b: the time was up in the middle of it" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["a"] == "ok"


def test_measuring_without_the_data_libraries(tmp_path):
    parts = ("tiled loss", "tiny float32", "optimizer")
    done = check("", "--secs=0", f"--out={tmp_path}", "--parts", *parts)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert {end for name, end in found["parts"].items() if "Triton" not in name} == {"ok"}
    assert list(found["parts"])[:2] == ["right: tiled loss", "train step tiny float32"]
    rows = {row["what"]: row for row in found["rows"]}
    step = rows["train step tiny float32"]
    assert step["of ceiling"] == pytest.approx(step["work"] / found["ceilings"]["bf16"])
    assert step["detail"].startswith("1 x 8 x 64 tokens, ")
    muon_ms = found["results"]["optimizer"]["ms"]["muon"]
    assert rows["Muon tiny"]["value"] == pytest.approx(100 * muon_ms / step["ms"])
    with gzip.open(tmp_path / "tiny_float32.hlo.gz", "rt") as text:
        assert text.read().startswith("HloModule jit_train_step")
    assert found["machine"]["platform"] == "cpu"


@pytest.mark.long
def test_all_of_it_on_the_tiny_shape(tmp_path):
    done = check("", "--secs=0", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    skipped = [name for name, end in found["parts"].items() if end != "ok"]
    steps = ["gpt2 float32", "gpt2 fp8", "tiny float32, no Triton"]
    assert skipped == [f"train step {step}" for step in steps]
    files = {"results.json", "tiny_float32.hlo.gz", "tiny_fp8.hlo.gz", "trace.tar.gz"}
    assert {file.name for file in tmp_path.iterdir()} == files
    losses = found["results"]["right: bf16 and fp8 losses"]
    assert 0 < losses["bfloat16"] < losses["fp8"] < 0.03
    rows = [row["what"] for row in found["rows"]]
    assert len([what for what in rows if what.startswith(("attn", "mlp", "head"))]) == 8
    assert len(done.stdout[done.stdout.index("kernel, in 2 steps") :]) < 12_000
