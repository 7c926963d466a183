"""Problems in HumanEval's form: who passes, who does not, and what a row becomes."""

import json

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.humaneval import HumanEval, program
from nanochat_jax.tools.sandbox import Limits
from scripts import sandbox as script

ROWS = [
    {
        "task_id": "Ours/0",
        "prompt": 'from typing import List\n\n\ndef largest(n: List[int]):\n    """Max."""\n',
        "canonical_solution": "    return max(n)\n",
        "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n",
        "entry_point": "largest",
    },
    {
        "task_id": "Ours/1",
        "prompt": "import math\n\ndef twice(x):\n    return 2 * x\n\n"
        'def root(x):\n    """Square root of twice x."""\n',
        "canonical_solution": "    return math.sqrt(twice(x))\n",
        "test": "\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(8) == twice(2)\n",
        "entry_point": "root",
    },
    {
        "task_id": "Ours/2",
        "prompt": 'def greet(name):\n    """A greeting."""\n',
        "canonical_solution": "    return f'hello {name}'\n",
        "test": "def check(candidate):\n    for n in 'ab':\n"
        "        assert candidate(n) == f'hello {n}'\n",
        "entry_point": "greet",
    },
]
TASK = HumanEval(ROWS, limits=Limits(wall_secs=20))


def test_an_example_is_the_prompt_and_the_whole_program():
    assert TASK[0]["messages"] == [
        {"role": "user", "content": ROWS[0]["prompt"]},
        {"role": "assistant", "content": ROWS[0]["prompt"] + "    return max(n)\n"},
    ]
    assert [example["task_id"] for example in TASK[1:]] == ["Ours/1", "Ours/2"]
    assert (len(TASK), TASK.kind) == (3, "generative")


def test_the_program_brings_the_prompts_imports():
    answer = "Sure:\n```python\ndef f(x: List[int]):\n    return x\n```\nThat is it."
    text = program("from typing import List\n\ndef f(x):\n", answer, "def check(f):\n    pass", "f")
    parts = ["from typing import List", "def f(x: List[int]):\n    return x"]
    assert text == "\n\n".join([*parts, "def check(f):\n    pass", "check(f)\n"])


def test_canonical_solutions_pass_and_wrong_ones_do_not():
    right = [(i, TASK[i]["messages"][1]["content"]) for i in range(3)]
    wrong = [(i, row["prompt"] + "    return None\n") for i, row in enumerate(ROWS)]
    assert TASK.grade(right) == [True] * 3
    assert TASK.grade(wrong) == [False] * 3


HEAD = "def greet(name):\n"


VERDICTS = [
    ("```python\ndef greet(name):\n    return 'hello ' + name\n```", True),
    ("```\ngreet = 'hello {}'.format\n```", True),
    (HEAD + "    return 'hello ' + name\nif __name__ == '__main__':\n    input()", True),
    (HEAD + "    return 'hello a'", False),
    (HEAD + "    return 'hello b'", False),
    (HEAD + "    import sys; sys.exit(0)", False),
    (HEAD + "    import os; os._exit(0)", False),
    ("import sys\nprint('ok')\nsys.exit()", False),
    ("import atexit, os\natexit.register(os._exit, 0)\n" + HEAD + "    return 1", False),
    ("def other(name):\n    return 'hello ' + name", False),
    ("I cannot help with that.", False),
    ("", False),
]


def test_verdicts():
    verdicts = TASK.grade([(2, answer) for answer, _ in VERDICTS])
    assert list(zip([answer for answer, _ in VERDICTS], verdicts, strict=True)) == VERDICTS


def test_verdicts_keep_their_order_and_repeat():
    right, wrong = "def greet(n):\n    return 'hello ' + n", "greet = 1"
    verdicts = TASK.grade([(2, wrong), (2, right), (0, right), (2, right)])
    assert verdicts == [False, True, False, True]
    assert TASK.grade([]) == []


def test_rows_without_their_columns_are_named():
    row = {key: text for key, text in ROWS[0].items() if key != "test"} | {"prompt": 3}
    with pytest.raises(UserError, match="row 1.*prompt, test"):
        HumanEval([ROWS[0], row])
    with pytest.raises(UserError, match="row 1"):
        HumanEval([ROWS[0], [1]])


def test_the_script_tells_bad_files(tmp_path):
    (tmp_path / "x.jsonl").write_text("[1]\n")
    (tmp_path / "y.jsonl").write_text("{\n")
    for name in ("x.jsonl", "y.jsonl", "none.jsonl"):
        with pytest.raises(UserError):
            script.check(tmp_path / name, None)


def test_the_script_finds_wrong_verdicts(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(map(json.dumps, ROWS)))
    bad.write_text(json.dumps(ROWS[0] | {"canonical_solution": "    return 0\n"}))
    assert (script.check(good, 2), script.check(bad, 2)) == (0, 1)
