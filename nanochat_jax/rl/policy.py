"""The policy gradient: REINFORCE with an advantage per answer, normalised by token.

  loss of a pass = - sum over sampled tokens of logp * advantage / number of sampled tokens
  loss of a step = the mean over passes of `pass_rows` answers to one question

This is the tiled cross entropy with other weights. On-policy, hence without ratios and clipping; no
KL term, no division by the spread of the rewards; token weights as in DAPO (arXiv 2503.14476).
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.loss import cross_entropy_sum


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean reward of the question; rewards [questions, samples]."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def token_weights(targets, advantages, pass_rows: int):
    """float32 [B, T]: what each token's nll counts for in the loss of a step.

    targets [B, T], negative = not sampled (prompt, forced tool output, padding); advantages [B].
    Every `pass_rows` rows are a pass; numpy and JAX arrays both do.
    """
    num_passes = len(targets) // pass_rows
    passes = (targets >= 0).reshape(num_passes, -1)
    sampled = passes.sum(axis=1).clip(1).astype(np.float32)  # [passes]
    scale = advantages.reshape(num_passes, pass_rows) / (sampled[:, None] * num_passes)
    return scale.reshape(-1, 1) * (targets >= 0).astype(np.float32)


def policy_loss(hidden, head, targets, advantages, vocab_size: int, tile: int) -> jax.Array:
    """The loss of one pass, a float32 scalar; targets and advantages as in `token_weights`.

    hidden [B, T, D]; head [D, V]; tile: time steps whose logits exist at once.
    """
    weights = token_weights(targets, advantages, len(targets)).astype(jnp.float32)
    return cross_entropy_sum(hidden, head, targets, weights, vocab_size, tile)
