"""Speed of the inference engine, and what caching and batching give; one JSON line last.

  python scripts/bench_infer.py                        a shape that suits this machine
  python scripts/bench_infer.py --shape=d20 --secs=30 --rows 1 64

For 1, 8, 32 (on a GPU also 64) texts at once, each with a prompt of its own, all taking turns in
one run:
  engine      the whole job, greedy; also sampled (temperature 1, top-k 50)
  first       the same prompts and one token: time to first token of texts that come together
  one by one  the first requests, one at a time, through an engine of one slot; all of them would
              take as much longer as there are more
  naive       full forward passes (inference/naive.py), the first tokens only: rows are shortest
              then, so the time of the whole job, taken in proportion, is at least that

Bandwidth: bytes that a step has to read (every weight but the embedding tables, and the cache as
it is allocated) over its time, as a share of the device's peak; on a CPU of a measured sum over a
large array, which small models exceed because they stay in the CPU's caches.

Prefill: prompts as long as the recipe's rows, as the engine computes them. Its FLOPs are of the
visible pairs, without the head and without what follows the last layer's keys and values: prefill
needs neither.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from bench_attention import visible_pairs

from nanochat_jax import bench, hardware
from nanochat_jax.common import log, run_main
from nanochat_jax.inference import decode
from nanochat_jax.inference.engine import PREFILL_ROWS, Engine, Request
from nanochat_jax.inference.naive import generate_greedy
from nanochat_jax.model.accounting import matmul_params
from nanochat_jax.model.gpt import GPTConfig, init_params
from nanochat_jax.model.kv_cache import capacity

ONE_BY_ONE = 4  # requests


def sizes() -> tuple[tuple[int, ...], int, int, int]:
    """Rows at once; tokens of a prompt, of an answer, and of the naive loop's."""
    on_gpu = jax.default_backend() == "gpu"
    return ((1, 8, 32, 64), 256, 256, 4) if on_gpu else ((1, 8, 32), 64, 64, 2)


def run(
    name: str,
    secs: float,
    rows: list[int] | None = None,
    *,
    rivals: bool = True,
    attention: str = "auto",
) -> dict:
    """Numbers of one shape on the first device; rivals: also all the engine is compared with."""
    chosen = sorted({1, *rows} if rows and rivals else rows or sizes()[0])
    config, params, engines = prepare(name, chosen, attention)
    peak, source = bandwidth_ceiling()
    share = secs / (len(engines) + 1)
    results = [
        measure(engine, engines[0] if rivals else None, params, share, peak) for engine in engines
    ]
    return {
        "shape": name,
        "results": results,
        "prefill": prefill(config, params, share),
        "peak": peak,
        "peak_source": source,
    }


def prepare(
    name: str, rows: list[int], attention: str
) -> tuple[GPTConfig, dict[str, jax.Array], list[Engine]]:
    """The model, its weights, and an engine with them for each number of rows."""
    config = replace(bench.get_shape(name).model, attention_backend=attention)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = {path: value + 0.01 for path, value in params.items()}  # nothing is zero
    engines = [Engine(config, bench.one_device(), slots=n, max_len=2048, stop_ids=()) for n in rows]
    for engine in engines:
        engine.load(params)
    return config, params, engines


def warm_up(name: str, rows: list[int], attention: str) -> None:
    """Compile all that `run` without rivals will need, by doing each of its jobs once."""
    config, params, engines = prepare(name, rows, attention)
    for engine in engines:
        for job in jobs(engine):
            engine.generate(job)
    jax.block_until_ready(prefill_call(config, params)())


def jobs(engine: Engine) -> tuple[list[Request], list[Request]]:
    """Greedy answers in all slots at once, whole and only their first token."""
    _, num_prompt, num_new, _ = sizes()
    vocab_size, rows = engine.config.vocab_size, engine.slots
    ids = bench.random_batch(rows, rows, num_prompt, vocab_size)["inputs"].tolist()
    job = [Request(prompt, num_new) for prompt in ids]
    return job, [replace(request, max_new_tokens=1) for request in job]


