"""The two programs a device runs to write texts: extend and burst.

  extend   the next piece of some prompts -> keys and values in their slots of the cache
  burst    a few tokens for every slot, one forward pass of one position each

A prompt is computed in pieces of at most CHUNK tokens, all but its last one, which is the first
input of a burst. So few programs serve prompts of all lengths, no long one holds up the others, and
a prompt whose beginning lies in the cache already is computed from there. A slot pauses at an id
that ends its text or calls a tool, and when its budget is spent; what is computed for it after that
is not kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.inference.sampling import (
    MOST_ALTERNATIVES,
    Column,
    Settings,
    argmax,
    most_likely,
    sample,
)
from nanochat_jax.model import kv_cache
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.kv_cache import Cache

MOST_BIASED = 300  # ids that one request may make more or less likely; OpenAI's limit


class Piece(NamedTuple):
    """The next part of n prompts; int32."""

    ids: Column  # [n, T + 2]: the id before it (-1: none), T of the prompt, the one after it
    start: Column  # [n]: position of the first of the T
    count: Column  # [n]: how many of the T there are
    slots: Column  # [n]: where what lies before it is
    targets: Column  # [m]: slots that get it; one that does not exist: none
    source: Column  # [m]: which of the n they get


class Scores(NamedTuple):
    """Log probabilities of ids, and of the most likely ids in their place."""

    logprobs: jax.Array  # float32 [n, T], of the untempered model
    top_ids: jax.Array  # int32 [n, T, MOST_ALTERNATIVES], as many as were asked for, then zeros
    top_logprobs: jax.Array  # float32, likewise


class Extras(NamedTuple):
    """More about how slots sample."""

    said: Column  # int32 [B, any]: ids of the answer so far; vocab_size and more: none
    bias_ids: Column  # int32 [B, MOST_BIASED], likewise
    bias: Column  # float32 [B, MOST_BIASED]
    num_top: Column  # int32 []: alternatives of every token


class SlotTable(NamedTuple):
    """Where the texts of some slots stand; int32 arrays of [B] but the last two."""

    slots: Column  # where their caches lie; if B is the number of slots, all in order
    token: Column  # the last one of the text, not yet in the cache
    previous: Column  # the one before it; -1: none
    position: Column  # of `token`
    budget: Column  # tokens it may get in this burst, at most `steps`; 0: there is no text
    num_forced: Column
    forced: Column  # [B, steps]: these come first, whatever the model says
    sampling: tuple[Settings, Extras] | None  # None: all slots take the most likely token


class Written(NamedTuple):
    tokens: jax.Array  # int32 [B, steps]
    scores: Scores  # of the tokens
    count: jax.Array  # int32 [B]: how many of them the slot got


def no_scores(*shape: int) -> Scores:
    tops = (*shape, MOST_ALTERNATIVES)
    return Scores(jnp.zeros(shape), jnp.zeros(tops, jnp.int32), jnp.zeros(tops))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def extend(
    config: GPTConfig, scored: bool, params: dict, cache: Cache, piece: Piece, num_top: Column
) -> tuple[Cache, Scores | None]:
    """Write a piece of some prompts into the cache, which must have room; when `scored`, also how
    likely each id after one of the piece was."""
    model = bind(config, params)
    ids = jnp.asarray(piece.ids)
    old, start = kv_cache.take_slots(cache, piece.slots), jnp.asarray(piece.start)

    def attend(layer, q, k, v):
        kv = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [n, K, T, H]
        window = config.sees(layer)
        return kv_cache.attend(q, old[layer], kv, window=window, start=start, step=0), kv

    positions = start[:, None] + jnp.arange(ids.shape[1] - 2)
    x, new = model.run(ids[:, 1:-1], positions=positions, previous=ids[:, :-2], attend=attend)
    count, targets = jnp.asarray(piece.count), jnp.asarray(piece.targets)
    cache, scores = kv_cache.merge(cache, new, start, count, targets, piece.source), None
    if scored:
        scores = score(model.logits(x), ids[:, 2:], num_top)
        scores = jax.lax.with_sharding_constraint(scores, P())  # every process reads them all
    return cache, scores


def score(logits: jax.Array, ids: jax.Array, num_top: Column) -> Scores:
    """How likely ids [n, T] are by logits [n, T, V]."""
    norm = jax.nn.logsumexp(logits, axis=-1)
    said = jnp.take_along_axis(logits, jnp.asarray(ids)[..., None], axis=-1)[..., 0]
    top_ids, top = most_likely(logits, num_top)
    return Scores(said - norm, top_ids, top - norm[..., None])


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def burst(
    config: GPTConfig,
    pause_ids: tuple[int, ...],
    never_ids: tuple[int, ...],
    params: dict,
    cache: Cache,
    table: SlotTable,
) -> tuple[Cache, Written]:
    """Write as many tokens as the budget of each slot, for which the cache must have room; never
    one of never_ids unless it is forced."""
    model = bind(config, params)
    B, most = table.forced.shape
    all_slots = B == cache[0][0].shape[0]
    held = cache if all_slots else kv_cache.take_slots(cache, table.slots)
    start, stops = jnp.asarray(table.position), jnp.array(pause_ids, jnp.int32)
    rows, said, num_top = jnp.arange(B), jnp.zeros((B, 1)), jnp.int32(0)
    bias = jnp.zeros((1, config.vocab_size)).at[:, jnp.array(never_ids, int)].set(-jnp.inf)
    if table.sampling:
        settings, extras = table.sampling
        num_top, every = extras.num_top, jnp.zeros((B, config.vocab_size))
        said = every.at[rows[:, None], extras.said].add(1, mode="drop")
        bias += every.at[rows[:, None], extras.bias_ids].add(extras.bias, mode="drop")
        draw = lambda logits, said, at: sample(logits + bias, said, settings, at)  # noqa: E731
    else:
        draw = lambda logits, *_: argmax(logits + bias)  # noqa: E731

    def step(carry):
        i, token, previous, said, running, written, new = carry
        position = start + i

        def attend(layer, q, k, v):
            kv = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # [B, K, 1, H]
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=2)
            own, window = jax.tree.map(put, new[layer], kv), config.sees(layer)
            return kv_cache.attend(q, held[layer], own, window=window, start=start, step=i), own

        x, new = model.run(
            token[:, None], positions=position[:, None], previous=previous[:, None], attend=attend
        )
        logits = model.logits(x[:, 0])  # [B, V]
        forced = i < table.num_forced
        drawn = jnp.where(forced, table.forced[:, i], draw(logits, said, position))
        scores = score(logits[:, None], drawn[:, None], num_top)
        written = Written(
            written.tokens.at[:, i].set(drawn),
            jax.tree.map(lambda all, new: all.at[:, i].set(new[:, 0]), written.scores, scores),
            written.count + running.astype(jnp.int32),
        )
        said = said.at[rows, drawn].add(1, mode="drop")
        paused = jnp.any(drawn[:, None] == stops, axis=-1) & ~forced
        running = running & ~paused & (i + 1 < table.budget)
        return i + 1, drawn, token, said, running, written, new

    count = jnp.zeros(B, jnp.int32)
    nothing = Written(jnp.zeros((B, most), jnp.int32), no_scores(B, most), count)
    new = [(kv_cache.new_kv(config, B, most), kv_cache.new_kv(config, B, most)) for _ in cache]
    first = (jnp.int32(0), table.token, table.previous, said, table.budget > 0, nothing, new)
    *_, written, new = jax.lax.while_loop(lambda carry: jnp.any(carry[4]), step, first)
    where = () if all_slots else (jnp.asarray(table.slots), rows)
    cache = kv_cache.merge(cache, new, start, written.count, *where)
    return cache, jax.lax.with_sharding_constraint(written, P())  # every process reads all slots
