"""Cross entropy with its gradients alone: tiled, by tile size, against naive; one JSON line last.

  python scripts/bench_loss.py                       shapes that suit this machine
  python scripts/bench_loss.py --shape=d20 --tiles 4096 8192 16384

The floor is what the three matrix products alone (logits, d/dx, d/dhead) take. Bytes are of the
compiled function, by the compiler's own analysis; what does not fit is not run.
"""

import jax
import jax.numpy as jnp

from nanochat_jax import bench
from nanochat_jax.common import log, run_main
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum
from nanochat_jax.train.step import loss_tile

TILES = {"gpu": [4_096, 8_192, 16_384], "cpu": [128, 256, 512, 1_024]}


def run(name: str, tiles: list[int], secs: float, *, rivals: bool = True) -> dict:
    """Numbers of the loss of one shape, forward and backward; rivals: also naive."""
    shape = bench.get_shape(name)
    c, rows = shape.model, shape.rows
    (x,) = bench.random_arrays(c.compute_dtype, (rows, c.seq_len, c.model_dim))
    head = bench.random_arrays("float32", (c.model_dim, c.vocab_size))[0] / c.model_dim**0.5
    targets = bench.random_batch(0, rows, c.seq_len, c.vocab_size)["targets"]
    weights = jnp.full(targets.shape, 1 / targets.size)

    def naive(x, head):
        return jnp.sum(cross_entropy_naive(x, head, targets, c.vocab_size) * weights)

    def tiled(tile_tokens: int):
        tile = loss_tile(tile_tokens, rows, c.seq_len)
        return lambda x, head: cross_entropy_sum(x, head, targets, weights, c.vocab_size, tile)

    losses = {f"tile {tokens}": tiled(tokens) for tokens in tiles}
    losses = {"naive": naive} | losses if rivals else losses
    calls, needed = bench.compile_all(
        {key: jax.value_and_grad(loss, (0, 1)) for key, loss in losses.items()}, x, head
    )
    values = {key: float(call()[0]) for key, call in calls.items()}
    times = bench.time_interleaved(calls, budget_secs=secs)
    flops = 6 * targets.size * c.model_dim * c.vocab_size
    return {
        "shape": name,
        "ms": {key: time.secs * 1e3 for key, time in times.items()},
        "spread": {key: time.spread for key, time in times.items()},
        "tflops": {key: flops / time.secs / 1e12 for key, time in times.items()},
        "bytes": needed,
        "loss": values,
    }


def main() -> None:
    parser = bench.parser(__doc__, secs=15.0)
    parser.add_argument("--tiles", type=int, nargs="+", help="tokens whose logits exist at once")
    args = parser.parse_args()
    tiles = args.tiles or TILES[jax.default_backend()]
    shapes = [args.shape] if args.shape else bench.default_shapes()
    results = [run(shape, tiles, args.secs) for shape in shapes]
    log(table(results))
    bench.finish({"bench": "loss", "results": results})


def table(results: list[dict]) -> str:
    rows = [
        (
            r["shape"],
            key,
            bench.number(r["ms"].get(key)),
            bench.number(r["tflops"].get(key), "{:,.2f}"),
            f"{needed / 2**20:,.0f}",
        )
        for r in results
        for key, needed in r["bytes"].items()
    ]
    return bench.table(("shape", "loss", "ms", "TFLOP/s", "MiB"), rows)


if __name__ == "__main__":
    run_main(main)
