"""What all generated tasks promise: the same examples always, none of train in test, short ones."""

import hashlib
import json
import re

import pytest

from nanochat_jax.tasks.base import SPLITS, read_toml
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import render_conversation

TASKS = ("arithmetic", "identity", "spelling_bee", "simple_spelling")
WORDS = read_toml("arithmetic.toml")
CAST = "|".join(word for key in ("names", "items", "packs", "things") for word in WORDS[key])


def said(conversation):
    """An answer as the engine decodes it: all of its parts in a row."""
    answer = conversation["messages"][-1]["content"]
    return answer if isinstance(answer, str) else "".join(part["text"] for part in answer)


@pytest.mark.parametrize(
    "name, train, test",
    [
        ("arithmetic", "10b5a5659e5c", "22df6c6142dc"),
        ("spelling_bee", "ce6abbeb2cbf", "a9f6e1c0b97a"),
        ("simple_spelling", "222168e0a0c0", "da8062bf334f"),
    ],
)
def test_examples_stay_the_same(name, train, test):
    """For identity see test_identity.py, which has a persona that does not change."""
    for split, digest in (("train", train), ("test", test)):
        task = open_task(f"{name} {split}")
        assert hashlib.sha256(json.dumps(task[:20]).encode()).hexdigest()[:12] == digest
        assert task[17] == open_task(f"{name} {split}")[17 - len(task)]


def not_shared(name, conversation):
    """What no example of the other split may have, whatever the wording around it."""
    asked = [m["content"] for m in conversation["messages"] if m["role"] == "user"]
    match name:
        case "identity":
            return tuple(asked)
        case "arithmetic" if conversation["level"] == 0:
            return conversation["messages"][-1]["content"][0]["text"]
        case "arithmetic":
            return re.sub(rf"\b(?:{CAST})\b", "_", asked[0])
    return said(conversation).partition(":")[0]


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_share_nothing(name):
    train, test = (
        {not_shared(name, conversation) for conversation in open_task(f"{name} {split}")[:4_000]}
        for split in SPLITS
    )
    assert not train & test
    assert len(train) > 700 and len(test) > 80


@pytest.mark.parametrize("name", TASKS)
def test_examples_fit_the_context_of_the_demo(name, goldens):
    tokenizer = Tokenizer.load(goldens)  # smaller than the demo's, so it needs more tokens
    for conversation in open_task(f"{name} train")[:400]:
        ids, mask = render_conversation(tokenizer, conversation)
        assert mask[-1] == 1 and sum(mask) > 3 and len(ids) < 256


def test_grading_a_spelling():
    task = open_task("simple_spelling test")
    right = [(index, said(task[index])) for index in range(20)]
    words = [text.partition(":")[0] for _, text in right]
    assert all(task.grade(right + [(i, ",".join(word)) for i, word in enumerate(words)]))
    wrong = [(index, f"{word}: {word}") for index, word in enumerate(words)]
    wrong += [(i, text[:-2]) for i, text in right] + [(i, f"{text} e") for i, text in right]
    assert not any(task.grade([*wrong, (0, "")]))
