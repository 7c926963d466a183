"""Another program's training step, measured in turn with ours.

The program is started once and speaks one JSON object a line on its standard output:

  it, when it is ready         {"name": ..., "tokens": of a step, "loss": the first, anything else}
  we, on its standard input    N
  it, after N steps            {"secs": of these steps, the device waited for, "loss": the last}
  we                           close its standard input: it ends

It computes only when asked, and we wait for its answer: the machine works for one side at a time.
What it has to tell people goes to its standard error.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanochat_jax.common import UserError

STOP_SECS = 30  # that a program may take to end


class Program:
    """A running program; `about` is what it said of itself."""

    def __init__(self, command: str, process: subprocess.Popen[str]):
        assert process.stdin and process.stdout
        self.command, self.process = command, process
        self.asks, self.answers = process.stdin, process.stdout
        self.about = self._answer("name", "tokens", "loss")
        self.loss = self.about["loss"]  # of the last step

    def secs(self, steps: int) -> float:
        """Seconds that so many of its steps take, by its own clock."""
        try:
            os.write(self.asks.fileno(), f"{steps}\n".encode())  # past Python's buffer
        except BrokenPipeError:
            pass  # it has ended; its missing answer says so
        answer = self._answer("secs", "loss")
        self.loss = answer["loss"]
        return float(answer["secs"])

    def _answer(self, *keys: str) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            status = self.process.wait(STOP_SECS)
            raise UserError(
                f"--beside: the program ended with status {status}, expected a line of JSON with "
                f"{', '.join(keys)}; run it by itself: {self.command}"
            )
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not set(keys) <= answer.keys():
            raise UserError(
                f"--beside: the program said {line.strip()[:80]!r}, expected a line of JSON with "
                f"{', '.join(keys)}; let it print all else to standard error"
            )
        return answer


@contextmanager
def beside(command: str) -> Iterator[Program]:
    """Start a program, and end it however the measurement ends."""
    try:
        words = shlex.split(command)
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"--beside got {command!r}, expected a command that can be started: {error}"
        ) from None
    with process:
        try:
            program = Program(command, process)
            yield program
            program.asks.close()
            process.wait(STOP_SECS)
        finally:
            process.kill()


def free_gpu_bytes() -> int | None:
    """What the driver says is free on the first GPU that we see; None where it does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.free", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(told.split()[0]) * 2**20  # "68123 MiB"
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
