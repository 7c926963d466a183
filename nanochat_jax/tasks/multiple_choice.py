"""A question with choices, answered by one letter.

    Choose the right answer.

    What do bees make?
    - honey=A
    - silk=B

    Reply with its letter alone.

Small models bind a letter to a choice better when it comes after the choice, and no space stands
before a letter in the question as none does in the answer, which is a single token.
"""

import string
from collections.abc import Sequence

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation

LETTERS = string.ascii_uppercase


def multiple_choice(question: str, choices: Sequence[str], answer: int) -> Conversation:
    """The conversation about a question whose choice number `answer` (from 0) is right."""
    if not (2 <= len(choices) <= len(LETTERS) and 0 <= answer < len(choices)):
        raise UserError(
            f"got {len(choices)} choices, number {answer} of them right, for the question "
            f"{question[:60]!r}, expected 2 to {len(LETTERS)} and one of them; correct the row"
        )
    letters = LETTERS[: len(choices)]
    listed = "".join(
        f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True)
    )
    text = f"Choose the right answer.\n\n{question}\n{listed}\nReply with its letter alone."
    return {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": letters[answer]},
        ],
        "letters": tuple(letters),
    }
