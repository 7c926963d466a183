"""Sampling against probabilities worked out in NumPy, over many seeds."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from nanochat_jax.inference.sampling import (
    Settings,
    argmax,
    far,
    farthest,
    most_likely,
    noise,
    sample,
    threefry,
)
from nanochat_jax.model.sharding import make_mesh

LOGITS = np.array([1.2, -0.3, 2.0, 0.1, 1.9, -2.0, 0.6, 1.2], np.float32)
DRAWS = 4000


def plain_probs(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probability of each id, one id after the other; equals are kept or dropped together."""
    above = [sum(LOGITS > logit) for logit in LOGITS]
    weights = np.exp(LOGITS.astype(float) / temperature) * (np.array(above) < (top_k or 99))
    kept = {}
    for i, weight in enumerate(weights):
        if weights[LOGITS > LOGITS[i]].sum() < top_p * weights.sum() and weight:
            kept[i] = weight
    return np.array([kept.get(i, 0.0) for i in range(len(LOGITS))]) / sum(kept.values())


def draw(ways, seeds, positions, said=None, mesh=None) -> np.ndarray:
    """Ids [ways, DRAWS]; all ways stand in one batch."""
    rows = len(ways) * DRAWS
    columns = [np.repeat(column, DRAWS) for column in zip(*ways, strict=True)]
    temperature, top_k, top_p, presence, frequency = [*columns, *np.zeros((2, rows))][:5]
    seed = np.zeros((rows, 2), np.uint32)
    seed[:, 1] = np.tile(seeds, len(ways))
    floats = (np.float32(column) for column in (top_p, presence, frequency))
    settings = Settings(seed, np.float32(temperature), np.int32(top_k), *floats)
    position = jnp.asarray(np.tile(positions, len(ways)), jnp.int32)
    logits = jnp.broadcast_to(LOGITS, (rows, len(LOGITS)))
    said = jnp.broadcast_to(np.zeros_like(LOGITS) if said is None else said, logits.shape)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        drawn = jax.jit(sample)(logits, said, settings, position)
    return np.asarray(drawn).reshape(len(ways), DRAWS)


WAYS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (0.7, 0, 0.6), (1.5, 5, 0.8), (1.0, 4, 0.01)]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_ids_come_up_as_often_as_they_should(vary):
    count, still = np.arange(DRAWS), np.zeros(DRAWS, int)
    seeds, positions = (count, still) if vary == "seed" else (still, count)
    drawn = draw(WAYS, seeds, positions)
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
    free, three, *greedy = draw(ways, seeds, positions)
    allowed = np.isin(free, np.flatnonzero(plain_probs(1.0, 3, 1.0)))
    assert 0.3 < allowed.mean() < 0.9
    np.testing.assert_array_equal(three[allowed], free[allowed])
    assert (np.array(greedy) == LOGITS.argmax()).all()
    np.testing.assert_array_equal(draw(ways[:1], seeds, positions)[0], free)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    np.testing.assert_array_equal(draw(ways[1:2], seeds, positions, mesh=mesh)[0], three)


def test_what_was_said_becomes_less_likely():
    said, seeds = np.array([0, 0, 3, 0, 1, 0, 0, 0], np.float32), np.arange(DRAWS)
    (ours,) = draw([(1.0, 0, 1.0, 0.5, 0.25)], seeds, np.zeros(DRAWS, int), said)
    lowered = LOGITS - 0.5 * (said > 0) - 0.25 * said
    expected = DRAWS * np.exp(lowered) / np.exp(lowered).sum()
    chi_square = np.sum((np.bincount(ours, minlength=8) - expected) ** 2 / expected)
    assert chi_square < 7 + 4 * 14**0.5


@pytest.mark.parametrize("top_k, top_p", [(30, 1.0), (0, 0.3), (40, 0.7)])
def test_thresholds_of_large_vocabularies(top_k, top_p):
    """No draw lies outside what sorting keeps, and all of that is drawn from."""
    rng = np.random.default_rng(0)
    logits = (15 * np.tanh(rng.standard_normal(300) / 3)).astype(np.float32)
    order = np.argsort(-logits)
    probs = np.exp(logits[order].astype(np.float64))[: top_k or None]
    kept = order[: len(probs)][np.cumsum(probs) - probs < top_p * probs.sum()]
    rows = 4_000
    seed = np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32)
    column = lambda value, dtype: np.full(rows, value, dtype)  # noqa: E731
    zero, settings = column(0, np.float32), (seed, column(9.0, np.float32), column(top_k, np.int32))
    settings = Settings(*settings, column(top_p, np.float32), zero, zero)
    hot = jnp.broadcast_to(9 * logits, (rows, len(logits)))  # temperature 9 of 9 x logits
    drawn = jax.jit(sample)(hot, jnp.zeros_like(hot), settings, jnp.zeros(rows, jnp.int32))
    assert set(np.asarray(drawn).tolist()) == set(kept.tolist())


