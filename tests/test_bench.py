"""Benchmarks measure what the recipes train, time fairly, and need no data libraries."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from nanochat_jax import bench, recipe
from nanochat_jax import config as cfg
from nanochat_jax.common import UserError
from scripts import bench_eval, bench_memory
from scripts.bench_memory import Measures

ROOT = cfg.CONFIGS.parent
# Modules that a machine borrowed to measure on does not have.
RUN = """
import sys
for name in ('grain', 'ml_collections', 'datasets', 'rustbpe'):
    sys.modules[name] = None
sys.path.insert(0, 'scripts')
for name in ('loss', 'attention', 'optim', 'matmul'):
    sys.argv = [name, '--shape=tiny', '--secs=0']
    __import__('bench_' + name).main()
"""


@pytest.mark.parametrize("name", ["d20", "gpt2", "demo"])
def test_shapes_are_the_recipes(name):
    config = cfg.load(cfg.CONFIGS / f"{name}.py")
    recipe.resolve(config, platform="gpu", num_devices=1)
    shape = bench.SHAPES[name]
    dtype = config.model.compute_dtype
    assert replace(shape.model, compute_dtype=dtype) == recipe.gpt_config(config)
    assert shape.optim == config.optim.recipe
    assert shape.rows == config.base.device_batch_size
    assert shape.grad_clip == config.optim.grad_clip
    if name == "d20":  # the modern recipe's batch is larger, and the comparison wants one size
        assert shape.step_tokens == config.base.total_batch_tokens
    with pytest.raises(UserError, match="shape got 'd99', expected one of d20"):
        bench.get_shape("d99")


def test_candidates_take_turns():
    calls = []
    times = bench.time_interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, budget_secs=0, min_rounds=4
    )
    warm_up, timed = calls[:6], calls[6:]
    assert "".join(warm_up) == "aabbcc"
    assert "".join(timed) == "abc" + "bca" + "cab" + "abc"
    assert set(times) == set("abc")


def test_the_median_and_the_spread_of_times():
    assert bench._summary([3.0, 1.0, 2.0, 5.0, 4.0]) == bench.Timing(3.0, 0.5, 1.0)


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda mesh: 2**20)
    small, large = jax.ShapeDtypeStruct((2, 2), "float32"), 2**20

    def sums(size):
        return lambda x: (x[0, 0] + jax.lax.iota("float32", size)).sort()[::-1].sort()

    calls, needed = bench.compile_all({"small": sums(8), "large": sums(large)}, small)
    assert list(calls) == ["small"] and needed["large"] > 4 * large > needed["small"]


def test_columns_are_aligned():
    text = bench.table(("what", "ms"), [("a", "1.0"), ("long one", "10.0")])
    assert text.split("\n") == ["what        ms", "a          1.0", "long one  10.0"]


def test_benchmarks_need_no_data_libraries():
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["bench"] for result in found] == ["loss", "attention", "optim", "matmul"]
    (loss,), (attention,), (optim,), (matmul,) = (result["results"] for result in found)
    # The same number however it is computed; smaller tiles need less memory.
    assert all(abs(value - loss["loss"]["naive"]) < 1e-5 for value in loss["loss"].values())
    assert loss["bytes"]["tile 128"] < loss["bytes"]["tile 512"] < loss["bytes"]["naive"]
    assert {"naive", attention["backend"]} <= set(attention["windows"]["quarter"]["ms"])
    assert optim["bytes"]["both"] > max(optim["bytes"]["muon"], optim["bytes"]["adamw"])
    # Tokens of two layers, each of 8 rows of 64: four 32x32 and two 32x128 matrices orthogonalised.
    muon_flops = 2 * (4 * 5 * 6 * 32**3 + 2 * 5 * (4 * 32**2 * 128 + 2 * 32**3))
    batch_flops = 512 * (6 * (2 * 12 * 32**2 + 32 * 512) + 2 * 12 * 32 * 64)
    assert optim["muon_share_of_flops"] == pytest.approx(muon_flops / batch_flops)
    for product in matmul["products"]:  # three products of equal size, in two types
        flops = 2 * math.prod(product["size"])
        for kind in ("bf16", "fp8"):
            for form in ("y", "dx", "dw"):
                secs = product["ms"][kind][form] / 1e3
                assert product["tflops"][kind][form] * 1e12 == pytest.approx(flops / secs)
    sizes = [product["size"] for product in matmul["products"]]
    assert sizes == [[512, 32, 32], [512, 32, 128], [512, 128, 32], [512, 32, 512]]
    assert set(found[-1]["ceilings"]) == {"bf16", "fp8", "copy"}


@pytest.mark.parametrize("num_wrong, status", [(0, 0), (1, 0), (2, 1)])
def test_batched_answers_must_be_those_of_one_by_one(num_wrong, status, monkeypatch, capsys):
    def say(engine, tokenizer, task, *, max_new_tokens):
        wrong = num_wrong if engine.slots == 1 else 0  # the last ones, which no example shows
        task.grade([(i, "b" if i >= len(task) - wrong else "a") for i in range(len(task))])

    monkeypatch.setattr(bench_eval, "generative", say)
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--shape=tiny", "--problems=50"])
    assert bench_eval.main() == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_differ"] == num_wrong


def test_no_more_problems_than_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--problems=1001"])
    with pytest.raises(UserError, match="--problems got 1001, expected 1 to 1000 of arithmetic"):
        bench_eval.main()


@pytest.mark.slow
def test_what_each_measure_saves():
    """Against counts by hand: 512 tokens in 8 rows, two layers of width 32 with two heads."""
    shape = bench.SHAPES["tiny"]
    wanted = {
        "first": Measures(),
        "kept": Measures(attention="naive"),
        "logits": Measures(loss="naive"),
        "names": Measures(remat="names"),
        "full": Measures(remat="full"),
        "shared": Measures(devices=2),
        "held": Measures(donated=False),
    }
    found = {name: bench_memory.measure(shape, m) for name, m in wanted.items()}
    saved = {name: numbers["saved"] for name, numbers in found.items()}
    assert saved["shared"] == saved["held"] == saved["first"]
    # Scores, their softmax and more: at least a float32 for each pair of tokens and head.
    assert saved["kept"] - saved["first"] >= 2 * 8 * 2 * 64 * 64 * 4
    assert saved["logits"] - saved["first"] >= 512 * 512 * 4
    # bfloat16 values of a token: 10 x 32 a layer, against 1 x 32.
    assert saved["names"] - saved["full"] == pytest.approx(2 * 9 * 512 * 32 * 2, rel=0.02)
    peak = {name: numbers["peak"] for name, numbers in found.items()}
    assert peak["full"] < peak["names"] < peak["first"] < peak["kept"]
    state = {name: numbers["state"] for name, numbers in found.items()}
    assert state["shared"] == pytest.approx(state["first"] / 2, rel=0.01)
    assert "fp8" in bench_memory.variants(8) and len(bench_memory.variants(8)) == 11
