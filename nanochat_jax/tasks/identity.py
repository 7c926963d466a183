"""Who the assistant is: conversations made from a persona file. Generated.

    Hi! What's your name?          My name is Nano. I'm a small language model.
    And who made you?              I was made by the nanochat-jax authors.

The persona (configs/persona.toml) says it once, the questions and answers of identity.toml say it
in many ways. A conversation has one to three questions, which do not depend on the persona; no
sequence of them is in both splits.
"""

import random
import tomllib
from pathlib import Path
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, GeneratedTask, messages, read_toml, split_of

PERSONA = Path(__file__).parents[2] / "configs" / "persona.toml"
_TEXTS = ("name", "kind", "maker", "training", "source", "licence", "style")
_LISTS = {"languages": "and", "can": "and", "cannot": "or"}  # and what joins their items
_PHRASES = read_toml("identity.toml")
_ELSEWHERE_FRAC, _GREETING_FRAC, _THANKS_FRAC, _BEFORE_FRAC = 0.15, 0.2, 0.15, 0.4


class Identity(GeneratedTask):
    """`persona`: path of a persona file, "" for configs/persona.toml."""

    seed = "identity"
    sizes = {"train": 1_000, "test": 100}

    def __init__(self, split: str, persona: str | Path = ""):
        super().__init__(split)
        values = read_persona(persona or PERSONA)
        self.slots = values | {"Maker": values["maker"][0].upper() + values["maker"][1:]}
        for key, word in _LISTS.items():
            *others, last = values[key]
            self.slots[key] = f"{', '.join(others)} {word} {last}" if others else last

    def draw(self, rng: random.Random) -> Conversation:
        while True:
            turns = _draw_turns(rng)
            if split_of("\n".join(question for question, _ in turns)) == self.split:
                break
        return messages(*(text.format(**self.slots) for turn in turns for text in turn))


def _draw_turns(rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) templates of a conversation."""
    if rng.random() < _ELSEWHERE_FRAC:
        elsewhere = rng.choice(_PHRASES["elsewhere"])
        return [(rng.choice(elsewhere["questions"]), rng.choice(elsewhere["answers"]))]
    greeted = rng.random() < _GREETING_FRAC
    topics = rng.sample(_PHRASES["topic"], rng.choice((1, 1, 2) if greeted else (1, 1, 2, 3)))
    turns = [_draw_exchange(rng, _PHRASES["greeting"])] if greeted else []
    for topic in topics:
        question, answer = _draw_exchange(rng, topic)
        if rng.random() < _BEFORE_FRAC:
            before = rng.choice(_PHRASES["before_later" if turns else "before_first"])
            if not before.endswith(("! ", ". ")):
                question = question[0].lower() + question[1:]
            question = before + question
        turns.append((question, answer))
    if len(turns) < 3 and rng.random() < _THANKS_FRAC:
        turns.append(_draw_exchange(rng, _PHRASES["thanks"]))
    return turns


def _draw_exchange(rng: random.Random, exchange: dict[str, list[str]]) -> tuple[str, str]:
    """A question, sometimes typed without capitals or its last mark, and an answer."""
    question, answer = rng.choice(exchange["questions"]), rng.choice(exchange["answers"])
    if rng.random() < 0.2 and "{" not in question:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    return question, answer


def read_persona(path: str | Path) -> dict[str, Any]:
    """The values of a persona file, each of the right kind. UserError names file and key."""
    try:
        persona = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no TOML is a ValueError too
        raise UserError(f"{path}: {error}; expected a file like {PERSONA}") from None
    for key in sorted({*_TEXTS, *_LISTS, *persona}):
        value = persona.get(key)
        items = value if key in _LISTS else [value]
        texts = isinstance(items, list) and [isinstance(it, str) and it.strip() for it in items]
        if key not in (*_TEXTS, *_LISTS) or not texts or not all(texts):
            raise UserError(
                f"{path}: {key} is {value!r}, expected text for {', '.join(_TEXTS)}, lists of text "
                f"for {', '.join(_LISTS)}, and no other key"
            )
    return persona
