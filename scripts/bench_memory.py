"""Peak memory of a training step with and without each measure against it; one JSON line last.

  python scripts/bench_memory.py                       d20, 32 rows of 2,048 tokens a device
  python scripts/bench_memory.py --shape=tiny --rows=8 --devices=2

Nothing is allocated and nothing runs: each step is compiled from shapes alone, on a CPU too. Every
line differs from the first by one measure. Two numbers for each:

  peak    by the compiler's own analysis: weights, optimizer state, gradients and temporaries of a
          device. A CPU's compiler computes bfloat16 in float32, so that its peak is too high.
  saved   bytes that the forward pass leaves for the backward pass, by the shapes in the gradient's
          closure, weights left out. No compiler is asked: the same on every device. Exact where
          remat names what is kept; else a bound, because a compiler keeps one of several values
          that follow from each other by cheap arithmetic.

A CPU has no fused attention. There the first line stands in for it by computing the scores of a
block of queries again in the backward pass, as cuDNN does; what this holds for a moment, a GPU
does not.
"""

import argparse
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp

from nanochat_jax import bench
from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.launch.runtime import compile_lowered, compiled_bytes
from nanochat_jax.model import fp8, gpt
from nanochat_jax.model.attention import attention, attention_naive
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.train import step as step_module
from nanochat_jax.train.state import abstract_state
from nanochat_jax.train.step import loss_tile, make_train_step

GIB = 2**30


@dataclass(frozen=True)
class Measures:
    """A step; the defaults are the first line of the table."""

    attention: str = "fused"  # or blocked: [T, T] in blocks, kept | naive: [T, T] in one
    loss: str = "tiled"  # or naive: all logits
    remat: str = "none"
    dtype: str = "bfloat16"
    fp8: bool = False
    donated: bool = True
    devices: int = 1


def variants(devices: int) -> dict[str, Measures]:
    return {
        "fused attention, tiled loss, bfloat16": Measures(),
        "attention in blocks, kept": Measures(attention="blocked"),
        "attention [T, T]": Measures(attention="naive"),
        "all logits at once": Measures(loss="naive"),
        "state not donated": Measures(donated=False),
        "float32": Measures(dtype="float32"),
        "fp8": Measures(fp8=True),
        "remat names": Measures(remat="names"),
        "remat full": Measures(remat="full"),
        f"state shared by {devices}": Measures(devices=devices),
        f"remat full, shared by {devices}": Measures(remat="full", devices=devices),
    }


def measure(shape: bench.Shape, m: Measures) -> dict:
    """{"peak", "saved", "state"} in bytes of a device."""
    mesh = make_mesh(data=m.devices, devices=jax.devices()[: m.devices])
    layers = tuple(fp8.LAYERS) if m.fp8 else ()
    model = replace(shape.model, compute_dtype=m.dtype, remat=m.remat, fp8_layers=layers)
    tx = bench.optimizer(replace(shape, model=model))
    step = make_train_step(
        model, tx, mesh, device_batch_size=shape.rows, tile_tokens=shape.tile_tokens
    )
    if not m.donated:
        donating = step
        step = jax.jit(lambda state, batch: donating(state, batch))
    batch = jax.ShapeDtypeStruct((shape.rows * m.devices, model.seq_len), jnp.int32)
    with ExitStack() as swapped:
        if m.loss == "naive":
            swapped.enter_context(mock.patch.object(step_module, "cross_entropy_sum", naive_sum))
        if m.attention != "fused" or jax.default_backend() == "cpu":
            swapped.enter_context(mock.patch.object(gpt, "attention", ATTENTION[m.attention]))
        swapped.enter_context(jax.set_mesh(mesh))
        state = abstract_state(model, tx, mesh)
        compiled = compile_lowered(step.lower(state, {"inputs": batch, "targets": batch}))
        saved = saved_bytes(shape, model)
    own = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    return {"peak": compiled_bytes(compiled), "saved": saved, "state": own}


def saved_bytes(shape: bench.Shape, model: gpt.GPTConfig) -> int:
    """What the forward pass and the loss keep, but for what has the shape of a weight: casts, and
    the gradient of the head."""
    params, size = gpt.param_shapes(model), (shape.rows, model.seq_len)
    tile = loss_tile(shape.tile_tokens, *size)

    def backward(params, ids):
        def loss(params):
            hidden, head = gpt.bind(model, params).hidden(ids), params["lm_head.kernel"]
            weights = jnp.ones(size)
            return step_module.cross_entropy_sum(hidden, head, ids, weights, model.vocab_size, tile)

        return jax.vjp(loss, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, jax.ShapeDtypeStruct(size, jnp.int32)))
    weights = {leaf.shape for leaf in params.values()}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in weights)


def naive_sum(x, head, targets, weights, vocab_size: int, tile: int):
    """The same loss by its definition, left to automatic differentiation."""
    return (cross_entropy_naive(x, head, targets, vocab_size) * weights).sum()


def blocked(q, k, v, window, backend):
    return attention(q, k, v, window, "blocked")


def naive(q, k, v, window, backend):
    with jax.numpy_dtype_promotion("standard"):
        return attention_naive(q, k, v, window).astype(q.dtype)


ATTENTION = {
    "fused": jax.checkpoint(blocked, static_argnums=(3, 4)),
    "blocked": blocked,
    "naive": naive,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=bench.SHAPES, default="d20")
    parser.add_argument("--rows", type=int, help="of a device, by default the shape's")
    parser.add_argument("--devices", type=int, default=8, help="that share the state")
    args = parser.parse_args()
    # Before the devices start: fake ones, where there is no GPU, and no time spent on machine code.
    flags = f"--xla_force_host_platform_device_count={args.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = flags
    if len(jax.devices()) < args.devices:
        raise UserError(f"--devices got {args.devices}, expected at most {len(jax.devices())}")
    shape = bench.SHAPES[args.shape]
    shape = replace(shape, rows=args.rows or shape.rows, tile_tokens=8_192)
    results = {}
    for name, measures in variants(args.devices).items():
        results[name] = measure(shape, measures)
        log(f"{name}: " + ", ".join(f"{k} {v / GIB:.2f} GiB" for k, v in results[name].items()))
    columns = ("peak", "saved", "state")
    rows = [(n, *(f"{r[c] / GIB:,.2f}" for c in columns)) for n, r in results.items()]
    log(bench.table((f"{args.shape}, {shape.rows} x {shape.model.seq_len}", *columns), rows))
    bench.finish({"bench": "memory", "shape": args.shape, "rows": shape.rows, "results": results})


if __name__ == "__main__":
    run_main(main)
