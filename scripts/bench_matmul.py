"""What this device's matrix units and memory really reach; one JSON line last.

  python scripts/bench_matmul.py --shape=d20

The ceilings: a square matrix product in bfloat16 and in fp8 (the 8-bit numbers given, laid out as
the tensor cores want them), and a copy, counted as bytes read and written. Then the products of a
training step's linear maps y = x w and of their gradients dx = dy w', dw = x' dy, in the layouts
that training has them in, so fp8 pays for the transposes it needs. Quantising is not timed.
"""

from functools import partial

import jax
import jax.numpy as jnp

from nanochat_jax import bench
from nanochat_jax.common import log, run_main
from nanochat_jax.model import fp8

CEILINGS = ("bf16", "fp8", "copy")
# operands and the axes they are summed over; x [M, K], w [K, N], dy [M, N]
FORMS = {
    "y": ("x", "w", (1,), (0,)),
    "dx": ("dy", "w", (1,), (1,)),
    "dw": ("x", "dy", (0,), (0,)),
}


def ceilings(secs: float) -> dict[str, float]:
    """FLOP/s in bf16 and fp8, bytes/s of a copy, all on random numbers."""
    gpu = jax.default_backend() == "gpu"
    size = 8_192 if gpu else 256
    a, b = bench.random_arrays("bfloat16", (size, size), (size, size))
    a8, b8 = (fp8.quantise(x, fp8.E4M3).values for x in (a, b))
    (large,) = bench.random_arrays("float32", (2**30 if gpu else 2**22,))
    lowered = {
        "bf16": jax.jit(jnp.matmul).lower(a, b),
        "fp8": jax.jit(rows_by_rows).lower(a8, b8),
        "copy": jax.jit(jnp.negative).lower(large),
    }
    given = {"bf16": (a, b), "fp8": (a8, b8), "copy": (large,)}
    compiled = bench.compile_together(lowered)
    calls = {name: partial(call, *given[name]) for name, call in compiled.items()}
    times = bench.time_interleaved(calls, budget_secs=secs)
    work = {"bf16": 2 * size**3, "fp8": 2 * size**3, "copy": 2 * large.nbytes}
    return {name: work[name] / times[name].secs for name in CEILINGS}


def rows_by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b', each read along its rows, as Hopper's tensor cores want fp8; without scales."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.bfloat16)


def run(name: str, secs: float) -> dict:
    """The products of one shape: dims [M, K, N], milliseconds and TFLOP/s by type and form."""
    shape = bench.get_shape(name)
    c, M = shape.model, shape.tokens
    D, V = c.model_dim, c.padded_vocab_size
    sizes = {"attn": (M, D, D), "mlp up": (M, D, 4 * D), "mlp down": (M, 4 * D, D)}
    sizes["head, a tile"] = (min(M, shape.tile_tokens), D, V)
    products = [product(size, secs / len(sizes)) | {"what": w} for w, size in sizes.items()]
    return {"shape": name, "products": products}


def product(size: tuple[int, int, int], secs: float) -> dict:
    M, K, N = size
    arrays = bench.random_arrays("bfloat16", (M, K), (K, N), (M, N))
    plain = dict(zip(("x", "w", "dy"), arrays, strict=True))
    formats = {"x": fp8.E4M3, "w": fp8.E4M3, "dy": fp8.E5M2}
    by_type = {
        "bf16": plain,
        "fp8": {name: fp8.quantise(plain[name], formats[name]) for name in plain},
    }
    lowered, given = {}, {}
    for kind, operands in by_type.items():
        for form, (a, b, axis_a, axis_b) in FORMS.items():
            multiply = partial(fp8.product, axis_a=axis_a, axis_b=axis_b, dtype=jnp.bfloat16)
            given[f"{form} {kind}"] = operands[a], operands[b]
            lowered[f"{form} {kind}"] = jax.jit(multiply).lower(operands[a], operands[b])
    compiled = bench.compile_together(lowered)
    calls = {key: partial(call, *given[key]) for key, call in compiled.items()}
    times = bench.time_interleaved(calls, budget_secs=secs)

    def numbers(of):
        return {kind: {form: of(times[f"{form} {kind}"]) for form in FORMS} for kind in by_type}

    return {
        "size": size,
        "ms": numbers(lambda time: time.secs * 1e3),
        "tflops": numbers(lambda time: 2 * M * K * N / time.secs / 1e12),
    }


def main() -> None:
    args = bench.parser(__doc__, secs=10.0).parse_args()
    reached = ceilings(args.secs / 4)
    shapes = [args.shape] if args.shape else bench.default_shapes()
    results = [run(shape, args.secs) for shape in shapes]
    for kind in ("bf16", "fp8"):
        log(f"ceiling {kind}: {reached[kind] / 1e12:,.2f} TFLOP/s")
    log(f"ceiling copy: {reached['copy'] / 1e12:,.3f} TB/s")
    log(table(results))
    bench.finish({"bench": "matmul", "ceilings": reached, "results": results})


def table(results: list[dict]) -> str:
    rows = [
        (
            r["shape"],
            f"{p['what']} {kind}",
            "x".join(str(n) for n in p["size"]),
            *(bench.number(rate, "{:,.2f}") for rate in p["tflops"][kind].values()),
        )
        for r in results
        for p in r["products"]
        for kind in p["tflops"]
    ]
    return bench.table(("shape", "matmul", "MxKxN", *(f"{f} TFLOP/s" for f in FORMS)), rows)


if __name__ == "__main__":
    run_main(main)
