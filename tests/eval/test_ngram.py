"""The trigram yardstick against hand numbers, a slow model of dicts and the laws of probability."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from nanochat_jax.eval import ngram
from nanochat_jax.eval.ngram import NGram, byte_trigram_bpb, estimate_discounts, trigram_bpb


class SlowKneserNey:
    """The recursion of the module's docstring with dicts, one probability at a time."""

    def __init__(self, rows, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        counts = [Counter() for _ in range(order + 1)]
        for row in rows:
            tokens = [vocab_size] * (order - 2) + list(row)
            for end in range(order, len(tokens) + 1):
                counts[order][tuple(tokens[end - order : end])] += 1
        for n in range(order - 1, 0, -1):  # distinct left neighbours
            for gram in counts[n + 1]:
                counts[n][gram[1:]] += 1
        self.counts = counts
        self.discounts = [None] + [self._discounts(c.values()) for c in counts[1:]]
        self.followers = [defaultdict(list) for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram, c in counts[n].items():
                self.followers[n][gram[:-1]].append(c)

    @staticmethod
    def _discounts(values):
        n = Counter(values)
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else None
        d = [0.0, 0.5, 1.0, 1.5]
        if n[1] and n[2]:
            d[1] = y
            d[2] = min(max(2 - 3 * y * n[3] / n[2], d[1]), 2)
        if n[1] and n[3]:
            d[3] = min(max(3 - 4 * y * n[4] / n[3], d[2]), 3)
        d[3] = max(d[3], d[2])
        return d

    def prob(self, gram):
        gram = tuple(gram)
        n = len(gram)
        if n == 0:
            return 1 / self.vocab_size
        shorter = self.prob(gram[1:])
        seen = self.followers[n].get(gram[:-1])
        if not seen:
            return shorter
        discount, total = self.discounts[n], sum(seen)
        c = self.counts[n].get(gram, 0)
        gamma = sum(discount[min(s, 3)] for s in seen) / total
        return (c - discount[min(c, 3)]) / total + gamma * shorter if c else gamma * shorter


def zipf_rows(seed, num_rows, row_tokens, vocab_size):
    """Rows in which the next token depends on the last and some are far more frequent."""
    rng = np.random.default_rng(seed)
    steps = rng.zipf(1.5, (num_rows, row_tokens)).cumsum(axis=1)
    return (steps % vocab_size).astype(np.int32)


def pack(grams, bits):
    keys = np.zeros(len(grams), np.int64)
    for column in np.asarray(grams, np.int64).T:
        keys = (keys << bits) | column
    return keys


def test_discounts_by_hand():
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4])
    # y = 8 / (8 + 2*4) = 1/2; D1 = y, D2 = 2 - 3y*2/4, D3 = 3 - 4y*1/2
    np.testing.assert_allclose(estimate_discounts(counts), [0, 0.5, 1.25, 2.0])
    # Nothing to estimate from: half of each count.
    np.testing.assert_allclose(estimate_discounts(np.array([9, 9])), [0, 0.5, 1.0, 1.5])


def test_bigram_by_hand():
    # 0 1 1 0: bigrams 01, 11, 10, once each, so D = 1/2 for all. Left neighbours: 1 has two, 0 has
    # one, so for unigrams n1 = n2 = 1, y = 1/3, D1 = 1/3, D2 = 2, gamma = (1/3 + 2) / 3.
    model = NGram.fit([np.array([[0, 1, 1, 0]])], vocab_size=2, order=2)
    p0 = (1 - 1 / 3) / 3 + 7 / 9 / 2
    p1 = (2 - 2) / 3 + 7 / 9 / 2
    expected = {
        (0, 0): p0 / 2,
        (0, 1): 1 / 2 + p1 / 2,
        (1, 0): 1 / 4 + p0 / 2,
        (1, 1): 1 / 4 + p1 / 2,
    }
    grams = list(expected)
    np.testing.assert_allclose(model.probs(pack(grams, model.bits)), list(expected.values()))
    # bits per byte: token 0 stands for two bytes, token 1 for one; both are targets once
    bpb = model.bpb([np.array([[0, 1, 0]])], token_bytes=np.array([2, 1]))
    assert bpb == pytest.approx(-(math.log2(expected[0, 1]) + math.log2(expected[1, 0])) / 3)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equals_the_slow_model(order):
    vocab_size = 13
    rows = zipf_rows(0, 12, 40, vocab_size)
    model = NGram.fit([rows[:5], rows[5:]], vocab_size=vocab_size, order=order)
    slow = SlowKneserNey(rows, vocab_size, order)
    grams = np.random.default_rng(1).integers(0, vocab_size, (300, order))
    grams[:60, 0] = vocab_size  # contexts at the start of a row
    np.testing.assert_allclose(
        model.probs(pack(grams, model.bits)), [slow.prob(g) for g in grams.tolist()], rtol=1e-12
    )


