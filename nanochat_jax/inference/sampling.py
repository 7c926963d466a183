"""The next token of each row, drawn on the device by that row's own settings.

  token = argmax(logits / temperature + Gumbel noise)       (the Gumbel-max trick: a softmax sample)

Noise depends on (seed, position, id) alone: not on what else is in the batch, and truncation does
not change the noise of the ids that stay. It is Threefry-2x32 with 20 rounds (Salmon et al., SC
2011), the one under jax.random; written out, XLA fuses it with what follows.

Truncation: the top_k most likely ids, and of these the fewest whose probabilities (at the row's
temperature, among the top_k) sum to top_p; ids that tie with the last of them stay too. Nothing is
sorted: a threshold is found bit by bit, each step one pass over the logits. Each device does so for
its own rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.sharding import ROWS

Column = jax.Array | np.ndarray  # a value for each row, made on the host or not
FAR_BITS = 28  # of a float's 31: distances are told apart at 1e-6 of themselves
MOST_ALTERNATIVES = 20  # of a token, with their log probabilities; OpenAI's limit


class Settings(NamedTuple):
    """How each row samples; arrays of [B]."""

    seed: Column  # uint32 [B, 2]
    temperature: Column  # float32; below 1e-9: the most likely token
    top_k: Column  # int32; 0: all
    top_p: Column  # float32
    presence: Column  # float32: taken from the logit of an id that was said
    frequency: Column  # float32: for every time that it was


def sample(logits: jax.Array, said: jax.Array, settings: Settings, position: Column) -> jax.Array:
    """int32 [B] for float32 logits [B, V]; said [B, V]: how often a row has said each id; position
    [B]: where the row stands."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = logits, said, settings, position
    if mesh.empty:
        return _sample(*rows)
    return jax.shard_map(_sample, in_specs=ROWS, out_specs=ROWS)(*rows)


def _sample(logits: jax.Array, said: jax.Array, settings: Settings, position: Column) -> jax.Array:
    seed, temperature, top_k, top_p, presence, frequency = settings
    logits -= presence[:, None] * jnp.sign(said) + frequency[:, None] * said
    greedy = (temperature < 1e-9) | (top_k == 1)
    scores = logits - jnp.max(logits, axis=-1, keepdims=True)
    count = jnp.where(~greedy & (top_k > 0), top_k.astype(jnp.float32), jnp.inf)
    scores = _cut(scores, _reach(scores, lambda: jnp.ones_like(scores), count))
    scores /= jnp.where(greedy, 1.0, temperature)[:, None]
    share = jnp.where(~greedy & (top_p < 1), top_p, jnp.inf)
    probs = lambda scores=scores: jnp.exp(scores)  # noqa: E731
    scores = _cut(scores, _reach(scores, probs, share, of_all=True))
    drawn = argmax(scores + noise(seed, position, jnp.arange(logits.shape[-1])[None]))
    return jnp.where(greedy, argmax(logits), drawn)


def _cut(scores: jax.Array, reach: jax.Array) -> jax.Array:
    return jnp.where(far(scores) <= reach, scores, -jnp.inf)


def _reach(
    scores: jax.Array, weigh: Callable[[], jax.Array], limit: jax.Array, *, of_all: bool = False
) -> jax.Array:
    """How far from 0 the scores [B, V] may be to stay, [B, 1]: the fewest of a row whose weights
    reach its limit [B] (of_all: as a part of all weights; inf: no limit)."""

    def find(bits: int) -> jax.Array:
        weights = weigh()
        reached = limit * jnp.sum(weights, axis=-1) if of_all else limit
        return farthest(scores, weights, reached, bits)

    # Whether any row asks is a value, not part of the program. To know it a GPU would have to wait
    # for the host, and so for every pass of a loop: there few passes always run, all in a line.
    everything = jnp.full_like(limit, 2**FAR_BITS - 1, jnp.int32)[:, None]
    asked = jnp.any(limit < jnp.inf)
    on_cpu = lambda: jax.lax.cond(asked, lambda: find(1), lambda: everything)  # noqa: E731
    return jax.lax.platform_dependent(cpu=on_cpu, default=lambda: find(4))


def far(scores: jax.Array) -> jax.Array:
    """How far below 0 scores are, as integers in the same order: the bits of the float, but the
    last few."""
    return jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32) >> (31 - FAR_BITS)


def farthest(scores: jax.Array, weights: jax.Array, limit: jax.Array, bits: int) -> jax.Array:
    """The least distance [B, 1] within which the weights [B, V] of scores reach the limit [B], or
    the largest there is; worked out from its first bits to its last, so many of them in a pass."""
    distance, last = far(scores), (1 << bits) - 1

    def narrow(i, found):
        shift = FAR_BITS - bits * (i + 1)
        ends = [(found | (n << shift)) + (1 << shift) - 1 for n in range(last)]  # [B, 1] each
        within = [jnp.where(distance <= end, weights, 0.0) for end in ends]
        zeros = [jnp.float32(0)] * last
        add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731
        sums = jax.lax.reduce(within, zeros, add, (1,))  # one pass for all of them
        short = jnp.sum(jnp.stack(sums) < limit, axis=0, dtype=jnp.int32)
        return found | (short[:, None] << shift)

    nothing = jnp.zeros_like(distance[:, :1])
    return jax.lax.fori_loop(0, FAR_BITS // bits, narrow, nothing, unroll=bits > 1)


def most_likely(logprobs: jax.Array, count: Column) -> tuple[jax.Array, jax.Array]:
    """Ids and values [..., MOST_ALTERNATIVES] of the `count` largest of logprobs [..., V], the
    largest first; one pass each, as count is a value and no part of the program."""
    shape = (*logprobs.shape[:-1], MOST_ALTERNATIVES)
    places = jnp.arange(logprobs.shape[-1])

    def take(i, found):
        left, ids, values = found
        best = argmax(left)[..., None]
        ids = ids.at[..., i].set(best[..., 0])
        values = values.at[..., i].set(jnp.take_along_axis(left, best, axis=-1)[..., 0])
        return jnp.where(places == best, -jnp.inf, left), ids, values

    nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    return jax.lax.cond(
        jnp.asarray(count) > 0,
        lambda: jax.lax.fori_loop(0, count, take, (logprobs, *nothing))[1:],
        lambda: nothing,
    )


def argmax(x: jax.Array) -> jax.Array:
    """The first index of the largest value of x [..., M], int32; on a CPU 8x faster than jnp's. Not
    an index at all (M) when a value is NaN."""
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x == largest, ids, x.shape[-1]), axis=-1)


def noise(seed: Column, position: Column, ids: jax.Array) -> jax.Array:
    """Gumbel noise [B, M] of ids [B or 1, M] at a row's position [B]; seed uint32 [B, 2]."""
    rows = (seed[:, :1], seed[:, 1:], position[:, None].astype(jnp.uint32))
    bits, _ = threefry(*rows, ids.astype(jnp.uint32))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # exact, so below 1
    return -jnp.log(-jnp.log(uniform))


def threefry(k0, k1, x0, x1) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32-20 of the counter (x0, x1) under the key (k0, k1): uint32, broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << turn) | (x1 >> (32 - turn))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
