"""The cache against plain attention over the whole history, through bursts of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import kv_cache
from nanochat_jax.model.attention import attention_naive
from nanochat_jax.model.gpt import GPTConfig

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
    prompts = [jnp.swapaxes(a[:, :12], 1, 2) for a in (k, v)]
    cache = kv_cache.insert(
        cache, [tuple(prompts)], jnp.asarray(start), jnp.arange(B), jnp.array([0, 1, 2])
    )
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
def test_a_prompt_goes_to_the_slots_it_was_meant_for_and_no_others(window):
    config, T = config_of(window), 8
    cache = jax.tree.map(lambda a: a - 7, kv_cache.empty_cache(config, 4, 16))
    fresh = jnp.arange(2 * K * T * H, dtype=jnp.float32).reshape(2, K, T, H)
    lengths, missing = jnp.array([8, 6]), 4
    source, slots = jnp.array([1, 0, 1, 0]), jnp.array([0, 2, 3, missing])
    cache = kv_cache.insert(cache, [(fresh, -fresh)], lengths, source, slots)
    keys, values = (np.asarray(a) for a in cache[0])
    size = keys.shape[2]
    assert size == (window or 16)
    assert (keys[1] == -7).all()
    for slot, row in ((0, 1), (2, 0), (3, 1)):
        for position in range(max(0, int(lengths[row]) - size), int(lengths[row])):
            kept = keys[slot, :, position % size]
            np.testing.assert_array_equal(kept, fresh[row, :, position])
            np.testing.assert_array_equal(values[slot, :, position % size], -kept)