def measure(
    engine: Engine, one: Engine | None, params: dict, secs: float, peak: float | None
) -> dict:
    """Numbers of an engine with all its slots in use; `one` has a single slot."""
    config, rows = engine.config, engine.slots
    _, _, num_new, num_naive = sizes()
    job, first = jobs(engine)
    calls = {"engine": lambda: engine.generate(job), "first": lambda: engine.generate(first)}
    if one:
        sampled = [replace(request, temperature=1.0, top_k=50) for request in job]
        calls |= {
            "sampled": lambda: engine.generate(sampled),
            "one by one": lambda: [one.generate([request]) for request in job[:ONE_BY_ONE]],
            "naive": lambda: generate_greedy(
                config, params, [list(request.prompt) for request in job], num_naive
            ),
        }
    times = bench.time_interleaved(calls, budget_secs=secs, min_rounds=3)
    whole, first_secs = times["engine"].secs, times["first"].secs
    step = (whole - first_secs) / (num_new - 1)
    result = {
        "rows": rows,
        "first_token_ms": first_secs * 1e3,
        "ms_per_token": step * 1e3,
        "tokens_per_sec": rows * num_new / whole,
        "decode_tokens_per_sec": rows / step,
        "bandwidth": step_bytes(engine) / step,
        "bandwidth_share": step_bytes(engine) / step / peak if peak else None,
        "spread": {name: timing.spread for name, timing in times.items()},
    }
    if one:
        alone = times["one by one"].secs * rows / min(rows, ONE_BY_ONE)
        result |= {
            "sampled_tokens_per_sec": rows * num_new / times["sampled"].secs,
            "over_one_by_one": alone / whole,
            "over_naive": times["naive"].secs * num_new / num_naive / whole,
        }
    return result


def prefill(config: GPTConfig, params: dict, secs: float) -> dict:
    """Computing whole prompts, as many as the engine takes at once, of the recipe's length."""
    rows, T, D = PREFILL_ROWS[0], config.seq_len, config.model_dim
    calls = {"prefill": prefill_call(config, params)}
    time = bench.time_interleaved(calls, budget_secs=secs)["prefill"]
    linear = matmul_params(config) - D * config.padded_vocab_size - 10 * D * D
    pairs = sum(visible_pairs(T, config.sees(layer)) for layer in range(config.num_layers - 1))
    flops = rows * (2 * linear * T + 4 * D * pairs)
    return {
        "rows": rows,
        "prompt_tokens": T,
        "ms": time.secs * 1e3,
        "spread": time.spread,
        "tokens_per_sec": rows * T / time.secs,
        "tflops": flops / time.secs / 1e12,
    }


def prefill_call(config: GPTConfig, params: dict):
    params = {path: value.astype(config.compute_dtype) for path, value in params.items()}
    ids = bench.random_batch(0, PREFILL_ROWS[0], config.seq_len, config.vocab_size)["inputs"]
    return lambda: decode.prefill(config, params, ids)


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
    parser = bench.parser(__doc__, secs=30.0)
    parser.add_argument("--rows", type=int, nargs="+", help="texts at once")
    args = parser.parse_args()
    result = run(args.shape or bench.default_shapes()[0], args.secs, args.rows)
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
    _, num_prompt, num_new, _ = sizes()
    log(f"{result['shape']}: {num_prompt} tokens of prompt, {num_new} new ones")
    log(bench.table((*header, "over one by one", "over naive", "bandwidth"), rows))
    p = result["prefill"]
    log(
        f"prefill of {p['rows']} x {p['prompt_tokens']} tokens: {p['ms']:,.1f} ms, "
        f"{p['tokens_per_sec']:,.0f} tok/s, {p['tflops']:,.2f} TFLOP/s"
    )
    bench.finish({"bench": "infer", **result})


if __name__ == "__main__":
    run_main(main)
