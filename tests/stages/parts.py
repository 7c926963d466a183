"""What the tests of stages share: stages that are interrupted, runs as they look on disk."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax

from nanochat_jax import config as cfg
from nanochat_jax.common import run_dir
from nanochat_jax.train import checkpoint as ck

ROOT = cfg.CONFIGS.parent
OUT = "RESOURCE_EXHAUSTED: Out of memory allocating 1600 bytes."


def with_overrides(keys: dict, overrides: dict) -> dict[str, str]:
    """Keys of a recipe as a command line has them; section__key in overrides is section.key."""
    keys = keys | {name.replace("__", "."): value for name, value in overrides.items()}
    return {name: str(value) for name, value in keys.items()}


class Anything:
    """Stands for an array; whoever touches it runs out of memory."""

    def __len__(self):
        raise jax.errors.JaxRuntimeError(OUT)


def power_cut(batch):
    raise RuntimeError("power cut")


def sends(signum: int):
    def send(batch):
        os.kill(os.getpid(), signum)

    return send


def runs_out(batch) -> dict:
    """The batch's way to the devices, within the step, runs out of memory."""
    return batch | {"inputs": Anything()}


def interrupted(kind: type, at: dict):
    """A stage like `kind` that does at[n] with the n-th batch (from 1) before it trains on it."""
    seen = []

    class Interrupted(kind):
        def next_batch(self, params):
            batch = super().next_batch(params)
            seen.append(1)
            return at[len(seen)](batch) or batch if len(seen) in at else batch

    return Interrupted


def lines(name: str, stage: str = "base") -> list[dict]:
    """metrics.jsonl without the clock."""
    raw = (run_dir(name) / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_secs")} for line in raw]


def losses(name: str, stage: str) -> list[float]:
    return [line["loss"] for line in lines(name, stage) if line["kind"] == "train"]


def last_params(name: str, stage: str = "base") -> dict[str, jax.Array]:
    folder = run_dir(name) / stage / "checkpoints"
    return ck.restore_params(folder, ck.list_steps(folder)[-1])


def assert_same(name: str, other: str, stage: str = "base") -> None:
    """To the last bit, what was said and what was learned."""
    assert lines(name, stage) == lines(other, stage)
    assert ck.digest(last_params(name, stage)) == ck.digest(last_params(other, stage))


class Script:
    """A stage's script in a process of its own, its output in a file.

    program: Python to run before the script, in the same process.
    """

    def __init__(self, script: str, keys: dict[str, str], env: dict[str, str], program: str = ""):
        path = str(ROOT / "scripts" / script)
        program += f"\nimport runpy; runpy.run_path({path!r}, run_name='__main__')"
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        self.output = run_dir(f"{time.time_ns()}.log")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, f"--config={cfg.CONFIGS / 'tiny.py'}", *words],
                env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def succeeds(self) -> str:
        assert self.process.wait(300) == 0, self.output.read_text()
        return self.output.read_text()


def kill_three_times(start, metrics: Path, steps: range) -> None:
    """Start a script three times, and kill it when its metrics have so many lines."""
    goals = sorted(random.Random(seed := time.time_ns()).sample(steps, 3))
    print(f"killed after {goals} lines, seed {seed}")  # shown when the test fails
    for goal in goals:
        run = start().process
        while run.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= goal:
                run.kill()
            time.sleep(0.001)
