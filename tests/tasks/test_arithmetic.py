"""Generated sums and stories, recomputed from the question and from the calls they make."""

import hashlib
import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks import arithmetic
from nanochat_jax.tasks.arithmetic import LEVELS, MAX_RESULT, Arithmetic
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import render_conversation
from nanochat_jax.tools.calculator import calculate

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "goldens")
SPLITS = ("train", "test")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}


def evaluate(expression):
    """Products first, from left to right; every division without remainder."""
    number, *rest = re.split(r"(\+|-|\*|//)", expression)
    terms = [int(number)]
    signs = []
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        if sign in ("*", "//"):
            assert sign == "*" or terms[-1] % number == 0
            terms[-1] = OPERATORS[sign](terms[-1], number)
        else:
            signs.append(sign)
            terms.append(number)
    total = terms[0]
    for sign, term in zip(signs, terms[1:], strict=True):
        total = OPERATORS[sign](total, term)
    return total


def parts_of(conversation, kind):
    parts = conversation["messages"][-1]["content"]
    return [part["text"] for part in parts if part["type"] == kind]


def said(conversation):
    return "".join(part["text"] for part in conversation["messages"][-1]["content"])


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right(split, level):
    task = Arithmetic(split, level)
    for index in range(300):
        conversation = task[index]
        question = conversation["messages"][0]["content"]
        calls, outputs = parts_of(conversation, "python"), parts_of(conversation, "python_output")
        assert conversation["level"] == level and len(calls) == max(level, 1)
        kinds = [part["type"] for part in conversation["messages"][-1]["content"]]
        assert kinds == ["python", "python_output", "text"] * len(calls)
        known = Counter(numbers(question))
        known[2] += level > 1  # "the two of them"
        for call, output, text in zip(calls, outputs, parts_of(conversation, "text"), strict=True):
            assert int(output) == evaluate(call) and calculate(call) == output
            assert (2 if level else 0) <= int(output) <= MAX_RESULT
            assert int(output) in numbers(text)
            assert set(numbers(call)) <= set(known)  # made of what is known by now
            known[int(output)] += 1
        assert said(conversation).endswith(f"\n#### {outputs[-1]}")
        assert not re.search(r"[{}<>]", question + said(conversation))
        used = {number for call in calls for number in numbers(call)}
        assert set(numbers(question)) <= used  # nothing in the question goes unused


SPOKEN = {
    "plus": "+",
    "minus": "-",
    "take away": "-",
    "times": "*",
    "multiplied by": "*",
    "divided by": "/",
}


def test_plain_sums_say_what_they_calculate():
    """The expression read off the question: symbols, or words between the numbers."""
    read = 0
    task = Arithmetic("train", 0)
    for index in range(1_000):
        question = task[index]["messages"][0]["content"].lower()
        for words, sign in SPOKEN.items():
            question = question.replace(words, sign)
        found = re.findall(r"\d+(?:\s*[-+*/x×÷]\s*\d+)+", question)
        if len(found) == 1:
            expression = re.sub("[x×]", "*", re.sub(r"\s", "", found[0]))
            expression = re.sub("[/÷]", "//", expression)
            assert parts_of(task[index], "python") == [expression]
            read += 1
    assert read > 850


@pytest.mark.parametrize(
    "template, values, outputs",
    [
        ("{A} has ${x}, earns", {"x": "20", "y": "30", "b": "4", "c": "5"}, [50, 20, 30]),
        ("{A} needs {x} {item}", {"x": "40", "y": "10", "b": "6"}, [30, 5]),
        ("{A} pays with ${x}", {"x": "20", "b": "3", "c": "5"}, [15, 5]),
        ("{A} drives {x} miles", {"x": "60", "b": "3", "c": "5"}, [20, 100]),
        ("{A} has {x} {item}. {B} has {y} more than {A}, and {C}",
         {"x": "10", "y": "5", "z": "3"}, [15, 12, 22]),
        ("A rope", {"x": "10", "b": "3"}, []),
    ],
)  # fmt: skip
def test_stories_solved_by_hand(template, values, outputs):
    (solution,) = {s for q, s in arithmetic._STORIES if q.startswith(template)}
    assert arithmetic._results(solution, dict(values)) == outputs


def test_stories_are_many_and_different():
    questions = {question for question, _ in arithmetic._STORIES}
    assert len(questions) == len(arithmetic._STORIES) >= 40
    assert min(len(arithmetic._STORIES_OF[level]) for level in LEVELS[1:]) >= 10


def essence(conversation):
    """What must not be shared: a sum's call; a story without its people and things."""
    question = conversation["messages"][0]["content"]
    if conversation["level"] == 0:
        return parts_of(conversation, "python")[0]
    names = "|".join(arithmetic._NAMES + arithmetic._ITEMS + arithmetic._PACKS + arithmetic._THINGS)
    return re.sub(rf"\b(?:{names})\b", "_", question)


def test_train_and_test_share_nothing():
    train = {essence(conversation) for conversation in Arithmetic("train")[:8_000]}
    test = {essence(conversation) for conversation in Arithmetic("test")}
    assert not train & test
    assert len(test) > 800


def test_levels_are_mixed():
    levels = Counter(conversation["level"] for conversation in Arithmetic("train")[:2_000])
    assert levels[0] > levels[1] > levels[2] > levels[3] > 100


@pytest.mark.parametrize("split", SPLITS)
def test_examples_render_and_are_short(split):
    lengths = []
    for conversation in Arithmetic(split)[:300]:
        ids, mask = render_conversation(TOKENIZER, conversation)
        assert mask[-1] == 1 and sum(mask) > 10
        lengths.append(len(ids))
    assert max(lengths) < 200


@pytest.mark.parametrize("split, digest", [("train", "10b5a5659e5c"), ("test", "22df6c6142dc")])
def test_examples_stay_the_same(split, digest):
    task = Arithmetic(split)
    first = json.dumps(task[:20])
    assert hashlib.sha256(first.encode()).hexdigest()[:12] == digest
    assert task[17] == Arithmetic(split)[-len(task) + 17]


def test_grading():
    task = Arithmetic("test")
    right = [(index, said(task[index])) for index in range(50)]
    assert all(task.grade(right))
    wrong = [(i, re.sub(r"#### (\d+)", r"#### 1\1", text)) for i, text in right]
    wrong += [(i, text.replace("####", "")) for i, text in right]
    assert not any(task.grade(wrong))
    assert task.grade([right[3], wrong[4], right[5]]) == [True, False, True]


def test_wrong_arguments():
    with pytest.raises(UserError, match="'val'.*train, test"):
        Arithmetic("val")
    with pytest.raises(UserError, match="level 4"):
        Arithmetic("train", 4)
