"""Answers, programs and the order of a mixture against upstream's and against written-out cases."""

import json
from pathlib import Path

import pytest

from nanochat_jax.tasks.base import mixture_order
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.humaneval import extract_imports, extract_program

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "text.json").read_text())
EXTRACT = {
    "gsm_extract": extract_answer,
    "extract_program": extract_program,
    "extract_imports": extract_imports,
}


@pytest.mark.parametrize("key", EXTRACT)
def test_goldens(key):
    assert [EXTRACT[key](row["text"]) for row in GOLDENS[key]] == [
        row["out"] for row in GOLDENS[key]
    ]


def test_golden_mixture():
    order = mixture_order([range(7), range(5), range(8)[1::2]])
    assert [["abc"[task], index] for task, index in order] == GOLDENS["mixture"]


IMPORTS = "\n\n  import math  \n# why\nfrom a import b\nimported = 1\nimport c"


@pytest.mark.parametrize(
    "extract, text, found",
    [
        (extract_answer, "so #### 1,000,000 dollars", "1000000"),
        (extract_answer, "#### -0.5", "-0.5"),
        (extract_answer, "#### $5", None),
        (extract_answer, "####  5", None),
        (extract_answer, "", None),
        (extract_program, "  x = 1 \n", "x = 1"),
        (extract_program, "```python\n\n    return 1\n```", "return 1"),
        (extract_program, "```\na\n```\n```python\nb\n```", "a"),
        (extract_program, "```js\na\n```", "```js\na\n```"),
        (extract_program, "```python \nx = '```'\n```", "x = '```'"),
        (extract_imports, IMPORTS, "import math\nfrom a import b"),
        (extract_imports, "def f():\n    import os", ""),
    ],
)
def test_written_out(extract, text, found):
    assert extract(text) == found
