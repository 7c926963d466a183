"""The optimizer's update alone: Muon, AdamW and both, on one device; one JSON line last.

  python scripts/bench_optim.py                      shapes that suit this machine
  python scripts/bench_optim.py --shape=gpt2

Muon is nearly all matrix products (its orthogonalisation), AdamW is nearly all memory traffic.
"""

from functools import partial

import jax
import jax.numpy as jnp

from nanochat_jax import bench
from nanochat_jax.common import log, run_main
from nanochat_jax.launch.runtime import compiled_bytes
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.gpt import init_params
from nanochat_jax.optim.build import label
from nanochat_jax.optim.muon import NEWTON_SCHULZ
from nanochat_jax.train.sharded import Owners


def run(name: str, secs: float) -> dict:
    """Numbers of one shape: milliseconds, share of the model's FLOPs, bytes."""
    shape = bench.get_shape(name)
    owners = Owners(shape.model, bench.one_device())  # stacks, as in training
    params = owners.to_owned(init_params(shape.model, jax.random.key(0)))
    arrays = bench.random_arrays("float32", *(p.shape for p in params.values()))
    grads = dict(zip(params, arrays, strict=True))
    groups = {
        "muon": [path for path in params if label(path) == "muon"],
        "adamw": [path for path in params if label(path) != "muon"],
        "both": list(params),
    }
    lowered, given = {}, {}
    for key, paths in groups.items():
        tx = bench.optimizer(shape, paths)
        some = {path: params[path] for path in paths}

        def update(params, grads, state, tx=tx):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(grads, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        given[key] = some, {path: grads[path] for path in paths}, tx.init(some)
        lowered[key] = jax.jit(update).lower(*given[key])
    compiled = bench.compile_together(lowered)
    calls = {key: partial(call, *given[key]) for key, call in compiled.items()}
    times = bench.time_interleaved(calls, budget_secs=secs)
    flops = sum(muon_flops(params[path].shape) for path in groups["muon"])
    return {
        "shape": name,
        "ms": {key: time.secs * 1e3 for key, time in times.items()},
        "spread": {key: time.spread for key, time in times.items()},
        "muon_tflops": flops / times["muon"].secs / 1e12,
        "muon_share_of_flops": flops / (train_flops_per_token(shape.model) * shape.step_tokens),
        "bytes": {key: compiled_bytes(call) for key, call in compiled.items()},
    }


def muon_flops(shape: tuple[int, ...]) -> int:
    """Of orthogonalising a stack: per polynomial X X', its square, and their product with X."""
    stack, short, long = shape[0], *sorted(shape[1:])
    return stack * len(NEWTON_SCHULZ) * (4 * short**2 * long + 2 * short**3)


def main() -> None:
    args = bench.parser(__doc__, secs=10.0).parse_args()
    shapes = [args.shape] if args.shape else bench.default_shapes()
    results = [run(shape, args.secs) for shape in shapes]
    log(table(results))
    bench.finish({"bench": "optim", "results": results})


def table(results: list[dict]) -> str:
    rows = [
        (
            r["shape"],
            *(f"{r['ms'][key]:.1f}" for key in ("muon", "adamw", "both")),
            f"{r['muon_tflops']:,.2f}",
            f"{r['muon_share_of_flops']:.1%}",
        )
        for r in results
    ]
    return bench.table(
        ("shape", "muon ms", "adamw ms", "both ms", "muon TFLOP/s", "of a step's FLOPs"), rows
    )


if __name__ == "__main__":
    run_main(main)
