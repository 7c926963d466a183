"""Speed of the inference engine, and what caching and batching give; one JSON line last.

  python scripts/bench_infer.py                        a shape that suits this machine
  python scripts/bench_infer.py --shape=d20 --secs=30

For 1, 8, 32 (on a GPU also 64) texts at once, each with a prompt of its own, all taking turns in
one run:
  engine      the whole job, greedy; also sampled (temperature 1, top-k 50)
  first       the same prompts and one token: time to first token of texts that come together
  one by one  the same requests, one at a time, through an engine of one slot
  naive       full forward passes (inference/naive.py), the first tokens only: rows are shortest
              then, so the time of the whole job, taken in proportion, is at least that

Bandwidth: bytes that a step has to read (every weight but the embedding tables, and the cache as
it is allocated) over its time, as a share of the device's peak; on a CPU of a measured sum over a
large array, which small models exceed because they stay in the CPU's caches.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from nanochat_jax import bench, hardware
from nanochat_jax.common import log, run_main
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.inference.naive import generate_greedy
from nanochat_jax.model.accounting import matmul_params
from nanochat_jax.model.gpt import init_params
from nanochat_jax.model.kv_cache import capacity

GPU = jax.default_backend() == "gpu"
ROWS = (1, 8, 32, 64) if GPU else (1, 8, 32)
PROMPT_TOKENS, NEW_TOKENS, NAIVE_TOKENS = (256, 256, 4) if GPU else (64, 64, 2)


def run(name: str, secs: float) -> dict:
    """Numbers of one shape on the first device."""
    config = bench.get_shape(name).model
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = {path: value + 0.01 for path, value in params.items()}  # nothing is zero
    engines = [
        Engine(config, bench.one_device(), slots=rows, max_len=2048, stop_ids=()) for rows in ROWS
    ]
    for engine in engines:
        engine.load(params)
    peak, source = bandwidth_ceiling()
    results = [measure(engine, engines[0], params, secs / len(ROWS), peak) for engine in engines]
    return {"shape": name, "results": results, "peak": peak, "peak_source": source}


def measure(engine: Engine, one: Engine, params: dict, secs: float, peak: float | None) -> dict:
    """Numbers of an engine with all its slots in use; `one` has a single slot."""
    config, rows = engine.config, engine.slots
    ids = bench.random_batch(rows, rows, PROMPT_TOKENS, config.vocab_size)["inputs"].tolist()
    job = [Request(prompt, NEW_TOKENS) for prompt in ids]
    sampled = [replace(request, temperature=1.0, top_k=50) for request in job]
    first = [replace(request, max_new_tokens=1) for request in job]
    times = bench.time_interleaved(
        {
            "engine": lambda: engine.generate(job),
            "sampled": lambda: engine.generate(sampled),
            "first": lambda: engine.generate(first),
            "one by one": lambda: [one.generate([request]) for request in job],
            "naive": lambda: generate_greedy(config, params, ids, NAIVE_TOKENS),
        },
        budget_secs=secs,
        min_rounds=3,
    )
    whole, first_secs = times["engine"].secs, times["first"].secs
    step = (whole - first_secs) / (NEW_TOKENS - 1)
    return {
        "rows": rows,
        "first_token_ms": first_secs * 1e3,
        "ms_per_token": step * 1e3,
        "tokens_per_sec": rows * NEW_TOKENS / whole,
        "sampled_tokens_per_sec": rows * NEW_TOKENS / times["sampled"].secs,
        "over_one_by_one": times["one by one"].secs / whole,
        "over_naive": times["naive"].secs * NEW_TOKENS / NAIVE_TOKENS / whole,
        "bandwidth_share": step_bytes(engine) / step / peak if peak else None,
        "spread": {name: timing.spread for name, timing in times.items()},
    }


def step_bytes(engine: Engine) -> int:
    """What a decoding step has to read: weights that are multiplied with, keys and values."""
    c = engine.config
    kept = sum(capacity(c, layer, engine.length) for layer in range(c.num_layers))
    values = matmul_params(c) + engine.slots * kept * 2 * c.num_kv_heads * c.head_dim
    return values * jnp.dtype(c.compute_dtype).itemsize


def bandwidth_ceiling() -> tuple[float | None, str]:
    """Bytes/s of the device's memory: from its data sheet, or of a large array read once."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        row = hardware.find_accelerator(device.device_kind)
        return (row.bandwidth, f"{device.device_kind} data sheet") if row else (None, "unknown")
    (large,) = bench.random_arrays("float32", (2**26,))
    read = jax.jit(jnp.sum)
    timing = bench.time_interleaved({"read": lambda: read(large)}, budget_secs=1.0)["read"]
    return large.nbytes / timing.secs, "measured read of 256 MiB"


def main() -> None:
    args = bench.parser(__doc__, secs=30.0).parse_args()
    result = run(args.shape or bench.default_shapes()[0], args.secs)
    rows = [
        (
            str(r["rows"]),
            bench.number(r["first_token_ms"]),
            bench.number(r["ms_per_token"], "{:,.2f}"),
            f"{r['tokens_per_sec']:,.0f}",
            f"{r['sampled_tokens_per_sec']:,.0f}",
            bench.number(r["over_one_by_one"], "{:.1f}x"),
            bench.number(r["over_naive"], "{:.0f}x"),
            bench.number(r["bandwidth_share"], "{:.0%}"),
        )
        for r in result["results"]
    ]
    header = ("rows", "first ms", "ms/token", "tok/s", "sampled tok/s")
    log(f"{result['shape']}: {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} new ones")
    log(bench.table((*header, "over one by one", "over naive", "bandwidth"), rows))
    bench.finish({"bench": "infer", **result})


if __name__ == "__main__":
    run_main(main)
