"""The policy gradient's loss against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.rl.policy import policy_loss

B, T, D, VOCAB = 3, 7, 8, 60
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.standard_normal((B, T, D)), jnp.float32)
HEAD = jnp.asarray(RNG.standard_normal((D, 64)), jnp.float32)
SAMPLED = np.where(np.arange(T) < [[2], [4], [1]], -1, RNG.integers(VOCAB, size=(B, T)))
TARGETS = SAMPLED.astype(np.int32)
ADVANTAGES = jnp.array([0.75, -0.25, -0.5])


def by_formula(hidden, head):
    log_probs = jax.nn.log_softmax(15 * jnp.tanh((hidden @ head)[..., :VOCAB] / 15))
    places = np.argwhere(TARGETS >= 0)
    return -sum(log_probs[r, t, TARGETS[r, t]] * ADVANTAGES[r] for r, t in places) / len(places)


def test_equals_the_formula_with_gradients():
    def ours(hidden, head):
        return policy_loss(hidden, head, TARGETS, ADVANTAGES, VOCAB, 3)

    found, expected = (
        jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(HIDDEN, HEAD))
        for loss in (ours, by_formula)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("advantages, targets", [(jnp.zeros(B), TARGETS), (ADVANTAGES, -1)])
def test_nothing_to_learn_is_a_zero_gradient(advantages, targets):
    """All answers equally good, or nothing sampled at all."""
    targets = jnp.broadcast_to(jnp.asarray(targets, jnp.int32), (B, T))
    loss, grad = jax.value_and_grad(
        lambda head: policy_loss(HIDDEN, head, targets, advantages, VOCAB, 3)
    )(HEAD)
    assert float(loss) == 0 and not np.any(grad)
