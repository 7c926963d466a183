"""The tokenizer against upstream's ids and against a byte-pair encoder of twenty lines."""

import collections
import hashlib
import itertools
import json
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, capped, train

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXT = json.loads((GOLDENS / "text.json").read_text())
GOLDEN = Tokenizer.load(GOLDENS)
CORPUS = [
    "the cat sat on the mat, and the other cat's mat was 12 34 567 wide\n\n  then they slept",
    "thé çat — the then there 2024\r\n\tthat that that <|bos|> 漢字漢字",
    "",
    "x",
]
BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}


def merge(word, pair, new):
    merged, position = [], 0
    while position < len(word):
        hit = tuple(word[position : position + 2]) == pair
        merged.append(new if hit else word[position])
        position += 2 if hit else 1
    return merged


def naive_train(texts, num_ranks):
    """The most frequent pair becomes the next token; of equals, the one with the lowest ids."""
    words = [list(piece.encode()) for text in texts for piece in regex.findall(SPLIT_PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < num_ranks:
        counts = collections.Counter(p for word in words for p in itertools.pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, best, len(tokens)) for word in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


def naive_encode(ranks, text):
    """Merge the adjacent pair of lowest rank until none is a token."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [
                (ranks.get(a + b, len(ranks)), i)
                for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            ]
            rank, i = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_goldens():
    assert json.loads((GOLDENS / "tokenizer.json").read_text())["pattern"] == SPLIT_PATTERN
    for row in TEXT["encode"]:
        assert GOLDEN.encode(row["text"]) == row["ids"]
        assert GOLDEN.decode(row["ids"]) == row["text"]
    for row in TEXT["encode_bos"]:
        assert GOLDEN.encode(row["text"], bos=True) == row["ids"]
    assert GOLDEN.vocab_size == TEXT["vocab_size"]
    assert {name: GOLDEN.special_id(name) for name in SPECIAL_TOKENS} == TEXT["special_tokens"]


@pytest.mark.parametrize("num_ranks", [256, 257, 300])
def test_training_learns_the_merges_of_the_naive_trainer(num_ranks):
    trained = train(iter(CORPUS), num_ranks + len(SPECIAL_TOKENS))
    assert trained.ranks == naive_train(CORPUS, num_ranks)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="the catn's \n\r\t012,.", max_size=80))
def test_encoding_is_the_naive_one_and_comes_back(text):
    ids = GOLDEN.encode(text)
    assert ids == naive_encode(GOLDEN.ranks, text)
    assert GOLDEN.decode(ids) == text
    assert GOLDEN.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " ", "\n"]), max_size=8))
def test_text_never_yields_a_special_id(parts):
    ids = GOLDEN.encode("".join(parts))
    assert max(ids, default=0) < GOLDEN.bos_id
    assert GOLDEN.decode(ids) == "".join(parts)


def test_bytes_that_are_no_text():
    raw = bytes(range(256))
    ids = [GOLDEN.ranks[bytes([byte])] for byte in raw]
    assert GOLDEN.decode_bytes(ids) == raw
    assert GOLDEN.decode(ids) == raw.decode(errors="replace")
    assert GOLDEN.decode([GOLDEN.bos_id, *GOLDEN.encode("hi")]) == "<|bos|>hi"


@pytest.mark.parametrize(
    "broken, meant",
    [("a\ud800b", "a\ufffdb"), ("\udc00", "\ufffd"), ("\ud83d\ude00", "\U0001f600")],
)
def test_surrogates(broken, meant):
    assert GOLDEN.encode(broken) == GOLDEN.encode(meant)
    assert GOLDEN.encode_batch([broken, "x"]) == [GOLDEN.encode(meant), GOLDEN.encode("x")]
    # In a long text too, where the pair would fall on a cut.
    filler = "x" * (bpe.MAX_STRETCH_CHARS - 1)
    assert GOLDEN.decode(GOLDEN.encode(filler + broken)) == filler + meant
    assert train(iter([broken * 3]), 300).ranks == train(iter([meant * 3]), 300).ranks


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_batch_equals_one_by_one(num_threads):
    texts = [text * n for n, text in enumerate(CORPUS * 3)]
    for bos in (False, True):
        batch = GOLDEN.encode_batch(texts, bos=bos, num_threads=num_threads)
        assert batch == [GOLDEN.encode(text, bos=bos) for text in texts]
    assert GOLDEN.encode_batch([], num_threads=num_threads) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab'1.é\n\r\t \xa0", max_size=8), max_size=20))
def test_cutting_long_texts_keeps_their_ids(words):
    # A word and a blank every few characters, so that each stretch has a place to be cut at.
    text = "".join(f"{word}z " for word in words)
    longest = max((len(word) + 2 for word in words), default=0)
    stretches = list(bpe.stretches(text, 2 * longest + 2))
    assert "".join(stretches) == text
    assert len(stretches) > 1 or len(text) <= 2 * longest + 2
    assert [id for stretch in stretches for id in GOLDEN.encode(stretch)] == GOLDEN.encode(text)


@pytest.mark.parametrize("char", [" ", "\xa0", "\n", "a", "^", "7", "漢"])
def test_enormous_runs(char):
    text = "start " + char * 1_000_000 + " end"
    ids = GOLDEN.encode(text)
    assert GOLDEN.decode(ids) == text
    assert char != " " or b"    " in train(iter([text]), 300).ranks


def test_saved_and_loaded_are_the_same(tmp_path):
    GOLDEN.save(tmp_path)
    saved = (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads(saved) == json.loads((GOLDENS / "tokenizer.json").read_text())
    assert GOLDEN.sha256() == hashlib.sha256(saved).hexdigest()
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.ranks, loaded.special) == (GOLDEN.ranks, GOLDEN.special)
    assert train(iter(CORPUS), 300).sha256() != GOLDEN.sha256()


def with_ranks(change):
    return lambda content: content | {"ranks": change(content["ranks"])}


INCONSISTENT = [
    lambda content: [1, 2],
    lambda content: {"ranks": content["ranks"], "special": content["special"]},
    with_ranks(lambda ranks: 5),
    with_ranks(lambda ranks: [["zz", 0], *ranks[1:]]),
    with_ranks(lambda ranks: [[ranks[0][0], "0"], *ranks[1:]]),
    with_ranks(lambda ranks: [*ranks[:-2], ranks[-1]]),
    with_ranks(lambda ranks: [["616263", 0], *ranks[1:]]),
    lambda content: content | {"pattern": "("},
    lambda content: content | {"special": {"<|bos|>": 2039}},
]
BROKEN = [None, b"", b'{"pattern": "a"', b"\xff\xfe", b"\x80\x04]q."]


@pytest.mark.parametrize("content", [*BROKEN, *INCONSISTENT])
def test_a_missing_broken_or_inconsistent_file_is_told_in_one_line(tmp_path, content):
    if callable(content):
        golden = json.loads((GOLDENS / "tokenizer.json").read_text())
        content = json.dumps(content(golden)).encode()
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts, vocab_size", [(CORPUS, 264), ([], 300), (["", ""], 300)])
def test_too_small_a_vocabulary_and_no_text_are_refused(texts, vocab_size):
    with pytest.raises(UserError):
        train(iter(texts), vocab_size)


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = train(iter(["abab"]), 5000)
    assert tokenizer.ranks == BYTE_RANKS | {b"ab": 256, b"abab": 257}
    assert list(tokenizer.special.values()) == list(range(258, 267))
    assert tokenizer.vocab_size == 267
    assert "267 instead of 5,000" in capsys.readouterr().out
    train(iter(["abab"]), 267)
    assert capsys.readouterr().out == ""


def test_no_text_is_read_beyond_the_one_that_passes_the_limit():
    texts = ["a" * 5, "b" * 30, "", "c" * 10, "d" * 4, "e"]
    source = iter(texts)
    capped_texts = list(capped(source, max_chars=24, doc_cap=10))
    assert capped_texts == ["a" * 5, "b" * 10, "", "c" * 10]
    assert list(source) == texts[4:]
    assert list(capped(texts, max_chars=1000, doc_cap=1000)) == texts
