"""A trigram model as a yardstick: what bits per byte does counting reach on the same text?

Interpolated modified Kneser-Ney (Chen & Goodman 1999, equations 21-23): the strongest smoothing for
n-grams of this order, and with sorted keys no more code than Witten-Bell. With c the count of an
n-gram at the highest order, and below it the number of distinct tokens seen to its left,

    p_n(w | ctx) = (c(ctx w) - D(c)) / c(ctx)  +  gamma(ctx) * p_{n-1}(w | shorter ctx)
    gamma(ctx)   = sum over seen w of D(c(ctx w)) / c(ctx),    p_0 = 1 / vocab_size

where D is one of three discounts (for c = 1, 2, more), estimated per order from counts of counts. A
context never seen hands everything to the shorter one. So for any context the vocabulary sums to 1,
and every token has positive probability.

An n-gram is one integer (bits of its tokens side by side, the oldest highest); a level is a sorted
array of them, and a lookup is a binary search. Ten million tokens take seconds.

The score is the bits per byte of eval/bpb.py: nats of targets that stand for bytes, over those
bytes; specials are predicted, and learned from, but not counted. Before a row's first token stands
a token of its own, outside the vocabulary. Both sides see rows as the language model does: cut and
packed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MERGE_AT = 2**24  # n-grams held as a plain list before they are counted: bounds the memory
BYTE_ROWS = 1024  # rows turned into bytes at once, likewise


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, sorted, with all that the formula needs, divided out."""

    keys: np.ndarray  # int64 [G]: packed n-grams
    mass: np.ndarray  # float64 [G]: (c - D) / c(ctx)
    contexts: np.ndarray  # int64 [C]: packed contexts
    gamma: np.ndarray  # float64 [C]


@dataclass(frozen=True)
class NGram:
    vocab_size: int
    bits: int  # of a packed token
    levels: tuple[Level, ...]  # unigram first

    @classmethod
    def fit(cls, rows: Iterable[np.ndarray], *, vocab_size: int, order: int = 3) -> "NGram":
        """Count rows [R, T+1] of ids; the first token of a row is only context, as in training."""
        bits = int(vocab_size).bit_length()  # ids and the mark before a row's start
        if order < 2 or order * bits > 63:
            raise ValueError(
                f"got order {order} of {bits}-bit tokens, expected 2 or more in 63 bits"
            )
        keys, counts = _count(_windows(ids, vocab_size, order, bits)[0] for ids in rows)
        if not len(keys):
            raise ValueError("got no tokens to count, expected rows of at least two")
        levels = [_smooth(keys, counts, bits)]
        for n in range(
            order - 1, 0, -1
        ):  # drop the oldest token; how many different ones were there?
            keys, counts = np.unique(keys & ((1 << n * bits) - 1), return_counts=True)
            levels.append(_smooth(keys, counts, bits))
        return cls(vocab_size, bits, tuple(reversed(levels)))

    def probs(self, keys: np.ndarray) -> np.ndarray:
        """Probability of the last token of each packed n-gram given its others, float64."""
        p = np.full(keys.shape, 1.0 / self.vocab_size)
        for n, level in enumerate(self.levels, start=1):
            ngram = keys & ((1 << n * self.bits) - 1)
            gamma = _lookup(level.contexts, level.gamma, ngram >> self.bits, default=1.0)
            p = _lookup(level.keys, level.mass, ngram, default=0.0) + gamma * p
        return p

    def bpb(self, rows: Iterable[np.ndarray], *, token_bytes: np.ndarray) -> float:
        """Bits per byte over the targets of rows [R, T+1] with token_bytes > 0."""
        nats, num_bytes = 0.0, 0
        for ids in rows:
            keys, targets = _windows(ids, self.vocab_size, len(self.levels), self.bits)
            target_bytes = token_bytes[targets]
            # Sorted lookups walk memory in order; the same n-gram is looked up once.
            seen, position = np.unique(keys[target_bytes > 0], return_inverse=True)
            nats -= float(np.log(self.probs(seen))[position].sum())
            num_bytes += int(target_bytes.sum())
        if not num_bytes:
            raise ValueError("got no bytes to score, expected targets with token_bytes > 0")
        return nats / (math.log(2) * num_bytes)


def trigram_bpb(
    train_rows: Iterable[np.ndarray],
    eval_rows: Iterable[np.ndarray],
    *,
    token_bytes: np.ndarray,
    vocab_size: int,
) -> float:
    """Bits per byte on `eval_rows` of a token trigram of `train_rows`; both [R, T+1] of ids."""
    model = NGram.fit(train_rows, vocab_size=vocab_size)
    return model.bpb(eval_rows, token_bytes=token_bytes)


