"""Speed of the training step, and what the tiled cross entropy gives; one JSON line last.

  python scripts/bench_train.py                        shapes that suit this machine
  python scripts/bench_train.py --shape=demo --secs=30
  python scripts/bench_train.py --shape=d20 --fp8      all matrices in fp8 (Hopper and later)
  python scripts/bench_train.py --shape=d20 --device-batch=16 --accumulate=16
  python scripts/bench_train.py --shape=d4 --beside="COMMAND"

A step is an optimizer step, --accumulate microbatches of --device-batch rows: on a GPU as many as
make upstream's batch, on a CPU one. Its batch is random and always the same, so it is learnt by
heart: a step whose loss does not fall is broken, and its speed is not told.

Ours against the same step with the naive cross entropy, which holds all logits; both take turns in
one run. Also the forward pass alone, and the bytes each step needs by the compiler's own analysis:
a step that does not fit is not run.

--beside measures another program's training step instead, in turn with ours and never at the same
time; both must take as many tokens a step, each in microbatches of its own. dev/upstream_step.py is
one, for upstream; any program will do that follows this protocol:
  it is started once and prints a line of JSON when it is ready
      {"name": ..., "tokens": of a step, "loss": of its first step, ... whatever describes it}
      "dtype" and "microbatches" are shown
  for every line N on its standard input it takes N steps, waits for the device, and prints
      {"secs": of these N steps, "loss": of the last}
  at the end of its input it ends. All else that it prints goes to standard error.
"""

import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import jax
import jax.numpy as jnp

from nanochat_jax import bench, hardware
from nanochat_jax.bench_beside import Program, beside, free_gpu_bytes
from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.launch.runtime import (
    available_bytes,
    compile_lowered,
    compiled_bytes,
    keep_freed_memory,
    take_memory,
)
from nanochat_jax.model import fp8
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.gpt import REMAT, bind, init_params
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.train import step as step_module
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch


def run(
    shape: bench.Shape, secs: float, *, rivals: bool, program: Program | None = None, compiled=None
) -> dict:
    """Numbers of one shape on the first device.

    rivals: also the step with the naive loss, and the forward pass. program: in turn with ours.
    compiled: our step, where it has been compiled before (lower_step).
    """
    if program:
        agree(shape, program)
    mesh = bench.one_device()
    compiled_steps = {"ours": compiled or compile_lowered(lower_step(shape))}
    if rivals:
        compiled_steps["naive"] = compile_lowered(lower_step(shape, "naive"))
    available = available_bytes(mesh)
    if program:  # it holds memory of the same GPU
        available = min(available, free_gpu_bytes() or available)
    memory = {loss: compiled_bytes(step) for loss, step in compiled_steps.items()}
    if memory["ours"] > available:
        raise UserError(
            f"the step needs {memory['ours'] / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are "
            f"free{' beside the program' if program else ''}; halve --device-batch (now "
            f"{shape.rows}) and double --accumulate (now {shape.accumulate}), or set --remat=full"
        )
    steps = {}
    for loss, step in compiled_steps.items():
        if loss == "ours" or memory[loss] < available_bytes(mesh):
            steps[loss] = Steps(shape, step)
    calls: dict[str, Callable | Program] = dict(steps)
    if rivals:
        params = init_params(shape.model, jax.random.key(0))
        forward = jax.jit(lambda params, ids: bind(shape.model, params).hidden(ids))
        ids = steps["ours"].batch["inputs"][: shape.rows]
        calls["forward without head"] = lambda: forward(params, ids)
    if program:
        calls["beside"] = program
    losses = {loss: [step()] for loss, step in steps.items()}
    # Steps of many microbatches take seconds.
    rounds = 3 if shape.accumulate > 1 else 5
    times = bench.time_interleaved(calls, budget_secs=secs, min_rounds=rounds)
    for loss, step in steps.items():
        losses[loss].append(step.loss)
    if program:
        losses["beside"] = [program.about["loss"], program.loss]
    losses = {name: [float(loss) for loss in both] for name, both in losses.items()}
    for name, (first, last) in losses.items():
        require_learning(name, first, last)
    device = jax.devices()[0]
    peak, peak_source = hardware.compute_ceiling(device.platform, device.device_kind, 1)
    rate = shape.step_tokens / times["ours"].secs
    result = {
        "rows": shape.rows,
        "microbatches": shape.accumulate,
        "tokens": shape.step_tokens,
        "dtype": shape.model.compute_dtype,
        "remat": shape.model.remat,
        "fp8_layers": shape.model.fp8_layers,
        "ms": {name: time.secs * 1e3 for name, time in times.items()},
        "spread": {name: time.spread for name, time in times.items()},
        "best_ms": {name: time.best * 1e3 for name, time in times.items()},
        "tokens_per_sec": rate,
        "mfu": rate * train_flops_per_token(shape.model) / peak if peak else None,
        "mfu_against": peak_source,
        "bytes": memory,
        "losses": losses,  # first and last
    }
    if "naive" in times:
        result["speedup_over_naive"] = times["naive"].secs / times["ours"].secs
    if program:
        theirs = program.about["tokens"] / times["beside"].secs
        result["beside"] = program.about | {"tokens_per_sec": theirs}
        result["speedup_over_beside"] = rate / theirs
    return result


