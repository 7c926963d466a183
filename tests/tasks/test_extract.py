"""Answers, programs and the order of a mixture against upstream's and against written-out cases."""

import json
from pathlib import Path

import pytest

from nanochat_jax.tasks.base import mixture_order
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.humaneval import extract_imports, extract_program

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "text.json").read_text())


@pytest.mark.parametrize(
    "key, function",
    [
        ("gsm_extract", extract_answer),
        ("extract_program", extract_program),
        ("extract_imports", extract_imports),
    ],
)
def test_goldens(key, function):
    assert [function(row["text"]) for row in GOLDENS[key]] == [row["out"] for row in GOLDENS[key]]


def test_golden_mixture():
    order = mixture_order([range(7), range(5), range(8)[1::2]])
    assert [["abc"[task], index] for task, index in order] == GOLDENS["mixture"]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so #### 1,000,000 dollars", "1000000"),
        ("#### -0.5", "-0.5"),
        ("#### $5", None),
        ("####  5", None),
        ("##### 5", "5"),
        ("", None),
    ],
)
def test_answers(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "completion, program",
    [
        ("  x = 1 \n", "x = 1"),
        ("```python\n\n    return 1\n```", "return 1"),
        ("```\na\n```\n```python\nb\n```", "a"),
        ("```js\na\n```", "```js\na\n```"),
        ("```python \nx = '```'\n```", "x = '```'"),
    ],
)
def test_programs(completion, program):
    assert extract_program(completion) == program


@pytest.mark.parametrize(
    "prompt, imports",
    [
        (
            "\n\n  import math  \n# why\nfrom a import b\nimported = 1\nimport c",
            "import math\nfrom a import b",
        ),
        ("def f():\n    import os", ""),
        ("", ""),
    ],
)
def test_imports(prompt, imports):
    assert extract_imports(prompt) == imports
