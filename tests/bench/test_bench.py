"""Benchmarks measure what the recipes train, time fairly, and lose nothing when a part fails."""

import json
import os
import subprocess
import sys
import threading

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.config import CONFIGS
from nanochat_jax.model.accounting import param_counts
from scripts import gpu_check
from scripts.bench import common, train
from scripts.gpu_check import Part, Results


@pytest.fixture(scope="module")
def tiny():
    return common.load_shape("tiny")


@pytest.mark.parametrize(
    "name, params, rows, accumulate",
    [("d20", 560_988_160, 32, 8), ("gpt2", 1_384_122_122, 16, 16), ("d4", 5_242_880, 16, 1)],
)
def test_shapes_are_the_recipes_with_upstreams_batch(name, params, rows, accumulate):
    shape = common.load_shape(name, "gpu")
    assert param_counts(shape.model)["total"] == params
    assert (shape.rows, shape.accumulate) == (rows, accumulate)
    assert shape.model.compute_dtype == shape.optim.ns_dtype == "bfloat16"


def test_candidates_take_turns():
    calls = []
    times = common.turns({n: lambda n=n: calls.append(n) for n in "abc"}, 0, min_rounds=4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # first to warm up
    assert times["a"]["times_first"] == 1 and times["b"]["best_ms"] <= times["b"]["ms"]


class Step:
    """A step whose losses are written down."""

    bytes, first_loss = 0, 3.5

    def __init__(self, shape, loss):
        self.shape, self.loss = shape, loss

    def __call__(self):
        pass


def test_a_step_that_does_not_learn_has_no_speed(tiny):
    (row,) = train.run(tiny, {"it": Step(tiny, 1.0)}, 0)
    assert row["value"] == pytest.approx(tiny.step_tokens / row["ms"] * 1e3)
    for loss in (3.5, float("nan")):
        with pytest.raises(UserError):
            train.run(tiny, {"it": Step(tiny, loss)}, 0)


TINY = "--shape=tiny --secs=0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options",
    [
        ("kernels", f"attention loss optimizer matmul {TINY}"),
        ("train", f"--fp8 {TINY}"),
        ("data", "--config=configs/tiny.py --config.tokenizer.vocab_size=300 --tokens=4000"),
        pytest.param("infer", f"--texts 1 2 {TINY}", marks=pytest.mark.long),
        pytest.param("memory", "--shape=tiny --devices=2", marks=pytest.mark.long),
    ],
)
def test_every_benchmark_ends_with_a_line_of_json(script, options):
    command = [sys.executable, f"scripts/bench/{script}.py", *options.split()]
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUMPY_DTYPE_PROMOTION"}  # as users do
    done = subprocess.run(command, cwd=CONFIGS.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert min(row.get("ms") or row.get("mib") or row["value"] for row in rows) > 0
    if script == "memory":
        mib = {row["what"]: row["mib"] for row in rows}
        assert mib["remat full"] < mib["tiled loss, bfloat16"] < mib["all logits at once"]


def test_parts_that_fail_hide_no_other(tmp_path, capsys):
    results, seen, file = Results(tmp_path), [], tmp_path / "results.json"

    def fail(*_):
        seen.append(json.loads(file.read_text())["parts"])  # what a kill now would leave
        raise RuntimeError("out of luck")

    parts = [
        Part("first", lambda _: [{"what": "d20 a token, 1 at once", "value": 3_000}]),
        Part("bad", fail),
        Part("not compiled", lambda step: [], fail),
        Part("last", lambda given: [{"what": given}], lambda: "b"),
    ]
    gpu_check.run_parts(parts, results, 60)
    assert set(seen[-1]) == {"first", "bad"}
    assert list(results.parts.values()) == ["ok", "FAILED", "FAILED", "ok"]
    first, last = json.loads(file.read_text())["rows"]
    assert first["of_target"] == 2.0 and last["what"] == "b"
    assert "RuntimeError: out of luck" in capsys.readouterr().err


def test_nothing_is_timed_while_others_compile():
    results, compiled = Results(None), threading.Event()
    parts = [
        Part("right: a", lambda _: compiled.set() or []),  # checks do not wait
        Part("b", lambda _: [{"what": str(compiled.is_set())}]),
        Part("c", lambda _: [], compiled.wait),
    ]
    gpu_check.run_parts(parts, results, 60)
    assert set(results.parts.values()) == {"ok"} and results.rows[0]["what"] == "True"


BARE = """
import sys
for name in ("grain", "ml_collections", "datasets", "rustbpe", "torch"):
    sys.modules[name] = None
from scripts import gpu_check
from scripts.bench import common, infer, kernels, memory, train
"""


def check(program: str, *arguments: str) -> str:
    """What a program prints on a machine without the data libraries."""
    program = f"{BARE}sys.argv = ['gpu_check.py', *{arguments}]\n{program}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shapes_are_the_same_without_the_data_libraries():
    said = check("print([common.load_shape(n, 'gpu') for n in common.SHAPES])")
    assert said.strip() == str([common.load_shape(n, "gpu") for n in common.SHAPES])


@pytest.mark.long
def test_all_of_it_on_the_tiny_shape(tmp_path):
    check("gpu_check.main()", "--secs=0", f"--out={tmp_path}")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["parts"].values()) == {"ok"}
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "profile"}
    values = {row["what"]: row.get("value") for row in found["rows"]}
    assert 0 < values["right: bf16 losses"] < values["right: fp8 losses"] < 30