def lower_step(shape: bench.Shape, loss: str = "ours"):
    """The step on the first device, from shapes alone; its loss "ours" or "naive"."""
    mesh, tx = bench.one_device(), bench.optimizer(shape)
    ids = jax.ShapeDtypeStruct((shape.rows * shape.accumulate, shape.model.seq_len), jnp.int32)
    before = step_module.cross_entropy_sum
    step_module.cross_entropy_sum = before if loss == "ours" else naive_sum
    try:
        step = make_train_step(
            shape.model,
            tx,
            mesh,
            device_batch_size=shape.rows,
            tile_tokens=shape.tile_tokens,
            grad_clip=shape.grad_clip,
        )
        with jax.set_mesh(mesh):
            state = abstract_state(shape.model, tx, mesh)
            return step.lower(state, {"inputs": ids, "targets": ids})
    finally:
        step_module.cross_entropy_sum = before


def naive_sum(x, head, targets, weights, vocab_size: int, tile: int):
    """The same loss by its definition, left to automatic differentiation; its head not in fp8."""
    head = head.kernel if isinstance(head, fp8.Weight) else head
    return (cross_entropy_naive(x, head, targets, vocab_size) * weights).sum()


class Steps:
    """Training on one random batch: a call takes a step, keeps the state, and returns the loss."""

    def __init__(self, shape: bench.Shape, compiled):
        c, self.mesh, self.compiled = shape.model, bench.one_device(), compiled
        ids = bench.random_batch(0, shape.rows * shape.accumulate, c.seq_len, c.vocab_size)
        self.batch = put_batch(ids, self.mesh)
        self.state = create_state(c, bench.optimizer(shape), self.mesh, seed=0)

    def __call__(self) -> jax.Array:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.batch)  # consumes the state
        self.loss = metrics["loss"]
        return self.loss


def require_learning(name: str, first: float, last: float) -> None:
    """Say both losses; UserError unless the batch was being learnt by heart."""
    log(f"{name}: loss {first:.4f} at first, {last:.4f} at last")
    if not (math.isfinite(first) and last < first):  # a last one that is no number fails as well
        raise UserError(
            f"the step of {name} got from loss {first:.4f} to {last:.4f}, expected a finite and "
            "lower one; a broken step's speed is not told: look for what computes wrongly"
        )


