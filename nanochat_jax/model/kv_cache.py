"""Keys and values of the texts being written: one slot for each text.

  cache = (k, v) of every layer, each [B slots, K, S, H] in the compute dtype

The cache has room for `length` positions and is resized as texts grow. A layer that sees w earlier
positions keeps a ring of S = w of them; one that sees all keeps S = length. Position p lies at
index p % S. What an index holds follows from how many positions the slot's text has written
(`held`), so a slot is reused without being cleared.

A burst of decoding steps writes its keys and values to arrays of their own, [B, K, steps, H], which
go into the cache once, at the end: the loop copies nothing large. Heads come before positions, so
that each head's keys are one contiguous matrix.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import ROWS

KV = tuple[jax.Array, jax.Array]
Cache = list[KV]


def capacity(config: GPTConfig, layer: int, length: int) -> int:
    """Positions a layer keeps, S, of a cache of this length."""
    return min(config.sees(layer) or length, length)


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(config: GPTConfig, slots: int, length: int) -> Cache:
    kept = (capacity(config, layer, length) for layer in range(config.num_layers))
    return shard_cache([(new_kv(config, slots, S), new_kv(config, slots, S)) for S in kept])


def new_kv(config: GPTConfig, rows: int, positions: int) -> jax.Array:
    shape = (rows, config.num_kv_heads, positions, config.head_dim)
    return jnp.zeros(shape, jnp.dtype(config.compute_dtype))


def shard_cache(cache: Cache) -> Cache:
    """Split slots over the row axes, which must divide them, and heads over tensor if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache
    by_head = cache[0][0].shape[1] % mesh.shape["tensor"] == 0
    return jax.lax.with_sharding_constraint(cache, P(*ROWS, "tensor" if by_head else None))


@partial(jax.jit, static_argnums=(0, 1))
def resize(config: GPTConfig, length: int, cache: Cache) -> Cache:
    """The same texts in a cache of another length, which none of them may exceed."""

    def cut_or_pad(layer: int, a: jax.Array) -> jax.Array:
        extra = capacity(config, layer, length) - a.shape[2]
        if extra <= 0:
            return a[:, :, : a.shape[2] + extra]
        return jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0)))

    return shard_cache([(cut_or_pad(i, k), cut_or_pad(i, v)) for i, (k, v) in enumerate(cache)])


def held(size: int, written: jax.Array) -> jax.Array:
    """The position at each index of a ring, [B, S], after written [B] of them; negative: none."""
    last = written[:, None] - 1
    return last - (last - jnp.arange(size)) % size


@partial(jax.jit, donate_argnums=0)
def insert(cache: Cache, fresh: Cache, lengths, source, slots) -> Cache:
    """Put text source[i] into slots[i], [m] of each; a slot that does not exist is skipped.

    fresh: k, v [n, K, T, H] of every layer, of which lengths [n] positions count.
    """

    def put(old, new):
        size, T = old.shape[2], new.shape[2]
        if T > size:  # of a longer text a ring keeps the end
            at = jnp.maximum(held(size, lengths), 0)  # [n, size]
            new = jnp.take_along_axis(new, at[:, None, :, None], axis=2)
        return old.at[slots, :, : new.shape[2]].set(new[source], mode="drop")

    return shard_cache(jax.tree.map(put, cache, fresh))


def merge(cache: Cache, burst: Cache, start: jax.Array, count: jax.Array) -> Cache:
    """Write positions start..start+count-1 of each row, [B], from a burst [B, K, steps, H], whose
    steps must not exceed the smallest ring."""
    step = jnp.arange(burst[0][0].shape[2])

    def put(old, new):
        size = old.shape[2]
        at = jnp.where(step < count[:, None], (start[:, None] + step) % size, size)  # [B, steps]
        return jax.vmap(lambda row, kv, at: row.at[:, at].set(kv, mode="drop"))(old, new, at)

    return shard_cache(jax.tree.map(put, cache, burst))


def attend(q, old: KV, new: KV, *, window: int | None, start, step) -> jax.Array:
    """One query a row over the cache and the burst's own keys: q [B, 1, N, H] -> [B, 1, N, H].

    old: k, v [B, K, S, H], the cache of a layer, as it was when the burst began;
    new: k, v [B, K, steps, H], written up to `step`, whose position is start + step, start [B].
    """
    B, _, N, H = q.shape
    K, S = old[0].shape[1:3]
    q = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, K, N // K, H)
    old_at = held(S, start)  # [B, S]
    ago = start[:, None] + step - old_at
    see_old = (old_at >= 0) & (True if window is None else ago <= window)
    ago = step - jnp.arange(new[0].shape[2])  # [steps]
    see_new = (ago >= 0) & (True if window is None else ago <= window)
    seen = jnp.concatenate([see_old, jnp.broadcast_to(see_new, (B, len(see_new)))], axis=1)

    scores = [
        jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)
        for k in (old[0], new[0])
    ]
    scores = jnp.where(seen[:, None, None], jnp.concatenate(scores, axis=-1), -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)  # [B, K, G, S + steps]
    y = jnp.einsum("bkgs,bksh->bkgh", probs[..., :S], old[1])
    y = y + jnp.einsum("bkgs,bksh->bkgh", probs[..., S:], new[1])
    return y.reshape(B, 1, N, H)
