"""GSM8K, grade-school word problems whose solutions end in `#### answer` (arXiv 2110.14168).

    {"question": "Weng earns $12 an hour. ...",
     "answer": "She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\\n ... \\n#### 10"}

What stands in << >> is a calculation: it becomes a call of the calculator and its answer.
"""

import re
from collections.abc import Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, RowTask, Task, messages

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A solution as message parts: text, and for each << >> the expression and its result."""
    types = ("text", "python", "python_output")  # in turn: the pattern has two groups
    pieces = enumerate(_CALCULATION.split(solution))
    return [{"type": types[i % 3], "text": piece} for i, piece in pieces if piece or i % 3]


def extract_answer(text: str) -> str | None:
    """The first number after a `#### `, without its thousands commas; None if there is none."""
    found = _ANSWER.search(text)
    return found.group(1).replace(",", "") if found else None


class NumberTask(Task):
    """A task whose examples end in `#### number`; answers with the same number are right."""

    kind = "generative"

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        return [extract_answer(said) == self._number(index) for index, said in answers]

    def _number(self, index: int) -> str:
        parts = self.example(index)["messages"][-1]["content"]
        solution = "".join(part["text"] for part in parts)
        number = extract_answer(solution)
        if number is None:  # would make an answer without number right
            raise UserError(
                f"got the solution {solution[-60:]!r}, expected '#### number'; correct the row"
            )
        return number


class GSM8K(NumberTask, RowTask):
    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        return messages(row["question"], solution_parts(row["answer"]))
