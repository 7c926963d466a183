"""Conversations of your own, one a line of a .jsonl file:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

They follow the rules of tokenizer/chat.py, and the assistant says something in each. The whole file
is checked when it is opened, so no line stops a run hours later. Examples come in the file's order.
"""

from pathlib import Path
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, RowTask
from nanochat_jax.tasks.sources import read_jsonl
from nanochat_jax.tokenizer.chat import check as check_conversation


class CustomJSON(RowTask):
    """Raises UserError, with file and line, for what is no conversation."""

    def __init__(self, path: Path | str):
        lines = read_jsonl(Path(path).expanduser())
        super().__init__([_conversation(where, value) for where, value in lines])


def _conversation(where: str, value: Any) -> Conversation:
    conversation = {"messages": value} if isinstance(value, list) else value
    try:
        if len(check_conversation(conversation)) < 2:
            raise UserError("got no message of the assistant, expected at least one to learn from")
    except UserError as error:
        raise UserError(f"{where}: {error}; correct or remove the line") from None
    return conversation
