"""A question with choices, answered by one letter: ARC and MMLU.

    Choose the right answer.

    What do bees make?
    - honey=A
    - silk=B

    Reply with its letter alone.

Small models bind a letter to a choice better when it comes after the choice. Without a space before
it, a letter is the same token as in the answer.
"""

import string
from collections.abc import Sequence
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, RowTask, messages

LETTERS = string.ascii_uppercase


def multiple_choice(
    question: str, choices: Sequence[str], labels: Sequence[Any], right: Any
) -> Conversation:
    """The conversation about a question whose choice with the label `right` is right."""
    if not (2 <= len(choices) == len(labels) <= len(LETTERS) and right in labels):
        raise UserError(
            f"got {len(choices)} choices and the answer {right!r} for {question[:60]!r}, expected "
            f"2 to {len(LETTERS)} and one of {', '.join(map(str, labels))}; correct the row"
        )
    letters = LETTERS[: len(choices)]
    listed = "".join(f"- {text}={letter}\n" for text, letter in zip(choices, letters, strict=True))
    text = f"Choose the right answer.\n\n{question}\n{listed}\nReply with its letter alone."
    return messages(text, letters[labels.index(right)]) | {"letters": tuple(letters)}


class ARC(RowTask):
    """Science questions of school exams, Easy and Challenge (arXiv 1803.05457).

    {"question": ..., "choices": {"text": [...], "label": ["A", "B", "C"]}, "answerKey": "C"}; some
    exams number their choices, here all have letters. A few questions have 3 or 5 choices.
    """

    kind = "categorical"
    chance = 0.25

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices = row["choices"]
        return multiple_choice(row["question"], choices["text"], choices["label"], row["answerKey"])


class MMLU(RowTask):
    """Exam questions of 57 subjects with 4 choices (arXiv 2009.03300); its split auxiliary_train is
    of other exams.

    {"question": ..., "choices": [...], "answer": 2}
    """

    kind = "categorical"
    chance = 0.25

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices = row["choices"]
        return multiple_choice(row["question"], choices, range(len(choices)), row["answer"])
