"""HumanEval, Python functions completed from their docstring (arXiv 2107.03374).

  user       the head of a program: imports, signature, docstring
  assistant  all of it; chat models repeat the function, in a fenced block or bare
  verdict    imports, the answer's program, the problem's `check`: run in a sandbox to its last line

Ending the process before `check` is through is no pass; tools/sandbox.py tells what a verdict
cannot hold against.
"""

import re
from collections.abc import Sequence
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tools.sandbox import Limits, run_programs

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
_CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def extract_program(completion: str) -> str:
    """The first fenced code block of an answer, or all of it when no block is closed."""
    block = _CODE_BLOCK.search(completion)
    return (block.group(1) if block else completion).strip()


def extract_imports(prompt: str) -> str:
    """The import lines at the head of a prompt: up to the first line of code, comments skipped."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """What decides on an answer: it runs to its last line if the answer is right."""
    parts = (extract_imports(prompt), extract_program(completion), test, f"check({entry_point})")
    return "\n\n".join(parts) + "\n"


class HumanEval(Task):
    """Problems from rows with the keys in COLUMNS, all of them text."""

    kind = "generative"

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        limits: Limits | None = None,
        workers: int | None = None,
    ):
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"HumanEval: row {number} got {type(row).__name__}, expected an object with "
                    f"{', '.join(COLUMNS)}; get openai/openai_humaneval again"
                )
            if wrong := [key for key in COLUMNS if not isinstance(row.get(key), str)]:
                raise UserError(
                    f"HumanEval: row {number} has no text for {', '.join(wrong)}, expected "
                    f"{', '.join(COLUMNS)}; get openai/openai_humaneval again"
                )
        self.rows = rows
        self.limits = limits
        self.workers = workers

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, "task_id": row["task_id"]}

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        """Whether each answer passes its problem's check; all run in the sandbox, in parallel."""
        sources = []
        for index, answer in answers:
            row = self.rows[index]
            sources.append(program(row["prompt"], answer, row["test"], row["entry_point"]))
        outcomes = run_programs(sources, limits=self.limits, workers=self.workers)
        return [outcome.status == "ok" for outcome in outcomes]
