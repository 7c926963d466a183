"""The two programs a device runs to write texts: prefill and burst.

  prefill   prompts -> keys and values of all their positions but the last
  burst     up to `steps` tokens for every slot, one forward pass of one position each

The last token of a prompt is the first input of a burst, so that no program but `burst` needs the
head. A row pauses at an id that ends it, at one that calls a tool, and when its budget is spent; it
is computed on with the others until the burst ends, but nothing of that is kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.inference.sampling import Column, Plan, Settings, sample
from nanochat_jax.model import kv_cache
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.kv_cache import Cache


class Rows(NamedTuple):
    """Where each slot stands; int32 arrays of [B] but `forced` and `settings`."""

    token: Column  # the last one of the text, not yet in the cache
    previous: Column  # the one before it; -1: none
    position: Column  # of `token`
    budget: Column  # tokens the row may still get in this burst; 0: an empty slot
    forced: Column  # [B, steps]: these come first, whatever the model says
    num_forced: Column
    settings: Settings


class Written(NamedTuple):
    tokens: jax.Array  # int32 [B, steps]
    logprobs: jax.Array  # float32 [B, steps], of the untempered model; 0 where forced
    count: jax.Array  # int32 [B]: how many of them the row got


@partial(jax.jit, static_argnums=0)
def prefill(config: GPTConfig, params: dict, ids: jax.Array) -> Cache:
    """Keys and values [n, K, T, H] of every layer for prompts ids [n, T], padded on the right."""
    model, fresh = bind(config, params), []

    def attend(layer, q, k, v):
        fresh.append((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))  # [n, K, T, H]
        return model.attend(layer, q, k, v)

    model.hidden(ids, attend=attend)
    return fresh


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def burst(
    config: GPTConfig,
    pause_ids: tuple[int, ...],
    plan: Plan,
    params: dict,
    cache: Cache,
    rows: Rows,
    steps: int,
) -> tuple[Cache, Written]:
    """At most `steps` tokens for each row, and the cache with them.

    The cache must have room for position + budget of each row.
    """
    model = bind(config, params)
    B, most = rows.forced.shape
    start, stops = jnp.asarray(rows.position), jnp.array(pause_ids, jnp.int32)

    def step(carry):
        i, token, previous, running, written, new = carry
        new, position = list(new), start + i

        def attend(layer, q, k, v):
            kv = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [B, K, 1, H]
            new[layer] = jax.tree.map(
                lambda a, one: jax.lax.dynamic_update_slice_in_dim(a, one, i, axis=2),
                new[layer],
                kv,
            )
            window = config.sees(layer)
            return kv_cache.attend(q, cache[layer], new[layer], window=window, start=start, step=i)

        x = model.hidden(
            token[:, None],
            positions=position[:, None],
            previous=previous[:, None],
            attend=attend,
        )
        logits = model.logits(x[:, 0])  # [B, V]
        forced = i < rows.num_forced
        drawn = sample(logits, rows.settings, position, plan)
        drawn = jnp.where(forced, rows.forced[:, i], drawn)
        said = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
        logprob = jnp.where(forced, 0.0, said - jax.nn.logsumexp(logits, axis=-1))
        written = Written(
            written.tokens.at[:, i].set(drawn),
            written.logprobs.at[:, i].set(logprob),
            written.count + running.astype(jnp.int32),
        )
        paused = jnp.any(drawn[:, None] == stops, axis=-1) & ~forced
        running = running & ~paused & (i + 1 < rows.budget)
        return i + 1, drawn, token, running, written, new

    def unfinished(carry):
        i, _, _, running, _, _ = carry
        return (i < steps) & jnp.any(running)

    nothing = Written(
        jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most)), jnp.zeros(B, jnp.int32)
    )
    new = [(kv_cache.new_kv(config, B, most), kv_cache.new_kv(config, B, most)) for _ in cache]
    first = (jnp.int32(0), rows.token, rows.previous, rows.budget > 0, nothing, new)
    *_, written, new = jax.lax.while_loop(unfinished, step, first)
    cache = kv_cache.merge(cache, new, start, written.count)
    return cache, jax.lax.with_sharding_constraint(written, P())  # every process reads all rows
