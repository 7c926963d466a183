"""What the assistant says of itself: from the persona file, and from nowhere else."""

import hashlib
import json
from pathlib import Path

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.identity import PERSONA, Identity, read_persona
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import render_conversation

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.load(ROOT / "tests" / "goldens")
OTHER = {
    "name": "Zebulon",
    "kind": "a talking zebra",
    "maker": "the zoo of Quux",
    "training": "raised on hay",
    "source": "the stable",
    "licence": "a leash",
    "style": "stripy",
    "languages": ["Neigh"],
    "can": ["gallop", "graze"],
    "cannot": ["fly", "{swim}", "sing"],
}


def write_toml(path, persona):
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in persona.items()))
    return path


def said_by(role, conversation):
    return [m["content"] for m in conversation["messages"] if m["role"] == role]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_toml(tmp_path_factory.mktemp("persona") / "zebra.toml", OTHER)


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_well_formed(split):
    lengths = []
    for conversation in Identity(split):
        turns = len(conversation["messages"]) // 2
        assert 1 <= turns <= 3
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * turns
        assert all(message["content"] for message in conversation["messages"])
        ids, mask = render_conversation(TOKENIZER, conversation)
        assert mask[-1] == 1
        lengths.append(len(ids))
    assert max(lengths) < 256


def test_the_persona_alone_speaks(other):
    """Nothing of the default persona is left in another one's words, and all of that is said."""
    said = "\n".join(text for c in Identity("train", other) for text in said_by("assistant", c))
    default = read_persona(PERSONA)
    for key in ("name", "maker", "training", "source", "licence", "style"):
        assert default[key] not in said and OTHER[key] in said
    assert "gallop and graze" in said and "fly, {swim} or sing" in said and "Neigh" in said
    assert "The zoo of Quux made me." in said


def test_questions_do_not_depend_on_the_persona(other):
    mine, theirs = Identity("train"), Identity("train", other)
    for index in range(200):
        for a, b in zip(said_by("user", mine[index]), said_by("user", theirs[index]), strict=True):
            assert a.replace("Nano", "Zebulon") == b


def test_who_are_you_is_answered_with_the_name():
    answers = [
        text
        for c in Identity("train")
        for asked, text in zip(said_by("user", c), said_by("assistant", c), strict=True)
        if "your name" in asked.lower() or "who are you" in asked.lower()
    ]
    assert len(answers) > 30 and all("Nano" in text for text in answers)


def test_train_and_test_share_no_conversation():
    questions = {
        split: {tuple(said_by("user", task.example(i))) for i in range(count)}
        for split, count in (("train", 4_000), ("test", 400))
        for task in [Identity(split)]
    }
    assert not questions["train"] & questions["test"]
    assert len(questions["train"]) > 2_500 and len(questions["test"]) > 250


@pytest.mark.parametrize("split, digest", [("train", "8a254ddf9f0a"), ("test", "ba99d3be4129")])
def test_examples_stay_the_same(split, digest, other):
    task = Identity(split, other)
    first = json.dumps(task[:20])
    assert hashlib.sha256(first.encode()).hexdigest()[:12] == digest
    assert task[17] == Identity(split, other)[-len(task) + 17]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": None}, "lacks name; expected exactly the keys name, kind"),
        ({"nmae": "x"}, "has nmae; expected"),
        ({"maker": 3}, "maker is 3, expected text"),
        ({"style": " "}, "style is ' ', expected text"),
        ({"can": "sing"}, "can is 'sing', expected texts"),
        ({"can": []}, r"can is \[\], expected texts"),
        ({"languages": ["a", 1]}, "languages is .*expected texts"),
    ],
)
def test_a_malformed_persona(tmp_path, change, message):
    persona = {key: value for key, value in (OTHER | change).items() if value is not None}
    path = write_toml(tmp_path / "p.toml", persona)
    with pytest.raises(UserError, match=message) as caught:
        Identity("train", path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_persona(tmp_path):
    with pytest.raises(UserError, match="none.toml cannot be read"):
        Identity("train", tmp_path / "none.toml")
    (tmp_path / "p.toml").write_text("name = \n")
    with pytest.raises(UserError, match="not TOML"):
        Identity("train", tmp_path / "p.toml")
    with pytest.raises(UserError, match="'val'.*train, test"):
        Identity("val")
