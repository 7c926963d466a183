"""Conversations between people as messages: cut, joined and split; on a small set of our own."""

import importlib
import json
import sys

import pytest

from nanochat_jax.tasks.base import SPLITS, messages, split_of
from nanochat_jax.tasks.chitchat import ChitChat, cut

TEXTS = (
    "Hello there, how are you doing today?",
    "I am doing very well, and how are you doing today?",
    "I am well too. What did you do today?",
    "I went to the lake with my dog and we had a good time.",
)


def raw_talk(*texts):
    return {"messages": [[{"text": text, "sender": i % 2}] for i, text in enumerate(texts)]}


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """The file of a package chitchat_dataset with 60 conversations, in place of the real one."""
    talks = {f"key {i}": raw_talk(*TEXTS[:3], f"{TEXTS[3]} Day {i}.") for i in range(60)}
    talks["rude"] = raw_talk(*TEXTS, "my number is 5")
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
        ("a:Hi!|b:Hey.|a:Yes?|b:No.", ["Hi!|Hey.|Yes?|No."]),
        ("a:Hi!|b:Hey.|a:Yes?", ["Hi!|Hey."]),  # ends with an answer
        ("a:Hi!|b:", []),
        ("a:Hi!|b:|a:You?|b:I?|b:Ok.", ["Hi! You?|I? Ok."]),  # in a row: one message
        ("a:I left.|b:Why?|a:Home.|b:Nice.", ["Why?|Home."]),  # starts with a question
        ("a:It is long.|b:Hey you|a:Yes.", ["Hey you|Yes."]),  # or a greeting
        ("a:Hi!|b:Hey.|a:See www.example.com|b:Why?|a:So.", ["Hi!|Hey.", "Why?|So."]),
        ("a:Hi!|b:Hey.|a:What is the prompt?|b:Why?|a:So.", ["Hi!|Hey.", "Why?|So."]),
        ("a:Hi!|b:Hey.|a:*They'll go.|b:Why?|a:So.", ["Hi!|Hey.", "Why?|So."]),
        (f"a:Hi!|b:Hey.|a:{'x' * 401}|b:Why?|a:So.", ["Hi!|Hey.", "Why?|So."]),
    ],
)
def test_pieces(turns, pieces):
    spoken = [turn.partition(":")[::2] for turn in turns.split("|")]
    assert ["|".join(piece) for piece in cut(spoken)] == pieces


def test_whole_conversations_belong_to_one_split(dataset):
    keys = sorted(f"key {i}" for i in range(60))  # and not the rude one
    for split in SPLITS:
        mine = [key for key in keys if split_of(key) == split]
        said = [messages(*TEXTS[:3], f"{TEXTS[3]} Day {key[4:]}.") for key in mine]
        assert list(ChitChat(split)) == said


def test_what_was_made_is_kept_until_it_is_out_of_date(dataset, tmp_path):
    first = list(ChitChat("train"))
    kept = tmp_path / "base/data/tasks/chitchat.json"
    kept.write_text(kept.read_text().replace("Hello there", "Hi there"))
    assert list(ChitChat("train"))[0]["messages"][0]["content"].startswith("Hi there")  # is read
    dataset.write_text(dataset.read_text() + "\n")
    assert list(ChitChat("train")) == first
