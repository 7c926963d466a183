"""HumanEval, Python functions completed from their docstring (arXiv 2107.03374).

user       the head of a program: imports, signature, docstring
assistant  all of it; chat models repeat the function, in a fenced block or bare
verdict    imports, the answer's program, the problem's `check`: run in a sandbox to its last line
"""

import re
from collections.abc import Sequence

from nanochat_jax.tasks.base import Conversation, RowTask, messages
from nanochat_jax.tools.sandbox import run_programs

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


def program(row: dict[str, str], answer: str) -> str:
    """What decides on an answer: it runs to its last line if the answer is right."""
    imports, check = extract_imports(row["prompt"]), f"check({row['entry_point']})\n"
    return "\n\n".join((imports, extract_program(answer), row["test"], check))


class HumanEval(RowTask):
    """Problems from rows like that of SOURCES["humaneval"]."""

    kind = "generative"

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        solution = row["prompt"] + row["canonical_solution"]
        return messages(row["prompt"], solution) | {"task_id": row["task_id"]}

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        """Whether each answer passes its problem's check; all run in the sandbox, in parallel."""
        programs = [program(self.rows[index], answer) for index, answer in answers]
        return [outcome.status == "ok" for outcome in run_programs(programs)]
