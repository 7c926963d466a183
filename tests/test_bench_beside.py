"""Another program's steps are measured in turn with ours; its faults are told in one line."""

import importlib
import importlib.util
import json
import math
import shlex
import sys

import pytest

from nanochat_jax import bench
from nanochat_jax import config as cfg
from nanochat_jax.bench_beside import beside, free_gpu_bytes
from nanochat_jax.common import UserError

ROOT = cfg.CONFIGS.parent
# Half a second a step by its own clock; notes when it works, and that it was told to end. Takes
# where to note it, tokens of a step, and the loss that it comes to.
FAKE = """
import json, sys
def say(**message):
    print(json.dumps(message), flush=True)
def note(text):
    with open(sys.argv[1], 'a') as file:
        file.write(text)
say(name='fake', tokens=int(sys.argv[2]), loss=3.5, threads=1)
for line in sys.stdin:
    note('<' + line.strip() + '>')
    say(secs=int(line) * 0.5, loss=float(sys.argv[3]))
note('end')
"""


def command(program: str, *arguments) -> str:
    return shlex.join([sys.executable, "-c", program, *map(str, arguments)])


def load(folder: str, name: str, monkeypatch):
    """A script as a module."""
    monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module(name)


def test_a_program_takes_turns_with_ours_and_is_told_to_end(tmp_path):
    notes = tmp_path / "notes"

    def ours():
        with open(notes, "a") as file:
            file.write("(")
            file.write(")")

    with beside(command(FAKE, notes, 10, 1.0)) as program:
        assert program.about == {"name": "fake", "tokens": 10, "loss": 3.5, "threads": 1}
        assert program.loss == 3.5
        assert program.secs(3) == 1.5
        assert program.loss == 1.0
        times = bench.time_interleaved({"ours": ours, "it": program}, budget_secs=0, min_rounds=2)
    assert times["it"] == bench.Timing(0.5, 0.0, 0.5)
    warm_up = "()()" + "<1><1>"
    assert notes.read_text() == "<3>" + warm_up + "()<1>" + "<1>()" + "end"


SAY = "import json; print(json.dumps({'name': 'x', 'tokens': 1, 'loss': 2.0}), flush=True);"


@pytest.mark.parametrize(
    "program, message",
    [
        ("raise SystemExit(7)", "ended with status 7, expected a line of JSON with name"),
        (SAY + "input(); raise SystemExit(3)", "ended with status 3, expected a .* secs, loss"),
        (SAY + "raise SystemExit(4)", "ended with status 4, expected a line of JSON with secs"),
        ("print('compiling'); input()", "said 'compiling', expected a line of JSON with name"),
        ("print('[1]'); input()", "said '.1.', expected a line of JSON with name, tokens, loss"),
        (SAY + "print('{}'); input(); input()", "said '{}', expected a line of JSON with secs"),
    ],
)
def test_a_program_that_fails_is_one_clear_line(program, message):
    with pytest.raises(UserError, match=message) as caught:
        with beside(command(program)) as running:
            running.secs(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["/nowhere/program --x", "", "'unclosed"])
def test_what_cannot_be_started_is_one_clear_line(wrong):
    with pytest.raises(UserError, match="expected a command that can be started"):
        with beside(wrong):
            pass


def test_an_error_of_ours_ends_the_program_at_once():
    with pytest.raises(ZeroDivisionError):
        with beside(command(SAY + "import time; time.sleep(600)")) as program:
            raise ZeroDivisionError
    assert program.process.returncode == -9


@pytest.fixture
def beside_fake(tmp_path, monkeypatch, capsys):
    """bench_train beside FAKE: (what it printed above its last line, its result)."""
    bench_train = load("scripts", "bench_train", monkeypatch)
    monkeypatch.setattr(bench_train, "keep_freed_memory", lambda: None)  # it is for the process
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")

    def run(tokens: int, loss: float, *options: str):
        fake = command(FAKE, tmp_path / "notes", tokens, loss)
        arguments = ["x", "--shape=tiny", "--secs=0", f"--beside={fake}", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        bench_train.main()
        assert bench_train.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)["results"][0]

    run.module = bench_train
    return run


def test_bench_train_beside_a_program(beside_fake):
    lines, result = beside_fake(512, 1.0, "--device-batch=4", "--accumulate=2")
    assert lines[:2] == [
        "ours: 512 tokens a step in 2 microbatches, float32",
        "fake: 512 tokens a step in ? microbatches, dtype unknown",
    ]
    assert result["beside"]["tokens_per_sec"] == 1_024  # 512 tokens in half a second
    assert result["tokens_per_sec"] == pytest.approx(512 / result["ms"]["ours"] * 1e3)
    assert result["speedup_over_beside"] == pytest.approx(result["tokens_per_sec"] / 1_024)
    assert set(result["ms"]) == set(result["spread"]) == {"ours", "beside"}
    assert result["losses"]["beside"] == [3.5, 1.0]
    first, last = result["losses"]["ours"]
    assert first > last and first == pytest.approx(6.24, abs=0.05)  # log of 512 tokens
    assert [row.split()[:2] for row in lines[-3:]] == [
        ["shape", "step"],
        ["tiny", "ours"],
        ["tiny", "fake"],
    ]


def test_what_cannot_be_compared_is_not(beside_fake, monkeypatch):
    with pytest.raises(UserError, match="takes 10 tokens a step, ours 512, expected as many"):
        beside_fake(10, 1.0)
    with pytest.raises(UserError, match="step of beside got from loss 3.5000 to nan"):
        beside_fake(512, "nan")
    monkeypatch.setattr(beside_fake.module, "free_gpu_bytes", lambda: 1_000)
    with pytest.raises(UserError, match=r"0.0 GiB are free beside the program; halve --device-ba"):
        beside_fake(512, 1.0)
    with pytest.raises(UserError, match="--accumulate got 0, expected at least 1"):
        beside_fake(512, 1.0, "--accumulate=0")


def test_a_broken_step_has_no_speed(beside_fake):
    beside_fake.module.require_learning("ours", 3.0, 2.9)
    for first, last in ((3.0, 3.0), (3.0, 3.1), (3.0, math.nan), (math.inf, 3.0)):
        with pytest.raises(UserError, match="expected a finite and lower one"):
            beside_fake.module.require_learning("ours", first, last)


def test_free_memory_is_what_the_driver_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --id=3 ] && echo "68123 MiB"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert free_gpu_bytes() == 68_123 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert free_gpu_bytes() is None


def test_upstreams_shapes_are_ours(monkeypatch):
    driver = load("dev", "upstream_step", monkeypatch)
    for name, (variant, *dims, rows, accumulate, pattern) in driver.SHAPES.items():
        shape = bench.SHAPES[name]
        c = shape.model
        assert variant == shape.optim
        assert dims == [c.num_layers, c.model_dim, c.num_heads, c.vocab_size, c.seq_len]
        assert (rows, accumulate) == (shape.rows, shape.accumulate)
        assert pattern == c.window_pattern
        assert c.num_kv_heads == c.num_heads
