"""The two programs a device runs to write texts: prefill and burst.

  prefill   prompts -> keys and values of all their positions but the last
  burst     a few tokens for every slot, one forward pass of one position each

The last token of a prompt is the first input of a burst. A slot pauses at an id that ends its text
or calls a tool, and when its budget is spent; what is computed for it after that is not kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.inference.sampling import Column, Needs, Settings, sample
from nanochat_jax.model import kv_cache
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.kv_cache import Cache


class SlotTable(NamedTuple):
    """Where each slot stands; int32 arrays of [B] but `forced` and `settings`."""

    token: Column  # the last one of the text, not yet in the cache
    previous: Column  # the one before it; -1: none
    position: Column  # of `token`
    budget: Column  # tokens the slot may get in this burst, at most `steps`; 0: an empty slot
    num_forced: Column
    forced: Column  # [B, steps]: these come first, whatever the model says
    settings: Settings


class Written(NamedTuple):
    tokens: jax.Array  # int32 [B, steps]
    logprobs: jax.Array  # float32 [B, steps], of the untempered model; 0 where forced
    count: jax.Array  # int32 [B]: how many of them the slot got


@partial(jax.jit, static_argnums=0)
def prefill(config: GPTConfig, params: dict, ids: jax.Array) -> Cache:
    """Keys and values [n, K, T, H] of every layer for prompts ids [n, T], padded on the right."""
    model = bind(config, params)

    def attend(layer, q, k, v):
        y, _ = model.attend(layer, q, k, v)
        return y, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [n, K, T, H]

    return model.run(ids, attend=attend)[1]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def burst(
    config: GPTConfig,
    pause_ids: tuple[int, ...],
    needs: Needs,
    params: dict,
    cache: Cache,
    table: SlotTable,
) -> tuple[Cache, Written]:
    """Write as many tokens as the budget of each slot, for which the cache must have room."""
    model = bind(config, params)
    B, most = table.forced.shape
    start, stops = jnp.asarray(table.position), jnp.array(pause_ids, jnp.int32)

    def step(carry):
        i, token, previous, running, written, new = carry
        position = start + i

        def attend(layer, q, k, v):
            kv = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [B, K, 1, H]
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=2)
            own, window = jax.tree.map(put, new[layer], kv), config.sees(layer)
            return kv_cache.attend(q, cache[layer], own, window=window, start=start, step=i), own

        x, new = model.run(
            token[:, None], positions=position[:, None], previous=previous[:, None], attend=attend
        )
        logits = model.logits(x[:, 0])  # [B, V]
        forced = i < table.num_forced
        drawn = sample(logits, table.settings, position, needs)
        drawn = jnp.where(forced, table.forced[:, i], drawn)
        said = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
        logprob = jnp.where(forced, 0.0, said - jax.nn.logsumexp(logits, axis=-1))
        written = Written(
            written.tokens.at[:, i].set(drawn),
            written.logprobs.at[:, i].set(logprob),
            written.count + running.astype(jnp.int32),
        )
        paused = jnp.any(drawn[:, None] == stops, axis=-1) & ~forced
        running = running & ~paused & (i + 1 < table.budget)
        return i + 1, drawn, token, running, written, new

    count = jnp.zeros(B, jnp.int32)
    nothing = Written(jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most)), count)
    new = [(kv_cache.new_kv(config, B, most), kv_cache.new_kv(config, B, most)) for _ in cache]
    first = (jnp.int32(0), table.token, table.previous, table.budget > 0, nothing, new)
    *_, written, new = jax.lax.while_loop(lambda carry: jnp.any(carry[3]), step, first)
    cache = kv_cache.merge(cache, new, start, written.count)
    return cache, jax.lax.with_sharding_constraint(written, P())  # every process reads all slots
