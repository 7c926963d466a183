"""The correctness half of gpu_check.py: what an accelerator computes against what it should.

Each check returns the largest differences it found, as fractions of the largest value, and raises
AssertionError when one exceeds its tolerance. On a GPU they compute in bfloat16, as training does,
elsewhere in float32, with tolerances to match.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import backends

from nanochat_jax import bench
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.model import fp8
from nanochat_jax.model.attention import attention, attention_naive
from nanochat_jax.model.gpt import GPTConfig, bind, init_params
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum
from nanochat_jax.train.state import create_state
from nanochat_jax.train.step import make_train_step, put_batch

MODERN = dict(extras=True, window_pattern="SL", qk_scale=1.2, rope_base=100_000.0)
STEPS = 20  # of the comparisons of losses


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def train_dtype():
    return jnp.bfloat16 if on_gpu() else jnp.float32


def check_attention() -> dict:
    """Output and gradients of every backend against the definition in float32: full, with a window,
    and with two queries' heads to a key's."""
    cases = {"full": (None, 4, 4), "window": (256, 4, 4), "grouped": (256, 4, 2)}
    differences = {}
    for label, (window, num_heads, num_kv_heads) in cases.items():
        seq_len = 1024 if on_gpu() else 320
        sizes = [(2, seq_len, n, 128) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
        given = bench.random_arrays(train_dtype().__name__, *sizes)
        forms = {
            backend: lambda q, k, v, b=backend, w=window: attention(q, k, v, w, b)
            for backend in backends(given[0].dtype)
        }
        with jax.default_matmul_precision("highest"):  # float32 would be TF32 on a GPU
            wide = [a.astype(jnp.float32) for a in given]
            expected = with_gradients(lambda q, k, v, w=window: attention_naive(q, k, v, w), wide)
        for backend, form in forms.items():
            pairs = zip(with_gradients(form, given), expected, strict=True)
            found = [within(a, b, 2e-2 if on_gpu() else 1e-4) for a, b in pairs]
            differences[f"{backend} {label}"] = max(found)
    return differences


def with_gradients(form, given) -> tuple:
    """(y, dq, dk, dv) of q, k, v, dy."""

    def function(q, k, v, dy):
        y, pull = jax.vjp(form, q, k, v)
        return y, *pull(dy)

    return jax.jit(function)(*given)


def check_loss() -> dict:
    """The tiled cross entropy and its gradients against the naive one."""
    x, head = bench.random_arrays("float32", (4, 100, 256), (256, 1024))
    x, head = x.astype(train_dtype()), head * 0.05
    targets = jax.random.randint(jax.random.key(2), (4, 100), -1, 1000)
    weights = jnp.ones((4, 100)) / 400

    def tiled(x, head):
        return cross_entropy_sum(x, head, targets, weights, 1000, 32)

    def naive(x, head):
        return jnp.sum(cross_entropy_naive(x, head, targets, 1000) * weights)

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, head) for f in (tiled, naive))
    tolerance = 2e-2 if on_gpu() else 1e-5
    pairs = {"loss": (a, b), "dx": (da[0], db[0]), "dhead": (da[1], db[1])}
    return {name: within(a, b, tolerance) for name, (a, b) in pairs.items()}


def check_dtypes(with_fp8: bool) -> dict:
    """Losses of learning one batch by heart, in bfloat16 and fp8, against float32's."""
    base = GPTConfig(512, 2, 128, 2, 2, 128)
    configs = {"float32": base, "bfloat16": replace(base, compute_dtype="bfloat16")}
    if with_fp8:
        configs["fp8"] = replace(configs["bfloat16"], fp8_layers=tuple(fp8.LAYERS))
    losses = {name: learn(config) for name, config in configs.items()}
    fell = losses["float32"][0] - losses["float32"][-1]
    assert fell > 1, f"float32 learns too little: its loss fell by {fell}"
    tolerances = {"bfloat16": 1e-2, "fp8": 3e-2}
    return {
        name: within(losses[name], losses["float32"], tolerances[name])
        for name in losses
        if name in tolerances
    }


def learn(config: GPTConfig) -> np.ndarray:
    """Losses of STEPS steps on one random batch."""
    mesh = bench.one_device()
    tx = bench.optimizer(bench.Shape(config, rows=8))
    step = make_train_step(config, tx, mesh, device_batch_size=8, tile_tokens=256)
    state, losses = create_state(config, tx, mesh, seed=0), []
    batch = put_batch(bench.random_batch(0, 8, config.seq_len, config.vocab_size), mesh)
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses)


def check_decoding(variant: dict) -> dict:
    """Log probabilities of what the engine wrote against one full forward pass over it."""
    dtype = train_dtype().__name__
    config = GPTConfig(512, 3, 256, 2, 1, 512, compute_dtype=dtype, **variant)  # windows of 128
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
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
    expected = np.asarray(jax.nn.log_softmax(jax.jit(lambda p, i: bind(config, p)(i))(params, ids)))
    differences = {}
    for prompt, answer, row in zip(prompts, answers, expected, strict=True):
        at = np.arange(len(prompt) - 1, len(prompt) + 159)
        full = row[at, np.array(answer.tokens)]
        tolerance = 2e-2 if on_gpu() else 1e-4
        differences[f"after {len(prompt)}"] = within(np.array(answer.logprobs), full, tolerance)
    return differences


def within(a, b, tolerance: float) -> float:
    """Largest difference as a fraction of b's largest value; AssertionError over tolerance."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    difference = float(np.abs(a - b).max() / np.abs(b).max())
    assert difference <= tolerance, f"differs by {difference}, tolerance {tolerance}"
    return difference
