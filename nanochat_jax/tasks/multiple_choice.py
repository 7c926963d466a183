"""A question with choices, answered by one letter: ARC and MMLU.

    Choose the right answer.

    What do bees make?
    - honey=A
    - silk=B

    Reply with its letter alone.

Small models bind a letter to a choice better when it comes after the choice. No space stands before
a letter in the question, as none does in the answer, which is a single token.
"""

import string
from collections.abc import Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, RowTask, messages

LETTERS = string.ascii_uppercase


def multiple_choice(question: str, choices: Sequence[str], answer: int) -> Conversation:
    """The conversation about a question whose choice number `answer` (from 0) is right."""
    if not (2 <= len(choices) <= len(LETTERS) and 0 <= answer < len(choices)):
        raise UserError(
            f"got {len(choices)} choices, number {answer} of them right, for the question "
            f"{question[:60]!r}, expected 2 to {len(LETTERS)} and one of them; correct the row"
        )
    letters = LETTERS[: len(choices)]
    listed = "".join(f"- {text}={letter}\n" for text, letter in zip(choices, letters, strict=True))
    text = f"Choose the right answer.\n\n{question}\n{listed}\nReply with its letter alone."
    return messages(text, letters[answer]) | {"letters": tuple(letters)}


class ARC(RowTask):
    """Science questions of school exams, Easy and Challenge (arXiv 1803.05457).

        {"question": ..., "choices": {"text": [...], "label": ["A", "B", "C"]}, "answerKey": "C"}

    Some exams number their choices 1 to 4; here all have letters. A few questions have 3 or 5
    choices; the accuracy of guessing is that of 4, as upstream has it.
    """

    kind = "categorical"
    chance = 0.25

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices, labels, key = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if key not in labels:
            raise UserError(
                f"got answerKey {key!r} for the ARC question {row['question'][:60]!r}, expected "
                f"one of {', '.join(labels)}; correct the row"
            )
        return multiple_choice(row["question"], choices, labels.index(key))


class MMLU(RowTask):
    """Exam questions of 57 subjects with 4 choices each (arXiv 2009.03300).

        {"question": ..., "choices": [...], "answer": 2}

    auxiliary_train, the split to learn from, is made of other datasets: ARC, MC_TEST, OBQA, RACE.
    """

    kind = "categorical"
    chance = 0.25

    def example(self, index: int) -> Conversation:
        row = self.rows[index]
        return multiple_choice(row["question"], row["choices"], row["answer"])
