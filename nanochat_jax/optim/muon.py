"""Muon: momentum, orthogonalised. An Optax transform over matrices [..., in, out].

Momentum gives a matrix u per parameter; Muon steps along the nearest orthogonal matrix instead (all
singular values near 1), so that rare directions learn as fast as common ones. It comes from a few
odd matrix polynomials X <- aX + (b XX' + c (XX')^2) X, all matmuls.

  classic  Newton-Schulz, 5 times the same polynomial (https://kellerjordan.github.io/posts/muon)
  modern   rows equilibrated first; Polar Express polynomials (arXiv 2505.16932); renormalised
           (2602.21545); variance reduction per row or column (NorMuon, 2510.05491); decay only
           where it agrees with the step ("cautious")

Papers and upstream write weights [out, in]; ours are the transpose, so their "row" is our last dim.
A leaf may be a stack of matrices. No operation crosses the stack, so it can be split over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]  # of the step count

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
VARIANCE_DECAY = 0.9


class MuonState(NamedTuple):
    count: jax.Array  # [] int32, steps taken
    momentum: Any  # like the parameters
    variance: Any  # [..., 1, out] or [..., in, 1] per parameter; None in the classic form


def muon(
    learning_rate: Schedule,
    momentum: Schedule,
    weight_decay: Schedule,
    *,
    modern: bool,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """The transform, whose updates are added as they are; dtype: of the orthogonalisation."""

    def init(params):
        return MuonState(
            count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(jnp.zeros_like, params),
            variance=jax.tree.map(_variance_zeros, params) if modern else None,
        )

    def update(updates, state, params=None):
        assert params is not None  # decay and sizes need them
        lr, m, wd = (f(state.count) for f in (learning_rate, momentum, weight_decay))
        buf = jax.tree.map(lambda b, g: m * b + (1 - m) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda b, g: (1 - m) * g + m * b, buf, updates)

        if modern:
            pairs = jax.tree.map(partial(_modern_direction, dtype), nesterov, state.variance)
            directions, variance = (
                jax.tree.map(lambda _, pair, i=i: pair[i], nesterov, pairs) for i in (0, 1)
            )
        else:
            directions = jax.tree.map(partial(_classic_direction, dtype), nesterov)
            variance = None

        def step(x, p):
            size = lr * max(1.0, p.shape[-1] / p.shape[-2]) ** 0.5
            return -size * (x + wd * p * (x * p >= 0).astype(p.dtype) if modern else x)

        return jax.tree.map(step, directions, params), MuonState(state.count + 1, buf, variance)

    return optax.GradientTransformation(init, update)


def orthogonalise(x: jax.Array, polynomials) -> jax.Array:
    """Drive the singular values of x [..., m, n], all at most 1, towards 1."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix is then the smaller one
        x = jnp.swapaxes(x, -1, -2)
    for a, b, c in polynomials:
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _classic_direction(dtype, u: jax.Array) -> jax.Array:
    x = u / (_frobenius(u) + 1e-7)
    return orthogonalise(x.astype(dtype), NEWTON_SCHULZ).astype(u.dtype)


def _modern_direction(dtype, u: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    fan_in, fan_out = u.shape[-2:]
    row_norm = jnp.sqrt(jnp.sum(u * u, axis=-2, keepdims=True))  # [..., 1, out]
    u = u * (_frobenius(u) / fan_out**0.5) / jnp.maximum(row_norm, 1e-6)
    x = (u / (1.01 * _frobenius(u) + 1e-6)).astype(dtype)
    x = orthogonalise(x, POLAR_EXPRESS).astype(u.dtype)
    x = x * (min(fan_in, fan_out) ** 0.5 / jnp.maximum(_frobenius(x), 1e-7))
    axis = -2 if fan_out >= fan_in else -1
    second_moment = jnp.mean(x * x, axis=axis, keepdims=True)
    variance = VARIANCE_DECAY * variance + (1 - VARIANCE_DECAY) * second_moment
    scaled = x * jax.lax.rsqrt(jnp.maximum(variance, 1e-10))
    return scaled * (_frobenius(x) / jnp.maximum(_frobenius(scaled), 1e-10)), variance


def _frobenius(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def _variance_zeros(p: jax.Array) -> jax.Array:
    *stack, fan_in, fan_out = p.shape
    kept = (1, fan_out) if fan_out >= fan_in else (fan_in, 1)
    return jnp.zeros((*stack, *kept), p.dtype)
