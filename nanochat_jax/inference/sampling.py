"""The next token of each row, drawn on the device by that row's own settings.

  token = argmax(logits / temperature + Gumbel noise)       (the Gumbel-max trick: a softmax sample)

Noise depends on (seed, position, id) alone: not on what else is in the batch, and truncation does
not change the noise of the ids that stay. It is Threefry-2x32 with 20 rounds (Salmon et al., SC
2011), the one under jax.random; written out, XLA fuses it with what follows.

Truncation: the top_k most likely ids, and of these the fewest whose probabilities (at the row's
temperature, among the top_k) sum to top_p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Column = jax.Array | np.ndarray  # a value for each row, made on the host or not


class Settings(NamedTuple):
    """How each row samples; arrays of [B]."""

    seed: Column  # uint32 [B, 2]
    temperature: Column  # float32; 0: the most likely token
    top_k: Column  # int32; 0: all
    top_p: Column  # float32


class Needs(NamedTuple):
    """What a batch needs of the sampler, known when the program is compiled."""

    untruncated: bool  # a row draws from the whole vocabulary
    candidates: int  # the largest truncation of a row; 0: none truncates


def sample(logits: jax.Array, settings: Settings, position: Column, needs: Needs) -> jax.Array:
    """int32 [B] for logits [B, V] in float32; position [B] is where the row stands."""
    seed, temperature, top_k, top_p = settings
    greedy = temperature == 0
    truncated = (top_k > 0) | (top_p < 1)
    token = argmax(logits)
    cold = jnp.where(greedy, 1.0, temperature)[:, None]  # greedy rows are not divided by 0
    if needs.untruncated:
        ids = jnp.arange(logits.shape[-1])[None]
        drawn = argmax(logits / cold + noise(seed, position, ids))
        token = jnp.where(greedy | truncated, token, drawn)
    if needs.candidates:
        values, ids = jax.lax.top_k(logits, needs.candidates)  # [B, C], most likely first
        scores, rank = values / cold, jnp.arange(needs.candidates)
        allowed = (top_k[:, None] == 0) | (rank < top_k[:, None])
        probs = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        kept = allowed & ((before < top_p[:, None]) | (rank == 0))
        scores = jnp.where(kept, scores, -jnp.inf)
        best = argmax(scores + noise(seed, position, ids))[:, None]
        drawn = jnp.take_along_axis(ids, best, axis=-1)[:, 0]
        token = jnp.where(greedy | ~truncated, token, drawn)
    return token


def argmax(x: jax.Array) -> jax.Array:
    """The first index of the largest value of x [B, M], int32; on a CPU 8x faster than jnp's."""
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x == largest, ids, x.shape[1]), axis=-1)


def noise(seed: Column, position: Column, ids: jax.Array) -> jax.Array:
    """Gumbel noise [B, M] of ids [B or 1, M] at a row's position [B]; seed uint32 [B, 2]."""
    rows = (seed[:, :1], seed[:, 1:], position[:, None].astype(jnp.uint32))
    bits, _ = threefry(*rows, ids.astype(jnp.uint32))
    uniform = ((bits >> 8).astype(jnp.float32) + 0.5) * 2.0**-24  # within (0, 1)
    return -jnp.log(-jnp.log(uniform))


def threefry(k0, k1, x0, x1) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32-20 of the counter (x0, x1) under the key (k0, k1): uint32, broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << turn) | (x1 >> (32 - turn))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
