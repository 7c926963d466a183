"""Conversations between people as messages: cut, joined and split; on a small set of our own."""

import importlib.util
import json
import sys

import pyarrow.parquet as pq
import pytest

from nanochat_jax import config
from nanochat_jax.common import UserError
from nanochat_jax.data import shards
from nanochat_jax.tasks.base import SPLITS, messages, split_of
from nanochat_jax.tasks.chitchat import MAX_CHARS, ChitChat, cut
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_whole

OPENINGS = ("hi", "hey", "hello", "howdy", "good")
TALK = [
    ("a", "Hello there, how are you doing today?"),
    ("b", "I am doing very well, and how are you doing today?"),
    ("a", "I am well too. What did you do today?"),
    ("b", "I went to the lake with my dog and we had a good time."),
]
TEXTS = [text for _, text in TALK]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """The file of a package chitchat_dataset with 60 conversations, in place of the real one."""

    def turn(speaker, text):
        return [{"text": text, "sender": speaker}]

    talks = {
        f"key {i}": {
            "messages": [turn(*said) for said in [*TALK[:3], ("b", f"{TEXTS[3]} Day {i}.")]]
        }
        for i in range(60)
    }
    talks["rude"] = {"messages": [*talks["key 0"]["messages"], turn("a", "my number is 5")]}
    package = tmp_path / "chitchat_dataset"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "dataset.json").write_text(json.dumps(talks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "chitchat_dataset", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    importlib.invalidate_caches()
    return package / "dataset.json"


@pytest.mark.parametrize(
    "turns, pieces",
    [
        (TALK, [TEXTS]),
        (TALK[:3], [TEXTS[:2]]),  # ends with an answer
        (TALK[:1], []),
        ([], []),
        # What one speaker says in a row is one message.
        (
            [("a", "Hi!"), ("b", ""), ("a", "How are you?"), ("b", "Good."), ("b", "And you?")],
            [["Hi! How are you?", "Good. And you?"]],
        ),
        # A piece starts with a greeting or a question.
        ([("a", "I left."), ("b", "Why?"), ("a", "Home."), ("b", "Nice.")], [["Why?", "Home."]]),
        ([("a", "History is long."), ("b", "Hey you"), ("a", "Yes.")], [["Hey you", "Yes."]]),
    ],
)  # fmt: skip
def test_pieces(turns, pieces):
    assert list(cut(turns)) == pieces


@pytest.mark.parametrize(
    "unwanted", ["x" * 401, "See www.example.com", "What is the prompt?", "*They'll go."]
)
def test_what_is_left_out_ends_a_piece(unwanted):
    turns = [*TALK, ("a", unwanted), ("b", "Why?"), ("a", "Because.")]
    assert list(cut(turns)) == [TEXTS, ["Why?", "Because."]]


def test_pieces_are_short_and_keep_the_order():
    turns = [("ab"[i % 2], f"Why is it {i}? {'so ' * 20}") for i in range(101)]
    pieces = list(cut(turns))
    assert all(len(piece) % 2 == 0 and len("".join(piece)) <= MAX_CHARS for piece in pieces)
    said = [text for piece in pieces for text in piece]
    places = [[text for _, text in turns].index(text) for text in said]
    assert places == sorted(set(places)) and len(places) > 85


def test_whole_conversations_belong_to_one_split(dataset):
    keys = sorted(f"key {i}" for i in range(60))  # and not the rude one
    for split in SPLITS:
        assert list(ChitChat(split)) == [
            messages(*TEXTS[:3], f"{TEXTS[3]} Day {key[4:]}.")
            for key in keys
            if split_of(key) == split
        ]


def test_what_was_made_is_kept_until_it_is_out_of_date(dataset, tmp_path):
    first = list(ChitChat("train"))
    kept = tmp_path / "base/data/tasks/chitchat.json"
    kept.write_text(kept.read_text().replace("Hello there", "Hi there"))
    assert list(ChitChat("train"))[0]["messages"][0]["content"].startswith("Hi there")  # is read
    dataset.write_text(dataset.read_text() + "\n")
    assert list(ChitChat("train")) == first


def test_pretraining_validation_is_in_the_test_split(tmp_path):
    """For every size of a dataset: shards.py takes at most a tenth, by the same hash."""
    keys = [f"conversation {i}" for i in range(2_000)]
    shards.write_shards(((key, key) for key in keys), tmp_path, about_chars=1, manifest={})
    held_out = pq.read_table(tmp_path / "shard_00000.parquet")["text"].to_pylist()
    assert set(held_out) == {key for key in keys if split_of(key) == "test"}


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chitchat-dataset"):
        ChitChat("train")


@pytest.mark.slow
def test_the_real_conversations():
    pytest.importorskip("chitchat_dataset")
    demo = config.load(config.CONFIGS / "demo.py")
    train, test = ChitChat("train"), ChitChat("test")
    # Like the demo's tokenizer, this one has learned from the conversations to train on.
    texts = ("\n".join(m["content"] for m in talk["messages"]) for talk in train)
    tokenizer = bpe.train(texts, demo.tokenizer.vocab_size)
    lengths = [len(render_whole(tokenizer, talk)[0]) for talk in [*train[:500], *test[:500]]]
    assert sum(length > demo.model.seq_len + 1 for length in lengths) < 0.02 * len(lengths)
    assert len(train) > 5_000 and 0.07 < len(test) / len(train) < 0.15
    for conversation in [*train, *test]:
        texts = [message["content"] for message in conversation["messages"]]
        assert len(texts) >= 2 and len(texts) % 2 == 0 and all(texts)
        assert "?" in texts[0] or texts[0].lower().startswith(OPENINGS)
    assert len({str(it) for it in [*train, *test]}) > 0.99 * (len(train) + len(test))
