"""Speed of the training step, and what the tiled cross entropy gives; one JSON line last.

  python scripts/bench_train.py                        shapes that suit this machine
  python scripts/bench_train.py --shape=demo --secs=30

Ours against the same step with the naive cross entropy, which holds all logits; both take turns in
one run. Also the forward pass alone, and the bytes each step needs by the compiler's own analysis:
a step that does not fit is not run.
"""

import jax

from nanochat_jax import bench, hardware
from nanochat_jax.common import log, run_main
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.gpt import bind, init_params
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.runtime import available_bytes, compiled_bytes
from nanochat_jax.train import step as step_module
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch


def run(name: str, secs: float) -> dict:
    """Numbers of one shape on the first device."""
    shape, mesh = bench.get_shape(name), bench.one_device()
    tx = bench.optimizer(shape)
    batch = put_batch(
        bench.random_batch(0, shape.rows, shape.model.seq_len, shape.model.vocab_size), mesh
    )
    calls, memory = {}, {}
    for loss in ("ours", "naive"):
        compiled = compile_step(shape, tx, mesh, batch, loss)
        memory[loss] = compiled_bytes(compiled)
        if memory[loss] < available_bytes(mesh):
            calls[loss] = stepper(compiled, create_state(shape.model, tx, mesh, seed=0), batch)
    params = init_params(shape.model, jax.random.key(0))
    forward = jax.jit(lambda params, ids: bind(shape.model, params).hidden(ids))
    calls["forward without head"] = lambda: forward(params, batch["inputs"])
    with jax.set_mesh(mesh):
        losses = {loss: float(calls[loss]()["loss"]) for loss in memory if loss in calls}
        times = bench.time_interleaved(calls, budget_secs=secs)
    device = jax.devices()[0]
    peak, peak_source = hardware.compute_ceiling(device.platform, device.device_kind, 1)
    rate = shape.tokens / times["ours"].secs
    return {
        "shape": name,
        "ms": {name: time.secs * 1e3 for name, time in times.items()},
        "spread": {name: time.spread for name, time in times.items()},
        "tokens_per_sec": rate,
        "speedup_over_naive": times["naive"].secs / times["ours"].secs
        if "naive" in times
        else None,
        "mfu": rate * train_flops_per_token(shape.model) / peak if peak else None,
        "mfu_against": peak_source,
        "bytes": memory,
        "first_loss": losses,
    }


def compile_step(shape: bench.Shape, tx, mesh, batch, loss: str):
    """The step, from shapes alone; its loss "ours" or "naive"."""
    before = step_module.cross_entropy_sum
    step_module.cross_entropy_sum = before if loss == "ours" else naive_sum
    try:
        step = make_train_step(
            shape.model,
            tx,
            mesh,
            device_batch_size=shape.rows,
            tile_tokens=shape.tile_tokens,
        )
        with jax.set_mesh(mesh):
            return step.lower(abstract_state(shape.model, tx, mesh), batch).compile()
    finally:
        step_module.cross_entropy_sum = before


def naive_sum(x, head, targets, weights, vocab_size: int, tile: int):
    """The same loss by its definition, left to automatic differentiation."""
    return (cross_entropy_naive(x, head, targets, vocab_size) * weights).sum()


def stepper(compiled, state, batch):
    """A call that takes one step and keeps the state, which each step consumes."""
    held = [state]

    def call():
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return call


def main() -> None:
    args = bench.parser(__doc__, secs=20.0).parse_args()
    shapes = [args.shape] if args.shape else bench.default_shapes()
    results = [run(shape, args.secs) for shape in shapes]
    rows = [
        (
            r["shape"],
            *(bench.number(r["ms"].get(n)) for n in ("ours", "naive", "forward without head")),
            f"{r['tokens_per_sec']:,.0f}",
            bench.number(r["speedup_over_naive"], "{:.2f}x"),
            bench.number(r["mfu"], "{:.1%}"),
            *(f"{r['bytes'][n] / 2**20:,.0f}" for n in ("ours", "naive")),
        )
        for r in results
    ]
    header = ("shape", "ours ms", "naive ms", "forward ms", "tok/s", "speed-up", "mfu")
    log(bench.table((*header, "ours MiB", "naive MiB"), rows))
    bench.finish({"bench": "train", "results": results})


if __name__ == "__main__":
    run_main(main)