def byte_trigram_bpb(
    train_rows: Iterable[np.ndarray], eval_rows: Iterable[np.ndarray], *, pieces: Sequence[bytes]
) -> float:
    """The same over the bytes of the same rows: a trigram of characters, which knows no tokenizer.

    pieces: the bytes of each token id, empty for specials, which become a mark between texts.
    """
    model = NGram.fit(_byte_rows(train_rows, pieces), vocab_size=257)
    byte_lengths = np.append(np.ones(256, np.int64), 0)  # the mark is no byte
    return model.bpb(_byte_rows(eval_rows, pieces), token_bytes=byte_lengths)


def _windows(
    ids: np.ndarray, vocab_size: int, order: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """All n-grams of [R, T+1] ids that end in a target, packed, and their targets: both int64
    [R*T].

    Targets below 0 (ignored ones) are left out, and as context they count as the mark of a row's
    start.
    """
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 2 or ids.max(initial=0) >= vocab_size:
        raise ValueError(
            f"got ids of shape {ids.shape} up to {ids.max(initial=0)}, "
            f"expected [rows, tokens] below {vocab_size}"
        )
    marked = np.where(ids < 0, vocab_size, ids)
    marked = np.pad(marked, ((0, 0), (order - 2, 0)), constant_values=vocab_size)
    num_targets = ids.shape[1] - 1
    keys = np.zeros((len(ids), num_targets), np.int64)
    for offset in range(order):
        keys = (keys << bits) | marked[:, offset : offset + num_targets]
    kept = ids[:, 1:] >= 0
    return keys[kept], ids[:, 1:][kept]


def _count(chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys of all chunks, sorted, and how often each occurs."""
    keys = counts = np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    num_waiting = 0

    def merged() -> tuple[np.ndarray, np.ndarray]:
        new_keys, new_counts = np.unique(np.concatenate(waiting), return_counts=True)
        if not len(keys):
            return new_keys, new_counts
        both, position = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
        return both, np.bincount(position, np.concatenate([counts, new_counts])).astype(np.int64)

    for chunk in chunks:
        waiting.append(chunk)
        num_waiting += len(chunk)
        if num_waiting > MERGE_AT:
            keys, counts = merged()
            waiting, num_waiting = [], 0
    return merged() if waiting else (keys, counts)


def _smooth(keys: np.ndarray, counts: np.ndarray, bits: int) -> Level:
    """Discounted mass of each n-gram and what its context hands down."""
    discounts = estimate_discounts(counts)[np.minimum(counts, 3)]
    contexts, starts, sizes = np.unique(keys >> bits, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, starts)  # sorted keys: the n-grams of a context are neighbours
    mass = (counts - discounts) / np.repeat(totals, sizes)
    return Level(keys, mass, contexts, np.add.reduceat(discounts, starts) / totals)


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """[0, D1, D2, D3+] from how many n-grams occur 1, 2, 3 and 4 times (Chen & Goodman, equation
    26).

    On little text a count of counts can be 0; then half the count stands in. They are kept rising
    and below their count, so that every context hands something down and nothing goes negative.
    """
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.5
    d1 = y if n1 and n2 else 0.5
    d2 = min(max(2 - 3 * y * n3 / n2, d1), 2.0) if n1 and n2 else 1.0
    d3 = min(max(3 - 4 * y * n4 / n3, d2), 3.0) if n1 and n3 else max(1.5, d2)
    return np.array([0.0, d1, d2, d3])


def _lookup(
    keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, *, default: float
) -> np.ndarray:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], default)


def _byte_rows(rows: Iterable[np.ndarray], pieces: Sequence[bytes]) -> Iterator[np.ndarray]:
    """Batches of rows of ids as one long row of bytes each, [1, bytes]; 256 stands for a special
    token.

    The first token of a row is no target, so it becomes the mark too, whatever it was.
    """
    mark = len(pieces)
    units = [list(piece) or [256] for piece in (*pieces, b"")]
    lengths = np.array([len(unit) for unit in units])
    starts = np.cumsum(lengths) - lengths
    flat = np.concatenate([np.asarray(unit, np.int64) for unit in units])
    for batch in rows:
        for first in range(0, len(batch), BYTE_ROWS):
            ids = np.where(
                batch[first : first + BYTE_ROWS] < 0, mark, batch[first : first + BYTE_ROWS]
            )
            ids[:, 0] = mark
            ids = ids.ravel()
            id_lengths = lengths[ids]
            ends = np.cumsum(id_lengths)
            within = np.arange(ends[-1]) - np.repeat(ends - id_lengths, id_lengths)
            yield flat[np.repeat(starts[ids], id_lengths) + within][None]
