"""Sums and word problems in the form of GSM8K, generated: numbers small enough for a small model.

    Anna has $20 and buys 3 pears for $4 each. How much money is left?
        <|python_start|>3*4<|python_end|>12      The pears cost $12.
        <|python_start|>20-12<|python_end|>8     $8 is left.
        #### 8

Level 0 is a sum, level n > 0 a story of n steps; arithmetic.toml has their words. Every step gives
a whole number that is not too large, and says it right after the calculator has. No sum, and no
story with the same numbers, is in both splits, whatever its names, things and wording.
"""

import random
import re

from nanochat_jax.tasks.base import Conversation, GeneratedTask, messages, read_toml, split_of
from nanochat_jax.tasks.gsm8k import NumberTask, solution_parts
from nanochat_jax.tools.calculator import calculate

MAX_RESULT = 999
_LEVEL_WEIGHTS = (5, 3, 2, 1)
# The range of the numbers that a letter stands for.
_RANGES = dict.fromkeys("xyz", (2, 99)) | dict.fromkeys("bcde", (2, 12))
_RANGES |= dict.fromkeys("af", (0, 20)) | {"w": (100, 899)}

_PHRASES = read_toml("arithmetic.toml")
_Steps = list[list[str]]  # name of the result, call of the calculator, sentence


class Arithmetic(NumberTask, GeneratedTask):
    """Each example carries its "level"."""

    seed = "arithmetic"
    sizes = {"train": 100_000, "test": 1_000}

    def draw(self, rng: random.Random) -> Conversation:
        level = rng.choices(range(len(_LEVEL_WEIGHTS)), _LEVEL_WEIGHTS)[0]
        essence, question, steps = _draw_story(rng, level) if level else _draw_sum(rng)
        letters = sorted(set(re.findall("{([a-z])}", question)))
        least = 2 if level else 0  # what stories count is in the plural
        while True:
            slots = {letter: str(rng.randint(*_RANGES[letter])) for letter in letters}
            if split_of(essence.format(**slots)) == self.split and solve(steps, slots, least):
                break
        slots |= zip("ABC", rng.sample(_PHRASES["names"], 3), strict=True)
        slots |= {word: rng.choice(_PHRASES[f"{word}s"]) for word in ("item", "pack", "thing")}
        said = [f"<<{call}={{{name}}}>>{sentence}\n" for name, call, sentence in steps]
        solution = "".join([*said, "#### {n}"]).format(**slots)
        return messages(question.format(**slots), solution_parts(solution)) | {"level": level}


def solve(steps: _Steps, slots: dict[str, str], least: int) -> bool:
    """Add the results to `slots`; False if one is not from least to MAX_RESULT or not whole."""
    for name, call, _ in steps:
        call = call.format(**slots)
        result = calculate(call)
        if result is None or not least <= int(result) <= MAX_RESULT:
            return False
        if "//" in call and calculate(call.replace("//", "/")) != f"{result}.0":
            return False
        slots[name] = result
    return True


def _draw_story(rng: random.Random, level: int) -> tuple[str, str, _Steps]:
    """(what decides the split, question, steps), the numbers still {letters}."""
    story = rng.choice([story for story in _PHRASES["story"] if len(story["steps"]) == level])
    essence = re.sub("{([A-Z]|[a-z]{2,})}", r"\1", story["question"])  # whoever it is about
    return essence, story["question"], story["steps"]


def _draw_sum(rng: random.Random) -> tuple[str, str, _Steps]:
    """As `_draw_story`; the sum itself decides the split."""
    sums, frames = _PHRASES["sum"], _PHRASES["frame"]
    drawn = rng.choices(sums, [each["weight"] for each in sums])[0]
    frame = rng.choices(frames, [each["weight"] for each in frames])[0]
    if frame["language"] == "English":
        wordings = drawn["symbols"] + drawn["words"]
        framed = [question.format(rng.choice(wordings)) for question in frame["questions"]]
        question = rng.choice(framed + drawn.get("requests", []))
    else:
        question = rng.choice(frame["questions"]).format(rng.choice(drawn["symbols"]))
    question = question[0].upper() + question[1:] if rng.random() < 0.8 else question.lower()
    written = drawn["call"].replace("//", "/")
    return written, question, [["n", drawn["call"], frame["answer"].replace("{sum}", written)]]