@pytest.mark.parametrize("limit", [1.0, 3.0, 17.5, 1e9, np.inf])
def test_a_gpus_few_passes_find_what_bit_by_bit_is_found(limit):
    """And that is what sorting finds, where ids are not alike and some are banned."""
    rng = np.random.default_rng(1)
    scores = -np.abs(rng.standard_normal((4, 500)) * [[1e-3], [1], [30], [1e9]]).astype(np.float32)
    scores[:, 0], scores[:, 7:9] = 0, -np.inf
    weights = rng.uniform(size=scores.shape).astype(np.float32)
    args = scores, weights, np.full(4, limit, np.float32)
    slow, fast = (jax.jit(farthest, static_argnums=3)(*args, bits) for bits in (1, 4))
    np.testing.assert_array_equal(slow, fast)
    kept = np.where(far(scores) <= fast, weights, 0)
    order = np.argsort(-scores, axis=-1)
    sums = np.cumsum(np.take_along_axis(weights, order, -1).astype(np.float64), -1)
    expected = np.minimum((sums < limit).sum(-1), 499)
    total = np.take_along_axis(sums, expected[:, None], -1)[:, 0]
    np.testing.assert_allclose(kept.sum(-1), total, rtol=1e-5)


def test_the_most_likely_ids_come_in_order():
    logprobs = jax.random.normal(jax.random.key(0), (3, 2, 50))
    ids, values = jax.jit(most_likely)(logprobs, jnp.int32(4))
    expected = np.argsort(-np.asarray(logprobs), axis=-1)[..., :4]
    np.testing.assert_array_equal(ids[..., :4], expected)
    np.testing.assert_array_equal(
        values[..., :4], np.take_along_axis(np.asarray(logprobs), expected, -1)
    )
    assert not ids[..., 4:].any()


def test_threefry_is_the_one_under_jax_random():
    key = jnp.array([0x12345678, 0x9ABCDEF0], jnp.uint32)
    counter = jnp.arange(2_000, dtype=jnp.uint32) * jnp.uint32(2_654_435_761)
    expected = threefry_2x32(key, counter)
    ours = threefry(key[0], key[1], counter[:1000], counter[1000:])
    np.testing.assert_array_equal(jnp.concatenate(ours), expected)


def test_noise_is_gumbel_and_another_one_for_every_seed_position_and_id():
    seed = jnp.stack([jnp.zeros(64, jnp.uint32), jnp.arange(64, dtype=jnp.uint32) // 8], axis=1)
    drawn = np.asarray(noise(seed, jnp.arange(64, dtype=jnp.int32) % 8, jnp.arange(512)[None]))
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # 23 bits: a few meet by chance
    assert drawn.mean() == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    assert drawn.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
    one = noise(seed[9:10], jnp.array([1], jnp.int32), jnp.array([[7, 300]]))
    np.testing.assert_array_equal(one[0], drawn[9, [7, 300]])


def test_noise_is_finite_where_all_its_bits_are_ones():
    """Infinite, it would let the id win, or the row fail where the id is cut off."""
    seed, at, id = jnp.array([[0, 1]], jnp.uint32), jnp.array([97]), 34428
    bits, _ = threefry(jnp.uint32(0), jnp.uint32(1), jnp.uint32(97), jnp.uint32(id))
    assert int(bits) >> 8 == 2**24 - 1
    (drawn,) = noise(seed, at, jnp.array([[id]]))[0]
    assert float(drawn) == pytest.approx(-np.log(2.0**-24), abs=0.01)


def test_extreme_settings_leave_the_most_likely_id():
    logits = np.random.default_rng(0).standard_normal((1, 2_000)).astype(np.float32)
    logits[0, 7] = best = logits.max() + 1
    logits[0, 3] = np.nextafter(best, np.float32(0))  # a hair less likely
    ways = [(1e-42, 0, 1.0), (1e-8, 0, 1.0), (1.0, 1, 1.0), (1e6, 1, 1.0), (1.0, 1, 1e-6)]
    rows = [[way] * 20 for way in ways]
    temperature, top_k, top_p = (np.float32(a) for a in np.array(rows).reshape(-1, 3).T)
    seed, zero = np.arange(200, dtype=np.uint32).reshape(100, 2), np.zeros(100, np.float32)
    settings = Settings(seed, temperature, top_k.astype(np.int32), top_p, zero, zero)
    many = jnp.broadcast_to(logits, (100, 2_000))
    drawn = sample(many, jnp.zeros_like(many), settings, jnp.arange(100))
    np.testing.assert_array_equal(drawn, logits[0].argmax())


def test_argmax_takes_the_first_of_equals():
    x = np.array([[0, 3, 3], [-np.inf, -np.inf, -1], [2, 1, 2]], np.float32)
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))
