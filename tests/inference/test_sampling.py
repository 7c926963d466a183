"""Sampling against probabilities worked out in NumPy, over many seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from nanochat_jax.inference.sampling import Needs, Settings, argmax, noise, sample, threefry

LOGITS = np.array([1.2, -0.3, 2.0, 0.1, 1.9, -2.0, 0.6, 1.2], np.float32)
DRAWS = 4000


def plain_probs(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probability of each id, one id after the other."""
    order = sorted(range(len(LOGITS)), key=lambda i: -LOGITS[i])
    weights = {i: np.exp(float(LOGITS[i]) / temperature) for i in order[: top_k or None]}
    total, kept, so_far = sum(weights.values()), {}, 0.0
    for i, weight in weights.items():  # most likely first
        if so_far < top_p:
            kept[i] = weight
        so_far += weight / total
    return np.array([kept.get(i, 0.0) for i in range(len(LOGITS))]) / sum(kept.values())


def draw(ways, seeds, positions, needs: Needs) -> np.ndarray:
    """Ids [ways, DRAWS]; all ways stand in one batch."""
    rows = len(ways) * DRAWS
    temperature, top_k, top_p = (np.repeat(column, DRAWS) for column in zip(*ways, strict=True))
    seed = np.zeros((rows, 2), np.uint32)
    seed[:, 1] = np.tile(seeds, len(ways))
    settings = Settings(seed, np.float32(temperature), np.int32(top_k), np.float32(top_p))
    position = jnp.asarray(np.tile(positions, len(ways)), jnp.int32)
    logits = jnp.broadcast_to(LOGITS, (rows, len(LOGITS)))
    drawn = jax.jit(sample, static_argnums=3)(logits, settings, position, needs)
    return np.asarray(drawn).reshape(len(ways), DRAWS)


WAYS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (0.7, 0, 0.6), (1.5, 5, 0.8), (1.0, 4, 0.01)]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_ids_come_up_as_often_as_they_should(vary):
    count, still = np.arange(DRAWS), np.zeros(DRAWS, int)
    seeds, positions = (count, still) if vary == "seed" else (still, count)
    drawn = draw(WAYS, seeds, positions, Needs(untruncated=True, candidates=8))
    for way, ids in zip(WAYS, drawn, strict=True):
        probs, found = plain_probs(*way), np.bincount(ids, minlength=len(LOGITS))
        assert not found[probs == 0].any(), way
        expected = DRAWS * probs[probs > 0]
        chi_square = np.sum((found[probs > 0] - expected) ** 2 / expected)
        freedom = len(expected) - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 1e-9, (way, chi_square)


def test_truncation_and_company_do_not_change_the_noise():
    """A draw that truncation allows is the draw itself; temperature 0 is the largest."""
    seeds, positions = np.arange(DRAWS), np.full(DRAWS, 5)
    ways = [(1.0, 0, 1.0), (1.0, 3, 1.0), (0.0, 3, 0.5), (0.0, 0, 1.0)]
    free, three, *greedy = draw(ways, seeds, positions, Needs(True, 8))
    allowed = np.isin(free, np.flatnonzero(plain_probs(1.0, 3, 1.0)))
    assert 0.3 < allowed.mean() < 0.9
    np.testing.assert_array_equal(three[allowed], free[allowed])
    assert (np.array(greedy) == LOGITS.argmax()).all()
    np.testing.assert_array_equal(draw(ways[:1], seeds, positions, Needs(True, 0))[0], free)
    np.testing.assert_array_equal(draw(ways[1:2], seeds, positions, Needs(False, 4))[0], three)


def test_threefry_is_the_one_under_jax_random():
    key = jnp.array([0x12345678, 0x9ABCDEF0], jnp.uint32)
    counter = jnp.arange(2_000, dtype=jnp.uint32) * jnp.uint32(2_654_435_761)
    expected = threefry_2x32(key, counter)
    ours = threefry(key[0], key[1], counter[:1000], counter[1000:])
    np.testing.assert_array_equal(jnp.concatenate(ours), expected)


def test_noise_is_gumbel_and_another_one_for_every_seed_position_and_id():
    seed = jnp.stack([jnp.zeros(64, jnp.uint32), jnp.arange(64, dtype=jnp.uint32) // 8], axis=1)
    drawn = np.asarray(noise(seed, jnp.arange(64, dtype=jnp.int32) % 8, jnp.arange(512)[None]))
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # 24 bits: a few meet by chance
    assert drawn.mean() == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    assert drawn.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
    one = noise(seed[9:10], jnp.array([1], jnp.int32), jnp.array([[7, 300]]))
    np.testing.assert_array_equal(one[0], drawn[9, [7, 300]])


def test_argmax_takes_the_first_of_equals():
    x = np.array([[0, 3, 3], [-np.inf, -np.inf, -1], [2, 1, 2]], np.float32)
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))
