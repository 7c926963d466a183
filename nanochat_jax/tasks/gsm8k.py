"""GSM8K, grade-school word problems whose solutions end in `#### answer` (arXiv 2110.14168).

    {"question": "Weng earns $12 an hour. ...",
     "answer": "She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\\n ... \\n#### 10"}

What stands in << >> is a calculation: it becomes a call of the calculator and its answer.
"""

import re
from collections.abc import Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.sources import Row

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


class GSM8K(Task):
    """A right answer ends in the same number, to the letter."""

    kind = "generative"

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": solution_parts(row["answer"])},
            ]
        }

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        return [extract_answer(said) == self._reference(index) for index, said in answers]

    def _reference(self, index: int) -> str:
        solution = self.rows[index]["answer"]
        answer = extract_answer(solution)
        if answer is None:  # would make an answer without number right
            raise UserError(
                f"got the GSM8K solution {solution[-60:]!r}, expected it to end in '#### number'; "
                "correct the row"
            )
        return answer


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A solution as message parts: text, and for each << >> the expression and its result."""
    # Splitting by a pattern with two groups: text, expression, result, text, ...
    types = ("text", "python", "python_output")
    pieces = enumerate(_CALCULATION.split(solution))
    return [{"type": types[i % 3], "text": piece} for i, piece in pieces if piece or i % 3]


def extract_answer(text: str) -> str | None:
    """The first number after a `#### `, without its thousands commas; None if there is none."""
    found = _ANSWER.search(text)
    return found.group(1).replace(",", "") if found else None
