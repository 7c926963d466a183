"""Speed of the training step, and what the tiled cross entropy gives; one JSON line last.

  python scripts/bench_train.py                        shapes that suit this machine
  python scripts/bench_train.py --shape=demo --secs=30

Ours against the same step with the naive cross entropy, which holds all logits; both take turns in
one run. Also the bytes each needs, by the compiler's own analysis.
"""

import argparse

import jax

from nanochat_jax import bench, hardware
from nanochat_jax.common import log, run_main
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.runtime import compiled_bytes
from nanochat_jax.train import step as step_module
from nanochat_jax.train.state import create_state
from nanochat_jax.train.step import make_train_step, put_batch

MODERN = dict(rope_base=1e5, window_pattern="SSSL", qk_scale=1.2, extras=True)
# name: vocabulary, layers, width, heads, tokens a row, rows, modern?
SHAPES = {
    "tiny": (512, 2, 32, 2, 64, 8, False),
    "d4": (4096, 4, 256, 2, 256, 16, False),
    "demo": (4096, 4, 192, 3, 256, 32, True),
    "d20": (65_536, 20, 1280, 10, 2048, 32, False),
}


def run(shape: str, secs: float) -> dict:
    """Numbers of one shape on the first device."""
    vocab_size, layers, width, heads, seq_len, rows, modern = SHAPES[shape]
    gpu = jax.default_backend() == "gpu"
    config = GPTConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        seq_len=seq_len,
        compute_dtype="bfloat16" if gpu else "float32",
        **(MODERN if modern else {}),
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    optim = OptimConfig("modern" if modern else "classic", 0.3, 0.004, 0.02, 0.5, 0.2)
    tx = build_optimizer(
        param_shapes(config),
        width,
        optim,
        lr_multiplier=lambda step: 0.1,
        momentum=lambda step: 0.95,
        weight_decay=lambda step: 0.0,
    )
    batch = put_batch(bench.random_batch(0, rows, seq_len, vocab_size), mesh)
    steps, memory = {}, {}
    for name, loss in (("ours", step_module.cross_entropy_sum), ("naive", naive_sum)):
        tile = 8192 if gpu else 512
        step_module.cross_entropy_sum, before = loss, step_module.cross_entropy_sum
        try:
            step = make_train_step(config, tx, mesh, device_batch_size=rows, tile_tokens=tile)
            state = create_state(config, tx, mesh, seed=0)
            with jax.set_mesh(mesh):
                compiled = step.lower(state, batch).compile()
        finally:
            step_module.cross_entropy_sum = before
        memory[name] = compiled_bytes(compiled)
        steps[name] = stepper(compiled, state, batch)
    params = create_state(config, tx, mesh, seed=0).params
    forward = jax.jit(lambda params, ids: bind(config, params).hidden(ids))
    steps["forward without head"] = lambda: forward(params, batch["inputs"])
    with jax.set_mesh(mesh):
        times = bench.time_interleaved(steps, budget_secs=secs)
    device = jax.devices()[0]
    peak, peak_source = hardware.compute_ceiling(device.platform, device.device_kind, 1)
    rate = rows * seq_len / times["ours"].secs
    return {
        "shape": shape,
        "ms": {name: time.secs * 1e3 for name, time in times.items()},
        "spread": {name: time.spread for name, time in times.items()},
        "tokens_per_sec": rate,
        "speedup_over_naive": times["naive"].secs / times["ours"].secs,
        "mfu": rate * train_flops_per_token(config) / peak if peak else None,
        "mfu_against": peak_source,
        "bytes": memory,
    }


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--secs", type=float, default=20.0, help="of measuring, for each shape")
    args = parser.parse_args()
    shapes = [args.shape] if args.shape else ["d20"]
    if not args.shape and jax.default_backend() == "cpu":
        shapes = ["d4", "demo"]
    results = [run(shape, args.secs) for shape in shapes]
    rows = [
        (
            r["shape"],
            *(f"{r['ms'][n]:.1f}" for n in ("ours", "naive", "forward without head")),
            f"{r['tokens_per_sec']:,.0f}",
            f"{r['speedup_over_naive']:.2f}x",
            "n/a" if r["mfu"] is None else f"{r['mfu']:.1%}",
            *(f"{r['bytes'][n] / 2**20:,.0f}" for n in ("ours", "naive")),
        )
        for r in results
    ]
    header = ("shape", "ours ms", "naive ms", "forward ms", "tok/s", "speed-up", "mfu")
    log(bench.table((*header, "ours MiB", "naive MiB"), rows))
    bench.finish({"bench": "train", "results": results})


if __name__ == "__main__":
    run_main(main)
