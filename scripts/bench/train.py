"""The speed of a training step, in turn with the naive loss or another program; one JSON line last.

  python scripts/bench/train.py                        shapes that suit this machine
  python scripts/bench/train.py --shape=d20 --fp8      all matrices in fp8 (Hopper and later)
  python scripts/bench/train.py --shape=d4 --beside="COMMAND"

A step is an optimizer step of --accumulate microbatches of --device-batch rows: on a GPU as many as
make upstream's batch, on a CPU one. What does not fit into memory gets smaller microbatches. The
batch is always the same, so a step whose loss does not fall is broken, which is an error.

By default the same step with the naive cross entropy, which holds all logits, takes turns with
ours. --beside measures another program's step instead (dev/upstream_step.py is one). It is started
once and speaks lines of JSON; what else it prints goes to its standard error:
  we, on its standard input    {"platform": "cpu" or "gpu", "model": ..., "rows": ..., ...}: Shape
  it, on its standard output   {"name": ..., "tokens": of a step, "loss": of its first, ...}
  we                           {}: take a step
  it, when the device is done  {"loss": of this step}
  we close its standard input, and it ends.
"""

import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax import hardware
from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model import fp8
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.gpt import REMAT
from nanochat_jax.model.loss import cross_entropy_naive
from scripts.bench import common
from scripts.bench.common import Shape, Training

STOP_SECS = 30  # that a program may take to end


class Program:
    """Another program's training; a call takes a step. `about` is what it said about itself."""

    def __init__(self, command: str, process: subprocess.Popen[str], shape: Shape):
        self.command, self.process = command, process
        self.about = self._ask(asdict(shape) | {"platform": jax.default_backend()})
        self.first_loss = self.loss
        if self.about.get("tokens") != shape.step_tokens:
            raise UserError(
                f"--beside: the program takes {self.about.get('tokens')} tokens a step, ours "
                f"{shape.step_tokens}; set --device-batch and --accumulate"
            )

    def __call__(self) -> None:
        self._ask({})

    def _ask(self, question: dict) -> dict:
        assert self.process.stdin and self.process.stdout
        line = ""
        try:  # past Python's buffer, which would complain again when it is closed
            os.write(self.process.stdin.fileno(), f"{json.dumps(question)}\n".encode())
            line = self.process.stdout.readline()
            answer = json.loads(line)
            self.loss = float(answer["loss"])
        except (BrokenPipeError, ValueError, TypeError, KeyError):
            end = "" if line else f" and ended with status {self.process.wait(STOP_SECS)}"
            said = f"--beside: {self.command} said {line.strip()[:80]!r}{end}"
            raise UserError(f"{said}; expected a line of JSON with its loss") from None
        return answer


@contextmanager
def beside(command: str, shape: Shape):
    """Start a program, and end it however the measurement ends."""
    try:
        words = shlex.split(command)
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except (OSError, ValueError, IndexError) as error:
        expected = "expected a command that can be started"
        raise UserError(f"--beside got {command!r}, {expected}: {error}") from None
    with process:
        try:
            yield Program(command, process, shape)
            assert process.stdin
            process.stdin.close()
            process.wait(STOP_SECS)
        finally:
            process.kill()


def run(shape: Shape, steps: dict[str, Training | Program], secs: float) -> list[dict]:
    """A row for each, in turn; they have been started and take as many tokens a step as `shape`."""
    times, rows = common.turns(steps, secs, min_rounds=3), []
    work = shape.step_tokens * train_flops_per_token(shape.model)
    for name, step in steps.items():
        first, last, ms = step.first_loss, float(step.loss), times[name]["ms"]
        note = f"loss {first:.4f} to {last:.4f}"
        if not last < first < float("inf"):  # a loss that is no number fails as well
            raise UserError(f"{name}: {note}, expected finite and lower; its step is broken")
        row = {"what": name} | times[name] | common.reached(work, ms, "bf16")
        row |= {"value": 1e3 * shape.step_tokens / ms, "unit": "tok/s", "note": note}
        if isinstance(step, Training):
            s, row["mib"] = step.shape, step.bytes / 2**20
            row["note"] = f"{s.accumulate} x {s.rows} x {s.model.seq_len:,} tokens, {note}"
        rows.append(row)
    return rows


def compare(shape: Shape, secs: float, program: Program | None) -> list[dict]:
    ours = common.compile_fitting(shape, common.free_bytes()).start()
    steps: dict[str, Training | Program] = {f"{shape.name} ours": ours}
    if program:
        steps[f"{shape.name} {program.about.get('name', 'other')}"] = program
        return run(shape, steps, secs)
    naive = Training(ours.shape, loss_sum=naive_sum)
    if naive.bytes < common.free_bytes():
        steps[f"{shape.name} naive loss"] = naive.start()
    return run(shape, steps, secs)


def naive_sum(x, head, targets, weights, vocab_size: int, tile: int):
    """The same loss by its definition, left to automatic differentiation; its head not in fp8."""
    head = head.kernel if isinstance(head, fp8.Weight) else head
    return (cross_entropy_naive(x, head, targets, vocab_size) * weights).sum()


def changed(shape: Shape, *, remat: str = "none", in_fp8: bool = False) -> Shape:
    layers = tuple(fp8.LAYERS) if in_fp8 else ()
    return replace(shape, model=replace(shape.model, remat=remat, fp8_layers=layers))


def main() -> None:
    parser = common.parser(__doc__, secs=20.0)
    parser.add_argument("--device-batch", type=int, help="rows at once, at most")
    parser.add_argument("--accumulate", type=int, help="microbatches of a step")
    parser.add_argument("--remat", choices=REMAT, default="none")
    parser.add_argument("--fp8", action="store_true", help=f"in {', '.join(fp8.LAYERS)}")
    parser.add_argument("--beside", metavar="COMMAND", help="another program's step, in turn")
    args = parser.parse_args()
    if args.beside:  # the other program needs memory of the same GPU
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    log(start_runtime(compile_cache=False))
    if args.fp8 and jax.default_backend() != "cpu":  # a CPU computes the same, slowly
        hardware.check_fp8(jax.devices()[0], "bfloat16")
    rows, programs = [], []
    for shape in common.chosen_shapes(args):
        shape = changed(shape, remat=args.remat, in_fp8=args.fp8)
        sizes = args.device_batch or shape.rows, args.accumulate or shape.accumulate
        shape = replace(shape, rows=sizes[0], accumulate=sizes[1])
        if not args.beside:
            rows += compare(shape, args.secs, None)
            continue
        with beside(args.beside, shape) as program:
            rows += compare(shape, args.secs, program)
            programs.append(program.about)
    common.finish("train", rows, programs=programs)


if __name__ == "__main__":
    run_main(main)
