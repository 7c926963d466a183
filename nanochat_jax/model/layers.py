"""The parts a GPT is made of: linear maps, embeddings, RMSNorm and rotary positions.

Parameters are float32 masters, cast to the activation's dtype where they are used; sums are in
float32 everywhere. No layer has a bias or a learned norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from nanochat_jax.model import fp8


class Linear(nnx.Module):
    """x [..., in] @ kernel [in, out]; in 8 bits if the kernel was bound as an fp8.Weight."""

    def __init__(self, kernel: jax.Array):
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.kernel.get_value()
        if isinstance(weight, fp8.Weight):
            return fp8.dot(x, weight.quantised, weight.kernel)
        return x @ weight.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of table [V, D]."""

    def __init__(self, table: jax.Array):
        self.table = nnx.Param(table)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Cast afterwards: the gradient adds up many small numbers for each frequent id.
        return self.table[...][ids].astype(dtype)


def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last dim, computed in float32 (arXiv 1910.07467, without a gain)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(lax.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + jnp.finfo(jnp.float32).eps)).astype(x.dtype)


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """scale * x in x's dtype, computed in float32: the gradient of a small scale is a sum over x,
    and a GPU adds up in the dtype it is given."""
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_tables(
    positions: jax.Array | np.ndarray, head_dim: int, base: float
) -> tuple[jax.Array, jax.Array]:
    """cos, sin [..., H/2] in float32 for integer positions [...]; constants for NumPy's."""
    frequencies = (base ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = positions.astype(np.float32)[..., None] * frequencies
    xp = np if isinstance(positions, np.ndarray) else jnp
    return jnp.asarray(xp.cos(angles)), jnp.asarray(xp.sin(angles))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[h], x[h + H/2]) of x [B, T, N, H] by minus the angle (arXiv 2104.09864).

    cos, sin: [T, H/2] or [B, T, H/2]. The sign is upstream's; only differences of positions matter.
    """
    cos, sin = (t.astype(x.dtype)[..., None, :] for t in (cos, sin))  # [(B,) T, 1, H/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
