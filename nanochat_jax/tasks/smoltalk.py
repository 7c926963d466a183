"""SmolTalk, general conversations for small models, made with a large one (arXiv 2502.02737).

    {"messages": [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}, ...]}

A leading system message is part of some. Rows are read one at a time, so what is malformed shows
when a conversation is rendered (tokenizer/chat.py).
"""

from collections.abc import Sequence

from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.sources import Row


class SmolTalk(Task):
    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        return {"messages": self.rows[index]["messages"]}
