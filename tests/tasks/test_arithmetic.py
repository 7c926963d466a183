"""Generated sums and stories, recomputed from the question and from the calls they make."""

import re
from collections import Counter

import pytest

from nanochat_jax.tasks.arithmetic import MAX_RESULT, Arithmetic
from nanochat_jax.tasks.base import SPLITS


def evaluate(expression):
    """What Python makes of it; every division without remainder."""
    assert re.fullmatch(r"\d+((\+|-|\*|//)\d+)+", expression)
    value = eval(expression)
    assert value == eval(expression.replace("//", "/"))
    return value


def parts_of(conversation, kind):
    parts = conversation["messages"][-1]["content"]
    return [part["text"] for part in parts if part["type"] == kind]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(split):
    levels = Counter()
    for conversation in Arithmetic(split)[:1_000]:
        question, level = conversation["messages"][0]["content"], conversation["level"]
        levels[level] += 1
        calls, outputs = parts_of(conversation, "python"), parts_of(conversation, "python_output")
        kinds = [part["type"] for part in conversation["messages"][-1]["content"]]
        assert kinds == ["python", "python_output", "text"] * max(level, 1)
        known = Counter(numbers(question))
        known[2] += level > 1  # "the two of them"
        texts = parts_of(conversation, "text")
        for call, output, text in zip(calls, outputs, texts, strict=True):
            assert int(output) == evaluate(call)
            assert (2 if level else 0) <= int(output) <= MAX_RESULT
            assert int(output) in numbers(text)
            assert set(numbers(call)) <= set(known)  # made of what is known by now
            known[int(output)] += 1
        assert texts[-1].endswith(f"\n#### {outputs[-1]}")
        assert not re.search(r"[{}<>]", question + "".join(texts))
        used = {number for call in calls for number in numbers(call)}
        assert set(numbers(question)) <= used  # nothing in the question goes unused
    assert levels[0] > levels[1] > levels[2] > levels[3] > 60


SPOKEN = {"plus": "+", "minus": "-", "take away": "-", "times": "*", "multiplied by": "*"}
SPOKEN |= {"divided by": "//", "x": "*", "×": "*", "/": "//", "÷": "//"}


def test_plain_sums_say_what_they_calculate():
    """The expression read off the question: symbols, or words between the numbers."""
    sums = [it for it in Arithmetic("train")[:2_000] if it["level"] == 0]
    read = []
    for conversation in sums:
        question = conversation["messages"][0]["content"].lower()
        for written, sign in SPOKEN.items():
            question = re.sub(rf"(?<=\d) ?{written} ?(?=\d)", sign, question)
        question = re.sub(r"(?<=\d) ([-+*]) (?=\d)", r"\1", question)
        found = re.findall(r"\d+(?:(?:[-+*]|//)\d+)+", question)
        read += [found == parts_of(conversation, "python")] * (len(found) == 1)
    assert all(read) and len(read) > 0.85 * len(sums) > 700
