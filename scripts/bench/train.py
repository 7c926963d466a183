"""The speed of a training step, in turn with the naive loss; one JSON line last.

  python scripts/bench/train.py                        shapes that suit this machine
  python scripts/bench/train.py --shape=d20 --fp8      all matrices in fp8 (Hopper and later)

A step is an optimizer step of --accumulate microbatches of --device-batch rows: on a GPU as many as
make upstream's batch, on a CPU one. What does not fit into memory gets smaller microbatches. The
batch is always the same, so a step whose loss does not fall is broken, which is an error. With the
naive cross entropy, which holds all logits, the step is otherwise the same. dev/upstream_step.py
measures upstream's step in turn with ours.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def run(shape: Shape, steps: Mapping[str, Any], secs: float) -> list[dict]:
    """A row for each, in turn; they have been started and take as many tokens a step as `shape`.

    A step is a Training or has what is used of it here.
    """
    times, rows = common.turns(steps, secs, min_rounds=3), []
    work = shape.step_tokens * train_flops_per_token(shape.model)
    for name, step in steps.items():
        s, first, last, ms = step.shape, step.first_loss, float(step.loss), times[name]["ms"]
        note = f"{s.accumulate} x {s.rows} x {s.model.seq_len:,} tokens, "
        note += f"loss {first:.4f} to {last:.4f}"
        if not last < first < float("inf"):  # a loss that is no number fails as well
            raise UserError(f"{name}: {note}, expected finite and lower; its step is broken")
        row = {"what": name} | times[name] | common.reached(work, ms, "bf16")
        row |= {"value": 1e3 * shape.step_tokens / ms, "unit": "tok/s"}
        rows.append(row | {"mib": step.bytes / 2**20 or None, "note": note})
    return rows


def compare(shape: Shape, secs: float) -> list[dict]:
    ours = common.compile_fitting(shape, common.free_bytes()).start()
    steps = {f"{shape.name} ours": ours}
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


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = common.parser(doc, secs=20.0)
    made.add_argument("--device-batch", type=int, help="rows at once, at most")
    made.add_argument("--accumulate", type=int, help="microbatches of a step")
    made.add_argument("--remat", choices=REMAT, default="none")
    made.add_argument("--fp8", action="store_true", help=f"in {', '.join(fp8.LAYERS)}")
    return made


def start(args: argparse.Namespace) -> list[Shape]:
    """Start JAX; the shapes that the command line asks for."""
    log(start_runtime(compile_cache=False))
    if args.fp8 and jax.default_backend() != "cpu":  # a CPU computes the same, slowly
        hardware.check_fp8(jax.devices()[0], "bfloat16")
    shapes = [changed(s, remat=args.remat, in_fp8=args.fp8) for s in common.chosen_shapes(args)]
    rows, accumulate = args.device_batch, args.accumulate
    return [replace(s, rows=rows or s.rows, accumulate=accumulate or s.accumulate) for s in shapes]


def main() -> None:
    args = parser(__doc__).parse_args()
    common.finish("train", sum((compare(shape, args.secs) for shape in start(args)), []))


if __name__ == "__main__":
    run_main(main)
