"""Another program's steps are measured in turn with ours; its faults are told in one line."""

import importlib
import importlib.util
import json
import shlex
import sys

import pytest

from nanochat_jax import bench
from nanochat_jax import config as cfg
from nanochat_jax.bench_beside import beside
from nanochat_jax.common import UserError

ROOT = cfg.CONFIGS.parent
# Half a second a step by its own clock; notes when it works, and that it was told to end.
FAKE = """
import json, sys
def say(**message):
    print(json.dumps(message), flush=True)
def note(text):
    with open(sys.argv[1], 'a') as file:
        file.write(text)
say(name='fake', tokens=10, loss=3.5, threads=1)
for line in sys.stdin:
    note('<' + line.strip() + '>')
    say(secs=int(line) * 0.5, loss=1.0)
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

    with beside(command(FAKE, notes)) as program:
        assert program.about == {"name": "fake", "tokens": 10, "loss": 3.5, "threads": 1}
        assert program.secs(3) == 1.5
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


def test_bench_train_beside_a_program(tmp_path, monkeypatch, capsys):
    bench_train = load("scripts", "bench_train", monkeypatch)
    monkeypatch.setattr(bench_train, "keep_freed_memory", lambda: None)  # it is for the process
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    fake = command(FAKE, tmp_path / "notes")
    monkeypatch.setattr(sys, "argv", ["x", "--shape=tiny", "--secs=0", f"--beside={fake}"])
    bench_train.main()
    assert bench_train.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    *rows, line = capsys.readouterr().out.splitlines()
    (result,) = json.loads(line)["results"]
    assert result["beside"]["tokens_per_sec"] == 20  # 10 tokens in half a second
    assert result["speedup_over_beside"] == pytest.approx(result["tokens_per_sec"] / 20)
    assert set(result["ms"]) == set(result["spread"]) == {"ours", "beside"}
    assert [row.split()[:2] for row in rows] == [
        ["shape", "step"],
        ["tiny", "ours"],
        ["tiny", "fake"],
    ]


def test_upstreams_shapes_are_ours(monkeypatch):
    driver = load("dev", "upstream_step", monkeypatch)
    for name, (variant, *dims, rows, pattern) in driver.SHAPES.items():
        shape = bench.SHAPES[name]
        c = shape.model
        assert variant == shape.optim
        assert dims == [c.num_layers, c.model_dim, c.num_heads, c.vocab_size, c.seq_len]
        assert (rows, pattern) == (shape.rows, c.window_pattern)
        assert c.num_kv_heads == c.num_heads
