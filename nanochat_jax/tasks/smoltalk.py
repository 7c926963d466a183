"""SmolTalk, general conversations for small models, made with a large one (arXiv 2502.02737).

    {"messages": [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}, ...]}

Some start with a system message. Malformed rows are found when they are rendered.
"""

from nanochat_jax.tasks.base import Conversation, RowTask


class SmolTalk(RowTask):
    def example(self, index: int) -> Conversation:
        return {"messages": self.rows[index]["messages"]}
