"""Problems in HumanEval's form: who passes, who does not, and what a row becomes."""

import json

from nanochat_jax.tasks.humaneval import HumanEval, extract_imports, extract_program, program

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
        "prompt": 'def greet(name):\n    """A greeting."""\n',
        "canonical_solution": "    return f'hello {name}'\n",
        "test": "def check(candidate):\n    for n in 'ab':\n"
        "        assert candidate(n) == f'hello {n}'\n",
        "entry_point": "greet",
    },
]
TASK = HumanEval(ROWS)
EXTRACT = {"extract_program": extract_program, "extract_imports": extract_imports}


def test_an_example_is_the_prompt_and_the_whole_program():
    question, answer = (message["content"] for message in TASK[0]["messages"])
    assert (question, answer) == (ROWS[0]["prompt"], ROWS[0]["prompt"] + "    return max(n)\n")
    assert [(it["task_id"], it["messages"][0]["role"]) for it in TASK[1:]] == [("Ours/1", "user")]


def test_goldens(goldens):
    golden = json.loads((goldens / "text.json").read_text())
    for key, extract in EXTRACT.items():
        assert [extract(row["text"]) for row in golden[key]] == [row["out"] for row in golden[key]]


def test_the_program_brings_the_prompts_imports():
    answer = "Sure:\n```python\ndef f(x: List[int]):\n    return x\n```\nThat is it."
    parts = ["from typing import List", "def f(x: List[int]):\n    return x", ROWS[0]["test"]]
    assert program(ROWS[0], answer) == "\n\n".join([*parts, "check(largest)\n"])


HEAD = "def greet(name):\n"
VERDICTS = [
    ("```python\ndef greet(name):\n    return 'hello ' + name\n```", True),
    ("```\ngreet = 'hello {}'.format\n```", True),
    (HEAD + "    return 'hello ' + name\nif __name__ == '__main__':\n    input()", True),
    (HEAD + "    return 'hello a'", False),
    (HEAD + "    import sys; sys.exit(0)", False),
    (HEAD + "    import os; os._exit(0)", False),
    ("import sys\nprint('ok')\nsys.exit()", False),
    ("import atexit, os\natexit.register(os._exit, 0)\n" + HEAD + "    return 1", False),
    ("def other(name):\n    return 'hello ' + name", False),
    ("", False),
]


def test_verdicts():
    answers = [(1, answer) for answer, _ in VERDICTS] + [(0, VERDICTS[0][0])]
    verdicts = TASK.grade(answers)
    right = [verdict for _, verdict in VERDICTS] + [False]
    assert list(zip(answers, verdicts, strict=True)) == list(zip(answers, right, strict=True))
    assert TASK.grade([]) == []
