"""The tiled cross entropy against its definition, to the last gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum, token_nll

B, T, D, V, VOCAB = 3, 11, 8, 64, 50  # 14 padded columns
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, T, D)), jnp.float32) * 4
HEAD = jnp.asarray(RNG.standard_normal((D, V)), jnp.float32) * 2  # logits up to the softcap
TARGETS = np.where(RNG.random((B, T)) < 0.3, -1, RNG.integers(VOCAB, size=(B, T))).astype(np.int32)
WEIGHTS = jnp.asarray(RNG.standard_normal((B, T)), jnp.float32)


def naive_sum(x, head, targets, weights):
    return jnp.sum(cross_entropy_naive(x, head, targets, VOCAB) * weights)


def tiled(tile):
    return lambda *args: cross_entropy_sum(*args, VOCAB, tile)


def value_and_grads(function, *args):
    return jax.jit(jax.value_and_grad(function, (0, 1)))(*args)


def assert_same(ours, expected, atol=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_the_naive_form_is_the_definition():
    """logsumexp of the capped logits minus the target's, in float64."""
    x, head = np.asarray(X, np.float64), np.asarray(HEAD, np.float64)[:, :VOCAB]
    capped = 15 * np.tanh(x @ head / 15)
    picked = np.take_along_axis(capped, np.maximum(TARGETS, 0)[..., None], -1)[..., 0]
    nll = np.log(np.exp(capped).sum(-1)) - picked
    expected = np.where(TARGETS >= 0, nll, 0)
    np.testing.assert_allclose(cross_entropy_naive(X, HEAD, TARGETS, VOCAB), expected, atol=1e-5)


@pytest.mark.parametrize(("tile", "columns"), [(1, V), (4, V), (4, VOCAB), (T, V), (100, V)])
def test_tiled_equals_naive_with_gradients(tile, columns):
    """Tiles that divide T and that do not, ignored targets, weights, a padded vocabulary or not."""
    args = (X, HEAD[:, :columns], TARGETS, WEIGHTS)
    assert_same(value_and_grads(tiled(tile), *args), value_and_grads(naive_sum, *args))
    nll = jax.jit(token_nll, static_argnums=(3, 4))(*args[:3], VOCAB, tile)
    np.testing.assert_allclose(nll, cross_entropy_naive(*args[:3], VOCAB), atol=1e-5)


def test_padded_columns_are_no_candidates_and_learn_nothing():
    loud = HEAD.at[:, VOCAB:].set(100.0)
    loss, (_, d_head) = value_and_grads(tiled(4), X, HEAD, TARGETS, WEIGHTS)
    loud_loss, (_, d_loud) = value_and_grads(tiled(4), X, loud, TARGETS, WEIGHTS)
    assert float(loss) == float(loud_loss)
    assert not np.any(d_loud[:, VOCAB:]) and np.all(np.any(d_head[:, :VOCAB], axis=0))


def test_nothing_to_learn_from_is_zero_and_finite():
    nothing = np.full((B, T), -1, np.int32)
    loss, grads = value_and_grads(tiled(4), X, HEAD, nothing, WEIGHTS)
    assert float(loss) == 0 and not any(np.any(g) for g in grads)


def test_bfloat16_stays_near_float32():
    """Inputs rounded to 8 bits: the mean loss moves by less than a percent."""
    weights = jnp.full((B, T), 1 / (TARGETS >= 0).sum(), jnp.float32)
    exact, (_, d_head) = value_and_grads(tiled(4), X, HEAD, TARGETS, weights)
    rounded, (dx, d_rounded) = value_and_grads(
        tiled(4), X.astype(jnp.bfloat16), HEAD, TARGETS, weights
    )
    assert float(rounded) == pytest.approx(float(exact), rel=0.01)
    assert dx.dtype == jnp.bfloat16 and d_rounded.dtype == jnp.float32
    np.testing.assert_allclose(d_rounded, d_head, atol=0.02 * float(jnp.abs(d_head).max()))


def test_the_logits_never_exist_at_once():
    """The compiled program's own account of its memory, against the naive form's."""
    B, T, D, V, tile = 4, 64, 8, 512, 4
    shapes = [((B, T, D), jnp.float32), ((D, V), jnp.float32)]
    shapes += [((B, T), jnp.int32), ((B, T), jnp.float32)]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def temporary_bytes(function):
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporary_bytes(lambda *a: cross_entropy_sum(*a, V, tile)) < logits / 2
    naive = temporary_bytes(lambda x, h, t, w: jnp.sum(cross_entropy_naive(x, h, t, V) * w))
    assert naive >= logits
