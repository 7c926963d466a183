"""Generation by full forward passes: the plainest form, right by construction.

Every new token runs the whole model over prompt and answer again. It is what the engine is tested
and measured against.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.gpt import GPTConfig, bind

LENGTH_STEP = 64  # rows are padded to a multiple of it, so that few shapes are compiled


def generate_greedy(
    config: GPTConfig, params: dict, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The most likely continuation of each prompt (ids, not empty): lists of max_new_tokens ids."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = -(-(lengths.max() + max_new_tokens) // LENGTH_STEP) * LENGTH_STEP
    ids = np.zeros((len(prompts), width), np.int32)  # what lies right of the text is never seen
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for position in lengths + np.arange(max_new_tokens)[:, None]:  # of the next token in each row
        ids[rows, position] = _next(config, params, ids, position)
    return [row[n : n + max_new_tokens].tolist() for row, n in zip(ids, lengths, strict=True)]


@partial(jax.jit, static_argnums=0)
def _next(config: GPTConfig, params: dict, ids: jax.Array, position: jax.Array) -> jax.Array:
    model = bind(config, params)
    last = model.hidden(ids)[jnp.arange(len(ids)), position - 1]  # [B, D]
    return jnp.argmax(model.logits(last), axis=-1)
