"""The speed of the inference engine, and what caching and batching give; one JSON line last.

  python scripts/bench/infer.py                        a shape that suits this machine
  python scripts/bench/infer.py --shape=d20 --texts 1 64

For some counts of texts at once, each with a prompt of its own, in turn in one run:
  engine       the whole job, greedy; also sampled (temperature 1, top-k 50)
  one by one   the first texts through an engine of one slot, taken in proportion
  naive        the first tokens by full forward passes, taken in proportion
  a token      what each one after the first takes; its bytes are the weights that are multiplied
               with and the cache
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.common import run_main
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Request
from nanochat_jax.model.accounting import matmul_params
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.kv_cache import capacity
from scripts.bench import common
from scripts.bench.common import Shape

ONE_BY_ONE = 4  # texts
LENGTH_STEP = 64  # naive rows are padded to a multiple of it, so that few shapes are compiled


def run(shape: Shape, secs: float, counts: Sequence[int], *, rivals: bool = True) -> list[dict]:
    """Rows for each count of texts at once; rivals: also of what is slower."""
    params, share = common.random_params(shape.model), secs / len(counts)
    return [row for n in counts for row in measure(shape, params, n, share, rivals)]


def measure(shape: Shape, params: dict, count: int, secs: float, rivals: bool) -> list[dict]:
    config = shape.model
    new, naive_new = (256, 4) if jax.default_backend() == "gpu" else (64, 2)  # prompts: as long
    prompts = common.random_batch(count, count, new, config.vocab_size)["inputs"].tolist()
    job, first = ([Request(prompt, n) for prompt in prompts] for n in (new, 1))
    engine, one = (
        Engine(config, common.one_device(), slots=slots, max_len=2048, stop_ids=())
        for slots in (count, 1)
    )
    engine.load(params)
    calls = {"engine": lambda: engine.generate(job), "first token": lambda: engine.generate(first)}
    if rivals:
        one.load(params)
        sampled = [replace(request, temperature=1.0, top_k=50) for request in job]
        calls |= {
            "sampled": lambda: engine.generate(sampled),
            "one by one": lambda: one.generate(job[:ONE_BY_ONE]),
            "naive": lambda: generate_greedy(config, params, prompts, naive_new),
        }
    times = common.turns(calls, secs, min_rounds=3)
    shares = {"one by one": min(count, ONE_BY_ONE) / count, "naive": naive_new / new}
    whole, rows = times["engine"]["ms"], []
    for name, row in times.items():
        ms = row["ms"] / shares.get(name, 1)
        tokens = count if name == "first token" else count * new
        row = {"what": name, "ms": ms, "spread": row["spread"], "times_first": ms / whole}
        rows.append(row | {"value": 1e3 * tokens / ms, "unit": "tok/s"})
    step = (whole - times["first token"]["ms"]) / (new - 1)
    row = {"what": "a token", "ms": step} | common.reached(step_bytes(engine), step, "copy")
    rows.append(row | {"value": 1e3 * count / step, "unit": "tok/s"})
    return [row | {"what": f"{shape.name} {row['what']}, {count} at once"} for row in rows]


def step_bytes(engine: Engine) -> int:
    """What a decoding step has to read: weights that are multiplied with, keys and values."""
    c = engine.config
    kept = sum(capacity(c, layer, engine.length) for layer in range(c.num_layers))
    values = matmul_params(c) + engine.slots * kept * 2 * c.num_kv_heads * c.head_dim
    return values * jnp.dtype(c.compute_dtype).itemsize


def generate_greedy(
    config: GPTConfig, params: dict, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The most likely max_new_tokens ids after each prompt (ids, not empty), by running the whole
    model over prompt and answer for each: what the engine is tested and measured against."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = -(-(lengths.max() + max_new_tokens) // LENGTH_STEP) * LENGTH_STEP
    ids = np.zeros((len(prompts), width), np.int32)  # what lies right of the text is never seen
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for position in lengths + np.arange(max_new_tokens)[:, None]:  # of the next token in each row
        ids[rows, position] = _next(config, params, ids, position)
    return [row[n : n + max_new_tokens].tolist() for row, n in zip(ids, lengths, strict=True)]


@partial(jax.jit, static_argnums=0)
def _next(config: GPTConfig, params: dict, ids: jax.Array, position: jax.Array) -> jax.Array:
    model = bind(config, params)
    last = model.hidden(ids)[jnp.arange(len(ids)), position - 1]  # [B, D]
    return jnp.argmax(model.logits(last), axis=-1)


def main() -> None:
    parser = common.parser(__doc__, secs=30.0)
    parser.add_argument("--texts", type=int, nargs="+", help="at once")
    args = parser.parse_args()
    counts = args.texts or ([1, 8, 32, 64] if jax.default_backend() == "gpu" else [1, 8, 32])
    common.finish("infer", run(common.chosen_shapes(args)[0], args.secs, counts))


if __name__ == "__main__":
    run_main(main)
