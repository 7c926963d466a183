"""Is this accelerator right, and how fast? Every check and benchmark in one run; JSON line last.

  python scripts/gpu_check.py [--secs=20]

Needs JAX, flax and optax only. A part that fails is told and does not hide the others; the exit
status is then 1. Without a GPU the parts that need one are skipped, and said to be.
"""

import argparse
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import run as bench_attention
from bench_infer import run as bench_infer
from bench_loss import run as bench_loss
from bench_optim import run as bench_optim
from bench_train import run as bench_train

from nanochat_jax import bench
from nanochat_jax.common import log, run_main
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.model.attention import attention, attention_naive
from nanochat_jax.model.gpt import GPTConfig, bind, init_params, param_shapes
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.train.state import create_state
from nanochat_jax.train.step import make_train_step, put_batch

GPU = jax.default_backend() == "gpu"
MODERN = dict(extras=True, window_pattern="SL", qk_scale=1.2, rope_base=100_000.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secs", type=float, default=20.0, help="of measuring, for each benchmark")
    secs, shape = parser.parse_args().secs, "d20" if GPU else "tiny"
    parts: dict[str, tuple[bool, Callable[[], dict]]] = {
        "attention, full": (True, lambda: check_attention(None, 4, 4)),
        "attention, window": (True, lambda: check_attention(256, 4, 4)),
        "attention, grouped": (True, lambda: check_attention(256, 4, 2)),
        "tiled loss": (True, check_loss),
        "bf16 against float32": (True, check_bf16),
        "decoding, classic": (True, lambda: check_decoding({})),
        "decoding, modern": (True, lambda: check_decoding(MODERN)),
        "matmul ceiling": (GPU, lambda: bench_matmul(secs / 4)),
        "attention speed": (True, lambda: bench_attention(shape, secs)),
        "loss speed": (True, lambda: bench_loss(shape, [2048, 8192] if GPU else [128], secs)),
        "optimizer speed": (True, lambda: bench_optim(shape, secs)),
        "train step, classic": (True, lambda: bench_train(shape, secs)),
        "train step, modern": (GPU, lambda: bench_train("gpt2", secs)),
        "inference, classic": (True, lambda: bench_infer(shape, secs)),
        "inference, modern": (GPU, lambda: bench_infer("gpt2", secs)),
    }
    results, failed = {}, []
    for name, (possible, part) in parts.items():
        if not possible:
            log(f"{name:<22} skipped: needs a GPU")
            continue
        try:
            results[name] = part()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        log(f"{name:<22} {'FAILED' if name in failed else results[name]}")
    bench.finish({"bench": "gpu_check", "failed": failed, "results": results})
    return 1 if failed else 0


def check_attention(window: int | None, num_heads: int, num_kv_heads: int) -> dict:
    """Output and gradients of the backend chosen here against the definition in float32."""
    dtype, seq_len = (jnp.bfloat16, 1024) if GPU else (jnp.float32, 320)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (2, seq_len, n, 128), dtype)
        for key, n in zip(keys, heads, strict=True)
    )

    def total(function, *qkv):
        return jnp.sum(jnp.sin(function(*qkv, window).astype(jnp.float32)))

    ours = jax.jit(jax.grad(lambda *a: total(attention, *a), (0, 1, 2)))(q, k, v)
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    expected = jax.jit(jax.grad(lambda *a: total(attention_naive, *a), (0, 1, 2)))(*wide)
    names = ("dq", "dk", "dv")
    pairs = {"out": (attention(q, k, v, window), attention_naive(*wide, window))}
    pairs |= {n: (a, b) for n, a, b in zip(names, ours, expected, strict=True)}
    return {n: within(a, b, 2e-2 if GPU else 1e-4) for n, (a, b) in pairs.items()}


