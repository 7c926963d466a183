"""Conversations of your own, one a line of a .jsonl file:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

They follow the rules of tokenizer/chat.py, and the assistant says something in each. The whole file
is checked when it is opened, so no line stops a run hours later. Examples come in the file's order.
"""

import json
from pathlib import Path

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, RowTask
from nanochat_jax.tokenizer.chat import check as check_conversation


class CustomJSON(RowTask):
    """Raises UserError, with file and line, for what is no conversation."""

    def __init__(self, path: Path | str):
        try:
            lines = Path(path).expanduser().read_bytes().splitlines()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), expected a .jsonl file; correct the "
                "path"
            ) from None
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        super().__init__([_parse(line, f"{path}:{number}") for number, line in numbered])
        if not self.rows:
            raise UserError(
                f"{path}: got no conversation, expected one a line; correct the path or the file"
            )

    def example(self, index: int) -> Conversation:
        return self.rows[index]


def _parse(line: bytes, where: str) -> Conversation:
    try:
        value = json.loads(line)
        conversation = {"messages": value} if isinstance(value, list) else value
        if len(check_conversation(conversation)) < 2:
            raise UserError("got no message of the assistant, expected at least one to learn from")
    except UserError as error:
        raise UserError(f"{where}: {error}; correct or remove the line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}), expected one conversation; correct or remove the line"
        ) from None
    return conversation
