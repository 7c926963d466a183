"""Conversations of your own, one a line of a .jsonl file:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

The rules are those of tokenizer/chat.py, and somebody must answer. The whole file is checked when
it is opened, so no line stops a run hours later. Examples come in the order of the file.
"""

from pathlib import Path

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.sources import read_jsonl
from nanochat_jax.tokenizer.chat import check as check_conversation


class CustomJSON(Task):
    """Raises UserError, with file and line, for what is no conversation."""

    def __init__(self, path: Path | str):
        self.conversations: list[Conversation] = []
        for where, value in read_jsonl(Path(path).expanduser()):
            conversation = {"messages": value} if isinstance(value, list) else value
            try:
                turns = check_conversation(conversation)
            except UserError as error:
                raise UserError(f"{where}: {error}; correct or remove the line") from None
            if len(turns) < 2:
                raise UserError(
                    f"{where}: got no message of the assistant, expected at least one to learn "
                    "from; correct or remove the line"
                )
            self.conversations.append(conversation)
        if not self.conversations:
            raise UserError(
                f"{path}: got no conversation, expected one a line; correct the path or the file"
            )

    def __len__(self) -> int:
        return len(self.conversations)

    def example(self, index: int) -> Conversation:
        return self.conversations[index]