def check_loss() -> dict:
    """The tiled cross entropy and its gradients against the naive one."""
    dtype = jnp.bfloat16 if GPU else jnp.float32
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 100, 256), dtype)
    head = jax.random.normal(keys[1], (256, 1024)) * 0.05
    targets = jax.random.randint(keys[2], (4, 100), -1, 1000)
    weights = jnp.ones((4, 100)) / 400

    def tiled(x, head):
        return cross_entropy_sum(x, head, targets, weights, 1000, 32)

    def naive(x, head):
        return jnp.sum(cross_entropy_naive(x, head, targets, 1000) * weights)

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, head) for f in (tiled, naive))
    tolerance = 2e-2 if GPU else 1e-5
    return {
        "loss": within(a, b, tolerance),
        "dx": within(da[0], db[0], tolerance),
        "dhead": within(da[1], db[1], tolerance),
    }


def check_bf16() -> dict:
    """Losses of 20 steps of a small model in bfloat16 and in float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = GPTConfig(512, 2, 128, 2, 2, 128, compute_dtype=dtype)
        mesh = make_mesh(devices=jax.devices()[:1])
        tx = build_optimizer(
            param_shapes(config),
            config.model_dim,
            OptimConfig("classic", 0.1, 0.004, 0.02, 0.5, 0.2, ns_dtype=dtype),
            lr_multiplier=lambda step: 1.0,
            momentum=lambda step: 0.95,
            weight_decay=lambda step: 0.0,
        )
        step = make_train_step(config, tx, mesh, device_batch_size=8, tile_tokens=256)
        state = create_state(config, tx, mesh, seed=0)
        batch = put_batch(bench.random_batch(0, 8, 128, 512), mesh)
        with jax.set_mesh(mesh):
            losses[dtype] = []
            for _ in range(20):
                state, metrics = step(state, batch)
                losses[dtype].append(float(metrics["loss"]))
    assert losses["float32"][-1] < losses["float32"][0] - 1, "it learns one batch by heart"
    config = GPTConfig(512, 2, 128, 2, 2, 128)
    logits = bind(config, init_params(config, jax.random.key(0)))(batch["inputs"])
    assert jnp.isfinite(logits).all()
    return {"relative": within(np.array(losses["bfloat16"]), np.array(losses["float32"]), 5e-2)}


def check_decoding(variant: dict) -> dict:
    """Log probabilities of what the engine wrote against one full forward pass over it."""
    dtype = "bfloat16" if GPU else "float32"
    config = GPTConfig(512, 3, 256, 2, 1, 512, compute_dtype=dtype, **variant)  # windows of 128
    params = init_params(config, jax.random.key(0))
    noise = bench.random_arrays("float32", *(value.shape for value in params.values()))
    params = {
        path: value + 0.05 * n for (path, value), n in zip(params.items(), noise, strict=True)
    }
    engine = Engine(config, bench.one_device(), slots=2, max_len=384, stop_ids=())
    engine.load(params)
    prompts = [bench.random_batch(n, 1, n, 512)["inputs"][0].tolist() for n in (1, 40, 200)]
    answers = engine.generate([Request(prompt, 160, temperature=1.0) for prompt in prompts])
    ids = np.zeros((3, 384), np.int32)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[: len(prompt) + 160] = [*prompt, *answer.tokens]
    expected = jax.nn.log_softmax(jax.jit(lambda p, i: bind(config, p)(i))(params, ids))
    pairs = zip(prompts, answers, expected, strict=True)
    return {
        f"after {len(prompt)}": within(
            np.array(answer.logprobs),
            row[np.arange(len(prompt) - 1, len(prompt) + 159), np.array(answer.tokens)],
            3e-2 if GPU else 1e-4,
        )
        for prompt, answer, row in pairs
    }


def bench_matmul(secs: float) -> dict:
    """TFLOP/s of a large bfloat16 product of random matrices: what "100%" can mean on this card."""
    size = 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    times = bench.time_interleaved({"matmul": lambda: product(a, a)}, budget_secs=secs)
    return {"tflops": 2 * size**3 / times["matmul"].secs / 1e12}


def within(a, b, tolerance: float) -> float:
    """Largest difference as a fraction of b's largest value; an error when it is over tolerance."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    difference = float(np.abs(a - b).max() / np.abs(b).max())
    assert difference <= tolerance, f"differs by {difference}, tolerance {tolerance}"
    return difference


if __name__ == "__main__":
    run_main(main)
