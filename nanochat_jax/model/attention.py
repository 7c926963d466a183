"""Causal attention with an optional sliding window: one function, three backends.

  cudnn    fused FlashAttention through jax.nn.dot_product_attention; NVIDIA, bfloat16
  xla      the same call left to the compiler; anywhere
  blocked  query blocks, each against the keys that it can see; for CPUs

A window of w lets position i see keys i-w..i (w+1 of them, as upstream). Windows are always passed
together with is_causal: alone, cuDNN's left window attends to the future (jax pull request 39576).
"""

import jax
import jax.numpy as jnp

from nanochat_jax.common import UserError

BACKENDS = ("auto", "cudnn", "xla", "blocked")
BY_SPEED = {"gpu": ("cudnn", "xla"), "cpu": ("blocked", "xla")}  # on a platform, the fastest first
MIN_BLOCK, MAX_BLOCKS = 64, 8  # queries of a block; blocks of a row, all unrolled


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, backend: str = "auto"
) -> jax.Array:
    """softmax(q k' / sqrt(H)) v over the visible keys: [B, T, N, H] from q [B, T, N, H] and k, v
    [B, T, K, H], N a multiple of K. window: how many earlier positions are seen; None: all."""
    seq_len, backend = q.shape[1], choose_backend(backend, q.dtype)
    if backend == "blocked":
        return _attention_blocked(q, k, v, seq_len if window is None else window)
    local = None if window is None or window >= seq_len - 1 else (window, 0)
    form = "cudnn" if backend == "cudnn" else "xla"
    with jax.numpy_dtype_promotion("standard"):  # jax's own code counts on it for bfloat16
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=local, implementation=form
        )


def _attention_blocked(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    _, T, N, H = q.shape
    K, q = k.shape[2], q * jnp.asarray(H**-0.5, q.dtype)
    k, v = (jnp.repeat(t, N // K, axis=2) if N > K else t for t in (k, v))  # [B, T, N, H]
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))  # [B, N, T, H]
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    out = []
    for start in range(0, T, block):
        stop, first = min(start + block, T), max(0, start - window)
        seen_k, seen_v = k[:, :, first:stop], v[:, :, first:stop]
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)  # query minus key
        visible = (distance >= 0) & (distance <= window)
        qk = q[:, :, start:stop], seen_k
        scores = jnp.einsum("bnth,bnsh->bnts", *qk, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out.append(jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), seen_v))
    return jnp.swapaxes(jnp.concatenate(out, axis=2), 1, 2)


def choose_backend(backend: str, dtype: jnp.dtype) -> str:
    if backend not in BACKENDS:
        raise UserError(f"attention backend got {backend!r}, expected one of {', '.join(BACKENDS)}")
    fused = jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)
    if backend == "cudnn" and not fused:
        needs, got = "an NVIDIA GPU and bfloat16", f"{jax.default_backend()} and {dtype}"
        raise UserError(f"attention backend cudnn needs {needs}, got {got}; use auto")
    if backend == "auto":
        return next(name for name in candidates() if fused or name != "cudnn")
    return backend


def candidates() -> tuple[str, ...]:
    """What auto chooses from on this machine's devices."""
    return BY_SPEED.get(jax.default_backend(), ("xla",))


def attention_naive(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """The definition, with the whole [T, T] matrix; what the backends are tested against."""
    _, T, N, H = q.shape
    k, v = (jnp.repeat(t, N // t.shape[2], axis=2) for t in (k, v))  # [B, T, N, H]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / H**0.5
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]  # query minus key
    visible = (distance >= 0) & (distance <= (T if window is None else window))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
