"""Bits per byte: how well a model compresses text, whatever its vocabulary.

  bpb = sum of nll over counted targets / (ln 2 * sum of their bytes)

Counted are targets that stand for bytes: special tokens and ignored positions are not. Lengths come
from the tokenizer's byte table, so tokens that are half a character count what they weigh.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.loss import token_nll
from nanochat_jax.model.sharding import ROWS


def make_bpb(
    config: GPTConfig, mesh: Mesh, token_bytes: np.ndarray, tile: int
) -> Callable[[dict, Iterable[dict]], float]:
    """A function (params, batches of global arrays) -> bits per byte.

    token_bytes: int [vocab_size]. tile: time steps whose logits exist at once.
    """
    padded = np.zeros(config.padded_vocab_size, np.int32)
    padded[: len(token_bytes)] = token_bytes
    table = jax.device_put(padded, NamedSharding(mesh, P()))

    @jax.jit
    def sums(params, batch):
        targets = jax.lax.with_sharding_constraint(batch["targets"], NamedSharding(mesh, ROWS))
        hidden = bind(config, params).hidden(batch["inputs"])
        nll = token_nll(hidden, params["lm_head.kernel"], targets, config.vocab_size, tile)
        num_bytes = jnp.where(targets >= 0, table[jnp.maximum(targets, 0)], 0)
        return jnp.sum(jnp.where(num_bytes > 0, nll, 0.0)), jnp.sum(num_bytes)

    def bpb(params, batches: Iterable[dict]) -> float:
        with jax.set_mesh(mesh):
            parts = [sums(params, batch) for batch in batches]
        nats = sum(float(n) for n, _ in parts)
        num_bytes = sum(int(b) for _, b in parts)
        return nats / (math.log(2) * num_bytes)

    return bpb
