"""The cache against plain attention over the whole history, through bursts of any length."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import kv_cache
from nanochat_jax.model.attention import attention_naive
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh

B, N, K, H, STEPS = 3, 4, 2, 8, 4


class OneLayer(GPTConfig):
    """Sees `seq_len` earlier positions, or all where that is 0."""

    def sees(self, layer: int) -> int | None:
        return self.seq_len or None


def config_of(window: int | None) -> GPTConfig:
    return OneLayer(64, 1, N * H, N, K, seq_len=window or 0)


@pytest.mark.parametrize("window", [None, 4, 9], ids=["all", "ring", "longer ring"])
def test_attention_over_cache_and_burst_is_attention_over_the_history(window):
    """Rows at different positions write bursts, keep parts of them, and the cache grows."""
    rng = np.random.default_rng(0)
    config = config_of(window)
    T = 60
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    k, v = rng.standard_normal((2, B, T, K, H)).astype(np.float32)
    expected = np.asarray(attention_naive(*map(jnp.asarray, (q, k, v)), window))
    attend = jax.jit(kv_cache.attend, static_argnames="window")
    merge = jax.jit(kv_cache.merge)

    length, start = 16, np.array([0, 3, 11])
    cache = kv_cache.empty_cache(config, B, length)
    for first in range(0, 12, STEPS):  # prompts, a piece at a time, all its queries at once
        piece = slice(first, first + STEPS)
        new = tuple(jnp.swapaxes(jnp.asarray(a[:, piece]), 1, 2) for a in (k, v))
        at = jnp.full(B, first)
        y = attend(jnp.asarray(q[:, piece]), cache[0], new, window=window, start=at, step=0)
        longer = start >= first  # of these all that lies before is in the cache
        np.testing.assert_allclose(y[longer], expected[longer, piece], atol=1e-5)
        cache = merge(cache, [new], at, jnp.clip(start - first, 0, STEPS))
    rounds = 0
    while start.max() + STEPS <= T:
        if start.max() + STEPS > length:
            length *= 2
            cache = kv_cache.resize(config, length, cache)
        new = (jnp.full((B, K, STEPS, H), 9.0), jnp.full((B, K, STEPS, H), 9.0))
        for step in range(STEPS):
            at = start + step
            one = [jnp.asarray(a[np.arange(B), at])[:, :, None] for a in (k, v)]  # [B, K, 1, H]
            new = tuple(a.at[:, :, step : step + 1].set(b) for a, b in zip(new, one, strict=True))
            y = attend(
                jnp.asarray(q[np.arange(B), at])[:, None],
                cache[0],
                new,
                window=window,
                start=jnp.asarray(start),
                step=jnp.int32(step),
            )
            np.testing.assert_allclose(y[:, 0], expected[np.arange(B), at], atol=1e-5)
        count = rng.integers(STEPS + 1, size=B)  # what a row keeps; 0: it stood still
        cache = merge(cache, [new], jnp.asarray(start), jnp.asarray(count))
        start, rounds = start + count, rounds + 1
    assert rounds > 10 and start.min() > 2 * (window or 1)  # round the ring more than twice


def test_what_a_ring_holds():
    """Against a ring that is written position by position."""
    for size in (1, 3, 8):
        ring = np.full(size, -1)
        for written in range(20):
            ours = np.asarray(kv_cache.held(size, jnp.array([written])))[0]
            np.testing.assert_array_equal(np.where(ours < 0, -1, ours), ring)
            ring[written % size] = written


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shards", [0, 1, 2])
def test_new_keys_go_to_the_slots_they_are_meant_for_and_no_others(window, shards):
    """Also where slots, and the rows with the new keys, are split over devices."""
    mesh = make_mesh(data=shards, tensor=2, devices=jax.devices()[: 2 * shards]) if shards else None
    with jax.set_mesh(mesh) if mesh else nullcontext():
        _check_new_keys(window)


def _check_new_keys(window):
    config, T, missing = config_of(window), 4, 4
    cache = jax.tree.map(lambda a: a - 7, kv_cache.empty_cache(config, 4, 16))
    fresh = jnp.arange(2 * K * T * H, dtype=jnp.float32).reshape(2, K, T, H)
    start, count = np.array([3, 9]), np.array([4, 2])
    source, slots = np.array([1, 0, 1, 0]), np.array([0, 2, 3, missing])
    where = (jnp.asarray(a) for a in (start, count, slots, source))
    cache = jax.jit(kv_cache.merge)(cache, [(fresh, -fresh)], *where)
    expected = np.full(cache[0][0].shape, -7.0)
    for slot, row in ((0, 1), (2, 0), (3, 1)):
        for step in range(count[row]):
            expected[slot, :, (start[row] + step) % (window or 16)] = fresh[row, :, step]
    np.testing.assert_array_equal(cache[0][0], expected)
    np.testing.assert_array_equal(cache[0][1][expected != -7], -expected[expected != -7])
    taken = jax.jit(kv_cache.take_slots)(cache, jnp.array([0, 2]))
    np.testing.assert_array_equal(taken[0][0], expected[[0, 2]])
