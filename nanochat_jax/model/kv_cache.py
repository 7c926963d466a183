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
from nanochat_jax.model.sharding import ROW_AXES, ROWS

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


def take_slots(cache: Cache, slots) -> Cache:
    """The cache of some slots, [n, K, S, H]; any values for one that does not exist, or that lies
    with another row shard than its row does."""

    def take(cache, slots):
        slots = slots - _first_slot(cache)
        return jax.tree.map(lambda a: jnp.take(a, slots, axis=0, mode="clip"), cache)

    return _on_each_row_shard(take, ROWS, ROWS)(cache, jnp.asarray(slots))


def _on_each_row_shard(function, *in_specs: P):
    """With the rows that are its own; heads stay the compiler's affair."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=ROWS, axis_names=set(ROW_AXES))


def _first_slot(cache: Cache):
    """The number of the first slot of a row shard's cache."""
    inside = ROW_AXES[0] in jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.axis_index(ROW_AXES) * cache[0][0].shape[0] if inside else 0


def merge(cache: Cache, new: Cache, start, count, slots=None, source=None) -> Cache:
    """Write positions start .. start + count - 1, [B] each, of new keys and values [B, K, T, H],
    where T must not exceed the smallest ring.

    By default row i of them is slot i's. Else slots [m] get rows source [m]; a slot that does not
    exist gets nothing. No value that is not finite is written, as it would reach all texts that use
    the slot, also those that do not see it (0 * NaN); its key says so instead, to those that do.
    """
    step = jnp.arange(new[0][0].shape[2])

    def tell_by_key(kv):
        k, v = kv
        finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
        return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)

    def indices(old):
        size = old.shape[2]  # [B, T]
        return jnp.where(step < count[:, None], (start[:, None] + step) % size, size)

    def put(old, new):
        return jax.vmap(lambda row, kv, at: row.at[:, at].set(kv, mode="drop"))(
            old, new, indices(old)
        )

    def put_slots(cache, new, slots):
        first = _first_slot(cache)
        slots = jnp.where(slots < first, cache[0][0].shape[0], slots - first)  # none of ours

        def put(old, new):
            if isinstance(first, jax.Array):
                new = jax.lax.all_gather(new, ROW_AXES, tiled=True)
            rows = jnp.swapaxes(new, 1, 2)[source]  # [m, T, K, H]
            return old.at[slots[:, None], :, indices(old)[source]].set(rows, mode="drop")

        return jax.tree.map(put, cache, new)

    new = [tell_by_key(kv) for kv in new]
    if slots is None:
        return shard_cache(jax.tree.map(put, cache, new))
    return shard_cache(_on_each_row_shard(put_slots, ROWS, ROWS, P())(cache, new, slots))


def attend(q, old: KV, new: KV, *, window: int | None, start, step) -> jax.Array:
    """Queries of each row over its cache and over new keys: q [B, T, N, H] -> [B, T, N, H].

    old: k, v [B, K, S, H], the cache of a layer, which holds the positions before start [B];
    new: k, v [B, K, steps, H] of the positions from there on, written as far as the queries see.
    The queries are those of positions start + step, ..., start + step + T - 1.
    """
    B, T, N, H = q.shape
    K, S = old[0].shape[1:3]
    q = q * jnp.asarray(H**-0.5, q.dtype)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    step = step + jnp.arange(T)
    old_at = held(S, start)[:, None]  # [B, 1, S]
    ago = (start[:, None] + step)[..., None] - old_at  # [B, T, S]
    see_old = (old_at >= 0) & (True if window is None else ago <= window)
    ago = step[:, None] - jnp.arange(new[0].shape[2])  # [T, steps]
    see_new = (ago >= 0) & (True if window is None else ago <= window)
    see_old = jnp.broadcast_to(see_old, (B, T, S))
    seen = jnp.concatenate([see_old, jnp.broadcast_to(see_new, (B, *see_new.shape))], axis=2)

    scores = [
        jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)
        for k in (old[0], new[0])
    ]
    scores = jnp.concatenate(scores, axis=-1).reshape(B, K, N // K, T, -1)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(B, K, -1, scores.shape[-1])
    wide = partial(jnp.einsum, "bkgs,bksh->bkgh", preferred_element_type=jnp.float32)
    y = (wide(probs[..., :S], old[1]) + wide(probs[..., S:], new[1])).astype(q.dtype)
    return y.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
