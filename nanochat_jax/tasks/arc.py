"""ARC, science questions of school exams, Easy and Challenge (arXiv 1803.05457).

    {"question": ..., "choices": {"text": [...], "label": ["A", "B", "C"]}, "answerKey": "C"}

Some exams number their choices 1 to 4; here all have letters. A few questions have 3 or 5 choices,
the accuracy of guessing is that of 4, as upstream has it.
"""

from collections.abc import Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.sources import Row


class ARC(Task):
    kind = "categorical"
    chance = 0.25

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices, labels, key = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if key not in labels:
            raise UserError(
                f"got answerKey {key!r} for the ARC question {row['question'][:60]!r}, expected "
                f"one of {', '.join(labels)}; correct the row"
            )
        return multiple_choice(row["question"], choices, labels.index(key))
