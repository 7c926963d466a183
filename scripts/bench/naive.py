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
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-(lengths.max() + max_new_tokens) // LENGTH_STEP) * LENGTH_STEP
    ids = np.zeros((len(prompts), width), np.int32)  # what lies right of the text is never seen
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = np.asarray(_continue(config, max_new_tokens, params, ids, lengths))
    return [row[n : n + max_new_tokens].tolist() for row, n in zip(out, lengths, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _continue(config: GPTConfig, max_new_tokens: int, params: dict, ids: jax.Array, lengths):
    model, rows = bind(config, params), jnp.arange(ids.shape[0])

    def append(step, ids):
        last = model.hidden(ids)[rows, lengths + step - 1]  # [B, D]
        new = jnp.argmax(model.logits(last), axis=-1).astype(ids.dtype)
        return ids.at[rows, lengths + step].set(new)

    return jax.lax.fori_loop(0, max_new_tokens, append, ids)
