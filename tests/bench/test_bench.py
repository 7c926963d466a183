"""Benchmarks measure what the recipes train, time fairly, and tell a program's faults."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.config import CONFIGS
from nanochat_jax.model.accounting import param_counts
from scripts.bench import common, kernels, train
from scripts.bench.common import Form


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


def test_what_does_not_fit_is_compiled_and_not_run():
    one = jnp.ones(())
    forms = {
        "small": Form(lambda x: x + 1, (one,), work=8, limit="copy"),
        "large": Form(lambda x: jnp.broadcast_to(x, (2**45,)), (one,)),
    }
    small, large = common.measure(forms, 0)
    assert small["rate"] == pytest.approx(8e3 / small["ms"]) and small["unit"] == "TB/s"
    assert large["mib"] >= 4 * 2**25 and "ms" not in large


@pytest.mark.parametrize("window", [None, 3, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    distance = np.arange(16)[:, None] - np.arange(16)
    visible = (distance >= 0) & (distance <= (16 if window is None else window))
    assert kernels.visible_pairs(16, window) == visible.sum()


@pytest.mark.slow
def test_a_step_that_does_not_fit_gets_smaller_microbatches(tiny):
    whole = common.Training(tiny)
    fitting = common.compile_fitting(tiny, whole.bytes - 1)
    assert (fitting.shape.rows, fitting.shape.accumulate) == (tiny.rows // 2, 2)
    losses = [[step.start().first_loss, float(step())] for step in (whole, fitting)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    with pytest.raises(UserError, match="--remat"):
        common.compile_fitting(replace(tiny, rows=1), 0)


# Takes tokens of a step and its last loss; notes each step, and that it was told to end.
FAKE = """
import json, sys
shape = json.loads(sys.stdin.readline())
print(json.dumps({"name": shape["name"], "tokens": int(sys.argv[2]), "loss": 3.5}), flush=True)
with open(sys.argv[1], "a") as notes:
    for _ in sys.stdin:
        print("step", file=notes)
        print(json.dumps({"loss": float(sys.argv[3])}), flush=True)
    print("end", file=notes)
"""


def command(program: str, *arguments) -> str:
    return shlex.join([sys.executable, "-c", program, *map(str, arguments)])


def test_a_program_takes_turns_with_ours_and_is_told_to_end(tiny, tmp_path):
    notes = tmp_path / "notes"
    with train.beside(command(FAKE, notes, 512, 1.0), tiny) as program:
        (row,) = train.run(tiny, {"it": program}, 0)
    assert notes.read_text().split() == ["step"] * 4 + ["end"]
    assert row["value"] == pytest.approx(512 / row["ms"] * 1e3)


@pytest.mark.parametrize("tokens, loss", [(512, 3.5), (512, 4.0), (512, "nan"), (10, 1.0)])
def test_a_step_that_does_not_learn_or_has_another_size_has_no_speed(tiny, tmp_path, tokens, loss):
    with pytest.raises(UserError):
        with train.beside(command(FAKE, tmp_path / "notes", tokens, loss), tiny) as program:
            train.run(tiny, {"it": program}, 0)


SAY = "import json; print(json.dumps({'tokens': 512, 'loss': 2.0}), flush=True); input();"


@pytest.mark.parametrize(
    "wrong, told",
    [
        (command(SAY + "raise SystemExit(4)"), "status 4"),
        (command("print('compiling'); input()"), "compiling"),
        (command(SAY + "print('{}'); input()"), "{}"),
        ("/nowhere/program --x", "/nowhere/program"),
        ("'unclosed", "unclosed"),
    ],
)
def test_a_program_that_fails_is_told(tiny, wrong, told):
    with pytest.raises(UserError, match=told):
        with train.beside(wrong, tiny) as running:
            running()


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