def test_bpb_equals_the_slow_sum_and_leaves_specials_out():
    vocab_size, bos = 11, 10
    token_bytes = np.array([1, 1, 2, 3, 1, 4, 1, 2, 1, 5, 0])
    train, held_out = zipf_rows(2, 20, 33, vocab_size), zipf_rows(3, 4, 33, vocab_size)
    assert (held_out[:, 1:] == bos).any()
    slow = SlowKneserNey(train, vocab_size, 3)
    bits = num_bytes = 0
    for row in held_out.tolist():
        tokens = [vocab_size, *row]
        for end in range(3, len(tokens) + 1):
            size = token_bytes[tokens[end - 1]]
            if size:
                bits -= math.log2(slow.prob(tokens[end - 3 : end]))
                num_bytes += size
    got = trigram_bpb([train], [held_out], token_bytes=token_bytes, vocab_size=vocab_size)
    assert got == pytest.approx(bits / num_bytes, rel=1e-12)


@pytest.mark.parametrize("vocab_size,num_rows", [(5, 1), (50, 30), (300, 10)])
def test_probabilities_of_any_context_sum_to_one(vocab_size, num_rows):
    model = NGram.fit([zipf_rows(4, num_rows, 65, vocab_size)], vocab_size=vocab_size)
    contexts = np.random.default_rng(5).integers(0, vocab_size + 1, (20, 2))
    contexts[0] = vocab_size  # never seen: no row starts with two marks
    for context in contexts:
        grams = np.column_stack([np.tile(context, (vocab_size, 1)), np.arange(vocab_size)])
        p = model.probs(pack(grams, model.bits))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p > 0).all()


def test_counting_in_pieces_changes_nothing(monkeypatch):
    rows = zipf_rows(6, 40, 65, 97)
    args = {"token_bytes": np.ones(97, int), "vocab_size": 97}
    whole = trigram_bpb([rows], [rows[:3]], **args)
    monkeypatch.setattr(ngram, "MERGE_AT", 200)
    assert trigram_bpb((row[None] for row in rows), [rows[:3]], **args) == pytest.approx(whole)


def test_ignored_positions_are_neither_learned_nor_scored():
    rows = zipf_rows(7, 10, 33, 9)
    cut = np.pad(rows, ((0, 0), (0, 5)), constant_values=-1)
    args = {"token_bytes": np.ones(9, int), "vocab_size": 9}
    assert trigram_bpb([cut], [cut], **args) == trigram_bpb([rows], [rows], **args)


def test_bytes_do_not_depend_on_the_cut_into_tokens():
    pieces = [bytes([b]) for b in b"abcd "] + [b"ab", b"cd ", b"abcd ", b""]
    bos = 8
    words = np.random.default_rng(8).integers(0, 3, 60)
    spelled = {0: ([0, 1, 2, 3, 4], [7]), 1: ([0, 1], [5]), 2: ([2, 3, 4], [6])}
    as_bytes, as_tokens = ([bos] + [t for w in words for t in spelled[w][i]] for i in (0, 1))
    one, other = np.array([as_bytes]), np.array([as_tokens])
    same = byte_trigram_bpb([one], [one], pieces=pieces)
    assert byte_trigram_bpb([other], [other], pieces=pieces) == same
    # and it is the token model over bytes, the special token being a token of no bytes
    stream = np.array([[256, *b"".join(pieces[t] for t in as_tokens)]])
    byte_lengths = np.array([1] * 256 + [0])
    assert same == trigram_bpb([stream], [stream], token_bytes=byte_lengths, vocab_size=257)


def test_errors_say_what_was_got():
    with pytest.raises(ValueError, match="up to 9, expected .* below 9"):
        NGram.fit([np.array([[1, 9]])], vocab_size=9)
    with pytest.raises(ValueError, match="no tokens"):
        NGram.fit([], vocab_size=9)
    with pytest.raises(ValueError, match="order 4 of 17-bit"):
        NGram.fit([np.array([[1, 2]])], vocab_size=65_536, order=4)
    with pytest.raises(ValueError, match="no bytes"):
        NGram.fit([np.array([[1, 2]])], vocab_size=9).bpb([], token_bytes=np.ones(9, int))
