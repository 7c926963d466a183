"""MMLU, exam questions of 57 subjects with 4 choices each (arXiv 2009.03300).

    {"question": ..., "subject": "anatomy", "choices": [...], "answer": 2}

auxiliary_train, the split to learn from, is made of other datasets' questions: ARC, MC_TEST, OBQA,
RACE.
"""

from collections.abc import Sequence

from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.sources import Row


class MMLU(Task):
    """Its conversations carry the "subject", for accuracies by subject."""

    kind = "categorical"
    chance = 0.25

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        conversation = multiple_choice(row["question"], row["choices"], row["answer"])
        return conversation | {"subject": row["subject"]}
