"""What the assistant says of itself: from the persona file, and from nowhere else."""

import hashlib
import json

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.identity import PERSONA, Identity, read_persona

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


@pytest.mark.parametrize("split, digest", [("train", "8a254ddf9f0a"), ("test", "ba99d3be4129")])
def test_examples_stay_the_same(split, digest, tmp_path):
    task = Identity(split, write_toml(tmp_path / "zebra.toml", OTHER))
    assert hashlib.sha256(json.dumps(task[:20]).encode()).hexdigest()[:12] == digest


def test_the_persona_alone_speaks(tmp_path):
    """Nothing of the default persona is left in another one's words, and all of that is said."""
    mine = Identity("train")
    theirs = Identity("train", write_toml(tmp_path / "zebra.toml", OTHER))
    said = "\n".join(text for c in theirs for text in said_by("assistant", c))
    default = read_persona(PERSONA)
    for key in ("name", "maker", "training", "source", "licence", "style"):
        assert default[key] not in said and OTHER[key] in said
    assert "gallop and graze" in said and "fly, {swim} or sing" in said and "Neigh" in said
    assert "The zoo of Quux made me." in said
    asked = [[q.replace("Nano", "Zebulon") for q in said_by("user", it)] for it in mine]
    assert asked == [said_by("user", it) for it in theirs]  # questions do not depend on it


@pytest.mark.parametrize(
    "key, value",
    [("name", None), ("nmae", "x"), ("maker", 3), ("style", " "), ("can", "sing"), ("can", [])]
    + [("languages", ["a", 1])],
)
def test_a_malformed_persona(tmp_path, key, value):
    persona = {k: v for k, v in (OTHER | {key: value}).items() if v is not None}
    path = write_toml(tmp_path / "p.toml", persona)
    with pytest.raises(UserError, match=rf"p\.toml.* {key}\b") as caught:
        Identity("train", path)
    assert "\n" not in str(caught.value)