def agree(shape: bench.Shape, program: Program) -> None:
    """Say what both sides do in a step; UserError unless both take as many tokens."""
    ours = {"dtype": shape.model.compute_dtype, "microbatches": shape.accumulate}
    about = {"ours": ours | {"tokens": shape.step_tokens}, program.about["name"]: program.about}
    for name, one in about.items():
        told = f"{one.get('microbatches', '?')} microbatches, {one.get('dtype', 'dtype unknown')}"
        log(f"{name}: {one['tokens']:,} tokens a step in {told}")
    if program.about["tokens"] != shape.step_tokens:
        raise UserError(
            f"--beside: the program takes {program.about['tokens']:,} tokens a step, ours "
            f"{shape.step_tokens:,}, expected as many; set --device-batch and --accumulate"
        )


def main() -> None:
    parser = bench.parser(__doc__, secs=20.0)
    parser.add_argument("--device-batch", type=int, help="rows at once; by default the recipe's")
    parser.add_argument("--accumulate", type=int, help="microbatches of a step")
    parser.add_argument("--remat", choices=REMAT, default="none")
    parser.add_argument("--fp8", action="store_true", help=f"in {', '.join(fp8.LAYERS)}")
    parser.add_argument("--beside", metavar="COMMAND", help="another program's step, in turn")
    args = parser.parse_args()
    for option in ("device_batch", "accumulate"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} got {value}, expected at least 1")
    if args.beside:  # the other program needs memory of the same GPU
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    else:
        take_memory()
    if shutil.which("nvidia-smi") is None:  # as training does, and before JAX starts its threads
        keep_freed_memory()
    if args.fp8 and jax.default_backend() != "cpu":  # a CPU computes the same, slowly
        hardware.check_fp8(jax.devices()[0], "bfloat16")
    results = {}
    with ExitStack() as stack:
        program = stack.enter_context(beside(args.beside)) if args.beside else None
        for name in [args.shape] if args.shape else bench.default_shapes():
            shape = with_options(
                bench.get_shape(name),
                rows=args.device_batch,
                accumulate=args.accumulate,
                remat=args.remat,
                in_fp8=args.fp8,
            )
            results[name] = run(shape, args.secs, rivals=not args.beside, program=program)
    log(table(results))
    bench.finish(
        {"bench": "train", "results": [{"shape": name} | r for name, r in results.items()]}
    )


def with_options(
    shape: bench.Shape,
    *,
    rows: int | None = None,
    accumulate: int | None = None,
    remat: str = "none",
    in_fp8: bool = False,
) -> bench.Shape:
    """The shape with other microbatches, other remat, or every large matrix in fp8."""
    model = replace(shape.model, remat=remat, fp8_layers=tuple(fp8.LAYERS) if in_fp8 else ())
    accumulate = accumulate or shape.accumulate
    return replace(shape, model=model, rows=rows or shape.rows, accumulate=accumulate)


def table(results: dict[str, dict]) -> str:
    """A row for each step: ours, and those it is compared with."""
    rows = []
    for shape, r in results.items():
        rates = {"ours": r["tokens_per_sec"]}
        speedups = {}
        if "beside" in r:
            rates["beside"] = r["beside"]["tokens_per_sec"]
            speedups["beside"] = r["speedup_over_beside"]
        if "speedup_over_naive" in r:
            rates["naive"] = r["tokens_per_sec"] / r["speedup_over_naive"]
            speedups["naive"] = r["speedup_over_naive"]
        for key, ms in r["ms"].items():
            rows.append(
                (
                    shape,
                    r["beside"]["name"] if key == "beside" else key,
                    bench.number(ms),
                    f"{r['spread'][key]:.1%}",
                    bench.number(r["best_ms"][key]),
                    bench.number(rates.get(key), "{:,.0f}"),
                    bench.number(speedups.get(key), "{:.2f}x"),
                    bench.number(r["mfu"] if key == "ours" else None, "{:.1%}"),
                    bench.number(r["bytes"].get(key, 0) / 2**20 or None, "{:,.0f}"),
                )
            )
    header = ("shape", "step", "ms", "spread", "best ms", "tok/s", "ours is faster by", "mfu")
    return bench.table((*header, "MiB"), rows)


if __name__ == "__main__":
    run_main(main)
