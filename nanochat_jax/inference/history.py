"""A chat's history: as much of it as fits into a prompt, and answers read back into it.

Invariants: a turn (a user message and its answer) is kept whole or not at all; a character is never
shown by halves; what an AnswerReader has read renders to the tokens' own text.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS, check, render_for_completion


class PromptTooLong(UserError):
    """A single message leaves no room for an answer."""


def fit_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], max_tokens: int
) -> tuple[list[int], int]:
    """The prompt for the next answer, at most max_tokens ids, and how many old turns it lacks.

    The system message stays. A last message of the assistant is answered anew. UserError for
    malformed messages, PromptTooLong when the last turn alone does not fit.
    """
    check({"messages": list(messages)})
    first, ids = int(messages[0]["role"] == "system"), []
    for old in range(first, len(messages), 2):
        kept = [*messages[:first], *messages[old:]]
        ids = render_for_completion(tokenizer, {"messages": kept})
        if len(ids) <= max_tokens:
            return ids, (old - first) // 2
    raise PromptTooLong(
        f"the last message is {len(ids):,} tokens long with all that frames it, expected at most "
        f"{max_tokens:,}; shorten it"
    )


class AnswerReader:
    """Reads an answer as it is sampled: `feed` ids in any portions, `content` is all so far."""

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
        only_text = all(part["type"] == "text" for part in self._parts)
        return "".join(part["text"] for part in self._parts) if only_text else self._parts
