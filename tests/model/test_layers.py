"""The parts of the model against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.layers import Embedding, Linear, rms_norm, rotary_tables, rotate, scaled

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_rms_norm_is_its_definition():
    x = draw(3, 5, 16).astype(np.float64) * 7
    x[0, 0] = 0
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.finfo(np.float32).eps)
    np.testing.assert_allclose(rms_norm(jnp.float32(x)), expected, rtol=1e-6)
    assert not np.any(rms_norm(jnp.zeros((2, 8))))


def test_rms_norm_sums_in_float32():
    """4,096 squares do not add up in 8 bits of mantissa; the result keeps its dtype."""
    x = jnp.full((1, 4096), 16, jnp.bfloat16)
    out = rms_norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, rtol=2**-8)


def test_weights_are_cast_where_they_are_used():
    x, kernel, table = draw(2, 3, 8), draw(8, 4), draw(5, 8)
    out = Linear(jnp.asarray(kernel))(jnp.bfloat16(x))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), x @ kernel, atol=0.1)
    np.testing.assert_allclose(Linear(jnp.asarray(kernel))(jnp.asarray(x)), x @ kernel, atol=1e-5)
    rows = Embedding(jnp.asarray(table))(jnp.array([[4, 0]]), jnp.float32)
    np.testing.assert_array_equal(rows, table[[[4, 0]]])


def test_gradients_of_few_numbers_add_up_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    ids = jnp.zeros((4, 1024), jnp.int32)

    def looked_up(table):
        return jnp.sum(Embedding(table)(ids, jnp.bfloat16).astype(jnp.float32))

    def multiplied(scale):
        return jnp.sum(scaled(jnp.ones((4, 1024), jnp.bfloat16), scale).astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(looked_up)(jnp.ones((8, 2)))[0], [4096, 4096])
    np.testing.assert_array_equal(jax.grad(multiplied)(jnp.ones(())), 4096)


def test_rotation_turns_by_minus_the_angle():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)  # the pairs (1, 0) and (0, 2)
    out = rotate(x, *rotary_tables(jnp.array([3]), 4, base=100.0))
    first, second = 3.0, 3.0 * 100.0 ** (-2 / 4)
    expected = [np.cos(first), 2 * np.sin(second), -np.sin(first), 2 * np.cos(second)]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)
