"""A chat's history: as much of it as fits into a prompt, and an answer read back into it.

Invariants: a turn (a user message and its answer) is kept whole or not at all; no text is handed
out before its last byte is there, so a character is never shown by halves; what an AnswerReader has
read renders to the tokens' own text.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS, render_for_completion


class PromptTooLong(UserError):
    """A single message leaves no room for an answer."""


def fit_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], max_tokens: int
) -> tuple[list[int], int]:
    """The prompt for the next answer, at most max_tokens ids, and how many old turns it lacks.

    The system message stays. An assistant's message at the end is what is to be answered anew.
    Raises UserError for malformed messages, PromptTooLong when the last turn alone does not fit.
    """
    ids, dropped = render_for_completion(tokenizer, {"messages": list(messages)}), 0
    first = int(messages[0]["role"] == "system")
    while len(ids) > max_tokens:
        if len(messages) - first - 2 * dropped <= 2:
            raise PromptTooLong(
                f"the last message is {len(ids):,} tokens long with all that frames it, expected "
                f"at most {max_tokens:,}; shorten it"
            )
        dropped += 1
        kept = [*messages[:first], *messages[first + 2 * dropped :]]
        ids = render_for_completion(tokenizer, {"messages": kept})
    return ids, dropped


class AnswerReader:
    """Reads an answer as it is sampled: `feed` ids in any portions, `content` is all so far.

    Content consists of the parts of tokenizer/chat.py: text, python, python_output.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._parts: list[dict[str, str]] = []
        self._kind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first_special = min(tokenizer.special.values())
        self._switches = {}  # special id -> the kind of part it leads into
        for kind, (opening, closing, _) in PARTS.items():
            if opening and closing:
                self._switches[tokenizer.special_id(opening)] = kind
                self._switches[tokenizer.special_id(closing)] = "text"

    def feed(self, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
        """(kind, text) pieces of whole characters; ("python", "") and the like where a part begins.

        Other special tokens, and ids the tokenizer does not know, are passed over.
        """
        for token in ids:
            if token in self._switches:
                yield from self.finish()
                self._kind = self._switches[token]
                if self._kind != "text":
                    self._parts.append({"type": self._kind, "text": ""})
                yield self._kind, ""
            elif token < self._first_special:
                yield from self._add(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> Iterator[tuple[str, str]]:
        """What is left at the end of a part: U+FFFD when it stops within a character."""
        yield from self._add(self._decoder.decode(b"", final=True))

    def _add(self, text: str) -> Iterator[tuple[str, str]]:
        if text:
            if not self._parts or self._parts[-1]["type"] != self._kind:
                self._parts.append({"type": self._kind, "text": ""})
            self._parts[-1]["text"] += text
            yield self._kind, text

    @property
    def content(self) -> str | list[dict[str, str]]:
        """Content of an assistant message: the text itself, or parts where a tool was called."""
        if all(part["type"] == "text" for part in self._parts):
            return "".join(part["text"] for part in self._parts)
        return self._parts
