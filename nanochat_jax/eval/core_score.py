"""Mean loss over a span of tokens, and whether every one of them is the model's first guess.

  candidates of any length -> wait by width -> batches [R, T] -> one jitted function -> loss, hit

Few shapes are compiled: T is one of 64, 96, 128, 192, ... (two a doubling, so at most a third of a
row is padding), R follows from it so that a batch holds about the same number of tokens whatever T.
Padding lies right of a row, where causal attention never looks, so a row's numbers do not depend
on its neighbours. Logits exist only for a tile of scored positions at once. Every process makes the
same batches and gets all results.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import ROWS, num_row_shards

MAX_RUNNING = 4  # batches given to the devices while the next rows are made


class Candidate(NamedTuple):
    """A text whose ids[start:end] are scored."""

    ids: np.ndarray  # int32 [T], BOS first
    start: int
    end: int


def score_candidates(
    config: GPTConfig,
    mesh: Mesh,
    params: dict,
    candidates: Iterable[Candidate],
    *,
    device_batch_tokens: int,
    tile_tokens: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[tuple[float, bool]]:
    """(mean loss, hit) of each candidate, in order; an empty span has loss nan.

    device_batch_tokens: tokens a row shard works on at once; a longer candidate comes alone.
    tile_tokens: tokens a row shard holds logits of at once.
    """
    num_shards, sharding = num_row_shards(mesh), NamedSharding(mesh, ROWS)
    waiting: dict[int, list[tuple[int, Candidate]]] = defaultdict(list)
    running: deque[tuple[tuple[int, ...], jax.Array, jax.Array]] = deque()
    scores: dict[int, tuple[float, bool]] = {}

    def num_rows(width: int) -> int:
        return num_shards * max(1, device_batch_tokens // width)

    def start(width: int) -> None:
        places, batch = zip(*waiting.pop(width), strict=True)
        # Rows that are only padding score nothing: an empty span at 1.
        ids = np.zeros((num_rows(width), width), np.int32)
        spans = np.ones((num_rows(width), 2), np.int32)
        for row, candidate in enumerate(batch):
            ids[row, : len(candidate.ids)] = candidate.ids
            spans[row] = candidate.start, candidate.end
        ids, spans = (
            jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in (ids, spans)
        )
        tile = max(1, min(width, tile_tokens // (num_rows(width) // num_shards)))
        with jax.set_mesh(mesh):
            running.append((places, *_score(config, mesh, tile, params, ids, spans)))

    def finish() -> None:
        places, losses, hits = running.popleft()
        of_rows = zip(np.asarray(losses).tolist(), np.asarray(hits).tolist(), strict=True)
        scores.update(zip(places, of_rows, strict=False))  # rows of padding have no place
        progress(len(scores))

    for place, candidate in enumerate(candidates):
        width = batch_width(len(candidate.ids))
        waiting[width].append((place, candidate))
        if len(waiting[width]) == num_rows(width):
            start(width)
        if len(running) > MAX_RUNNING:
            finish()
    for width in sorted(waiting):
        start(width)
    while running:
        finish()
    return [scores[place] for place in range(len(scores))]


def batch_width(length: int) -> int:
    """The narrowest of 64, 96, 128, 192, ... that holds so many tokens."""
    widths = (base << k for k in itertools.count() for base in (64, 96))
    return next(width for width in widths if width >= length)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score(config: GPTConfig, mesh: Mesh, tile: int, params: dict, ids, spans):
    """ids [R, T], spans [R, 2] (start, end) -> mean loss [R] float32, all first guesses [R]."""
    model = bind(config, params)
    hidden = model.hidden(ids)  # [R, T, D]
    start, end = spans[:, :1], spans[:, 1:]  # [R, 1]

    def add_tile(step, total):
        loss, hit = total
        place = start + step * tile + jnp.arange(tile)  # [R, t] of the targets
        scored = (start > 0) & (place < end)
        place = jnp.where(scored, place, 1)
        logits = model.logits(jnp.take_along_axis(hidden, place[..., None] - 1, axis=1))
        target = jnp.take_along_axis(ids, place, axis=1)  # [R, t]
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), -1)
        guessed = lax.argmax(logits, 2, jnp.int32) == target
        loss += jnp.sum(jnp.where(scored, nll, 0.0), axis=1)
        return loss, hit & jnp.all(guessed | ~scored, axis=1)

    # Nothing predicts BOS: a span that holds it (equal options of a schema) counts as empty.
    lengths = jnp.where(start > 0, end - start, 0)[:, 0]
    zero = (jnp.zeros(lengths.shape, jnp.float32), jnp.ones(lengths.shape, jnp.bool))
    loss, hit = lax.fori_loop(0, -(-jnp.max(lengths) // tile), add_tile, zero)
    everywhere = NamedSharding(mesh, P())
    return lax.with_sharding_constraint((loss / lengths.astype(jnp.float32), hit), everywhere)
