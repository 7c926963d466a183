"""Attention with its gradients alone: every backend that runs here, against naive; JSON line last.

  python scripts/bench_attention.py                  shapes that suit this machine
  python scripts/bench_attention.py --shape=d20

Each with full causal attention and with a window of a quarter of the row. TFLOP/s count the visible
pairs only, forward once and backward two and a half times, so skipping what is hidden shows.
"""

import jax

from nanochat_jax import bench
from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.model.attention import attention, attention_naive, candidates, choose_backend


def backends(dtype) -> list[str]:
    """Those that auto chooses from here and that can run in this dtype."""
    found = []
    for backend in candidates():
        try:
            found.append(choose_backend(backend, dtype))
        except UserError:  # cudnn, in float32
            continue
    return found


def run(name: str, secs: float, *, rivals: bool = True) -> dict:
    """Numbers of one layer's attention in one shape, forward and backward; rivals: also naive."""
    shape = bench.get_shape(name)
    c, rows = shape.model, shape.rows
    size, kv_size = ((rows, c.seq_len, n, c.head_dim) for n in (c.num_heads, c.num_kv_heads))
    arrays = bench.random_arrays(c.compute_dtype, size, kv_size, kv_size, size)
    result = {"shape": name, "backend": choose_backend("auto", arrays[0].dtype), "windows": {}}
    for label, window in (("full", None), ("quarter", c.seq_len // 4)):
        forms = {}
        if rivals:
            forms["naive"] = lambda q, k, v, w=window: attention_naive(q, k, v, w)
        for backend in backends(arrays[0].dtype):
            forms[backend] = lambda q, k, v, w=window, b=backend: attention(q, k, v, w, b)
        calls, needed = bench.compile_all(
            {key: with_gradients(form) for key, form in forms.items()}, *arrays
        )
        times = bench.time_interleaved(calls, budget_secs=secs / 2)
        flops = 3.5 * 4 * rows * c.model_dim * visible_pairs(c.seq_len, window)
        result["windows"][label] = {
            "ms": {key: time.secs * 1e3 for key, time in times.items()},
            "spread": {key: time.spread for key, time in times.items()},
            "tflops": {key: flops / time.secs / 1e12 for key, time in times.items()},
            "bytes": needed,
        }
    return result


def with_gradients(form):
    def function(q, k, v, dy):
        y, pull = jax.vjp(form, q, k, v)
        return y, pull(dy)

    return function


def visible_pairs(seq_len: int, window: int | None) -> int:
    """(query, key) pairs of one head and row."""
    reach = seq_len if window is None else window + 1
    return sum(min(position, reach) for position in range(1, seq_len + 1))


def main() -> None:
    args = bench.parser(__doc__, secs=15.0).parse_args()
    shapes = [args.shape] if args.shape else bench.default_shapes()
    results = [run(shape, args.secs) for shape in shapes]
    log(table(results))
    bench.finish({"bench": "attention", "results": results})


def table(results: list[dict]) -> str:
    rows = [
        (
            r["shape"],
            f"{key} {label}",
            bench.number(numbers["ms"].get(key)),
            bench.number(numbers["tflops"].get(key), "{:,.2f}"),
            f"{needed / 2**20:,.0f}",
        )
        for r in results
        for label, numbers in r["windows"].items()
        for key, needed in numbers["bytes"].items()
    ]
    return bench.table(("shape", "attention", "ms", "TFLOP/s", "MiB"), rows)


if __name__ == "__main__":
    run_main(main)
