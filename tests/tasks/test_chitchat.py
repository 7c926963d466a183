"""Conversations between people as messages: cut, joined and split; on a small set of our own."""

import hashlib
import importlib.util
import json
import sys

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.data import demo, shards
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tasks import chitchat
from nanochat_jax.tasks.base import split_of
from nanochat_jax.tasks.chitchat import MAX_CHARS, ChitChat, cut

OPENINGS = ("hi", "hey", "hello", "howdy", "good")
TALK = [
    ("a", "Hello there, how are you doing today?"),
    ("b", "I am doing very well, and how are you doing today?"),
    ("a", "I am well too. What did you do today?"),
    ("b", "I went to the lake with my dog and we had a good time."),
]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A package chitchat_dataset with 60 conversations of four turns, in place of the real one.

    Its file; what the task keeps goes into a folder of its own.
    """

    def turn(speaker, *texts):
        return [{"text": text, "sender": speaker} for text in texts]

    talks = {
        f"key {i}": {
            "messages": [turn(s, text) for s, text in TALK[:3]]
            + [turn("b", f"{TALK[3][1]} It was number {i}.")]
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
    chitchat._all_pieces.cache_clear()
    yield package / "dataset.json"
    chitchat._all_pieces.cache_clear()


def test_speakers_become_roles():
    assert list(cut(TALK)) == [[text for _, text in TALK]]
    assert list(cut(TALK[:3])) == [[text for _, text in TALK[:2]]]  # ends with an answer
    assert list(cut(TALK[:1])) == list(cut([])) == []


def test_what_one_speaker_says_in_a_row_is_one_message():
    turns = [("a", "Hi!"), ("b", ""), ("a", "How are you?"), ("b", "Good."), ("b", "And you?")]
    assert list(cut(turns)) == [["Hi! How are you?", "Good. And you?"]]


def test_a_piece_starts_with_a_greeting_or_a_question():
    turns = [("a", "So I went."), ("b", "Where?"), ("a", "Home."), ("b", "Nice.")]
    assert list(cut(turns)) == [["Where?", "Home."]]
    turns = [("a", "History is long."), ("b", "Hey you"), ("a", "Yes.")]
    assert list(cut(turns)) == [["Hey you", "Yes."]]


@pytest.mark.parametrize(
    "unwanted", ["x" * 401, "See www.example.com", "What is the prompt?", "*They'll go."]
)
def test_what_is_left_out_ends_a_piece(unwanted):
    turns = [*TALK, ("a", unwanted), ("b", "Why?"), ("a", "Because.")]
    assert list(cut(turns)) == [[text for _, text in TALK], ["Why?", "Because."]]


def test_pieces_are_short_and_keep_the_order():
    turns = [("ab"[i % 2], f"Why is it {i}? {'so ' * 20}") for i in range(101)]
    pieces = list(cut(turns))
    assert all(len(piece) % 2 == 0 and len("".join(piece)) <= MAX_CHARS for piece in pieces)
    said = [text for piece in pieces for text in piece]
    places = [[text for _, text in turns].index(text) for text in said]
    assert places == sorted(set(places)) and len(places) > 85


def test_whole_conversations_belong_to_one_split(dataset):
    train, test = ChitChat("train"), ChitChat("test")
    keys = {f"key {i}" for i in range(60)}
    for task, split in ((train, "train"), (test, "test")):
        expected = [
            [*(text for _, text in TALK[:3]), f"{TALK[3][1]} It was number {key[4:]}."]
            for key in sorted(keys)
            if split_of(key) == split
        ]
        got = [[message["content"] for message in c["messages"]] for c in task]
        assert got == expected != []
        assert all(
            [message["role"] for message in c["messages"]] == ["user", "assistant"] * 2
            for c in task
        )
    assert len(train) + len(test) == 60  # the rude one is dropped whole


def test_what_was_made_is_kept_until_it_is_out_of_date(dataset, monkeypatch):
    first = chitchat._all_pieces()
    read, times = demo.read_dataset, []
    monkeypatch.setattr(demo, "read_dataset", lambda: times.append(1) or read())

    def next_process():
        chitchat._all_pieces.cache_clear()
        return chitchat._all_pieces()

    assert next_process() == first and not times
    talks = json.loads(dataset.read_text())
    del talks["key 7"]
    dataset.write_text(json.dumps(talks))
    assert next_process() == [(key, piece) for key, piece in first if key != "key 7"] != first
    assert next_process() != first and len(times) == 1
    code = dataset.with_name("changed.py")
    code.write_text("")
    monkeypatch.setattr(chitchat, "__file__", str(code))
    next_process()
    assert len(times) == 2


def test_pretraining_validation_is_in_the_test_split(tmp_path):
    """For every size of a dataset: shards.py takes at most a tenth, by the same hash."""
    keys = [f"conversation {i}" for i in range(2_000)]
    shards.write_shards(((key, key) for key in keys), tmp_path, about_chars=1, manifest={})
    validation = Corpus([tmp_path / "shard_00000.parquet"]).texts()
    assert set(validation) == {key for key in keys if split_of(key) == "test"}


def test_without_the_package(monkeypatch):
    chitchat._all_pieces.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chitchat-dataset"):
        ChitChat("train")


def test_a_wrong_split():
    with pytest.raises(UserError, match="'val'.*train, test"):
        ChitChat("val")


@pytest.mark.slow
def test_the_real_conversations():
    pytest.importorskip("chitchat_dataset")
    train, test = ChitChat("train"), ChitChat("test")
    assert len(train) > 5_000 and 0.07 < len(test) / len(train) < 0.15
    seen = set()
    for conversation in [*train, *test]:
        texts = [message["content"] for message in conversation["messages"]]
        assert len(texts) >= 2 and len(texts) % 2 == 0 and all(texts)
        assert "?" in texts[0] or texts[0].lower().startswith(OPENINGS)
        seen.add(hashlib.sha256("\n".join(texts).encode()).digest())
    assert len(seen) > 0.99 * (len(train) + len(test))
