"""The policy gradient: REINFORCE with an advantage per answer, normalised by token.

  loss = - sum over sampled tokens of logp * advantage / number of sampled tokens

Because -logp is the token's nll, this is the tiled cross entropy with other weights: it too never
holds all logits. On-policy, hence without ratios and clipping; no KL term and no division by the
spread of the rewards. Token by token, so a long answer weighs more than a short one (as in DAPO,
arXiv 2503.14476).
"""

import jax
import jax.numpy as jnp

from nanochat_jax.model.loss import cross_entropy_sum


def policy_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    advantages: jax.Array,
    vocab_size: int,
    tile: int,
) -> jax.Array:
    """The loss of a batch of answers, a float32 scalar.

    hidden [B, T, D] from the model; head [D, V]; targets [B, T], negative = not sampled (prompt,
    forced tool output, padding); advantages [B]: reward minus the mean reward of the question.
    tile: time steps whose logits exist at once.
    """
    sampled = jnp.maximum(jnp.sum(targets >= 0), 1).astype(jnp.float32)
    weights = jnp.broadcast_to(advantages[:, None] / sampled, targets.shape)  # [B, T]
    return cross_entropy_sum(hidden, head, targets, weights, vocab_size, tile)
