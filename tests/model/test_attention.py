"""Attention against its definition, and against windows and groups that can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.model.attention import MIN_BLOCK, attention, attention_naive, choose_backend

T = 10


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("window", [None, 0, 3, T - 2, T - 1, T, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_definition_with_gradients(window, kv_heads):
    qkv = draw(2, T, 4, 8), draw(2, T, kv_heads, 8, seed=1), draw(2, T, kv_heads, 8, seed=2)
    mix = draw(2, T, 4, 8, seed=3)

    def both(*qkv):
        def value_and_grads(function):
            def total(*qkv):
                return jnp.sum(function(*qkv, window) * mix)

            return function(*qkv, window), jax.grad(total, (0, 1, 2))(*qkv)

        return value_and_grads(attention), value_and_grads(attention_naive)

    ours, naive = jax.jit(both)(*qkv)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(naive), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("window", [None, 0, 10, MIN_BLOCK, 100])
@pytest.mark.parametrize("length", [MIN_BLOCK, 2 * MIN_BLOCK + 22])
def test_blocks_see_what_they_should(window, length):
    q, k, v = draw(2, length, 4, 8), draw(2, length, 2, 8, seed=1), draw(2, length, 2, 8, seed=2)
    ours, naive = attention(q, k, v, window, "blocked"), attention_naive(q, k, v, window)
    np.testing.assert_allclose(ours, naive, atol=2e-6)


@pytest.mark.parametrize("function", [attention, attention_naive])
def test_a_window_of_w_sees_w_keys_and_its_own(function):
    """Equal scores and one-hot values: the output is the weight of each key."""
    window = 3
    nothing, values = jnp.zeros((1, T, 1, T)), jnp.eye(T)[None, :, None]
    weights = np.asarray(function(nothing, nothing, values, window))[0, :, 0]
    expected = np.zeros((T, T))
    for i in range(T):
        seen = range(max(0, i - window), i + 1)
        expected[i, list(seen)] = 1 / len(seen)
    np.testing.assert_allclose(weights, expected, atol=1e-7)


def test_a_backend_that_cannot_be_had_is_an_error():
    for name in ("flash", "cudnn"):
        with pytest.raises(UserError, match=name):
            choose_backend(name, jnp.dtype("float32"))
    assert choose_backend("xla", jnp.dtype("bfloat16")) == "xla"


def test_auto_is_the_fastest_that_a_machine_should_have(monkeypatch):
    best = {("gpu", "bfloat16"): "cudnn", ("gpu", "float32"): "xla"}
    best |= {("cpu", "bfloat16"): "blocked", ("tpu", "bfloat16"): "xla"}
    for (platform, dtype), backend in best.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert choose_backend("auto", jnp.dtype(dtype)) == backend
