"""From pieces of tokens to what clients read: text, tool calls, log probabilities, usage.

Invariants: a character is never sent by halves, and nothing of a stop string ever; what is sent
does not depend on how the engine cuts an answer into pieces; the pieces joined are the answer.
"""

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

from nanochat_jax.inference.history import AnswerReader
from nanochat_jax.inference.request import Completion, Top
from nanochat_jax.tokenizer.bpe import Tokenizer

# The engine's words for how a text ended, and OpenAI's. What is missing here is an error.
FINISH = {"stop": "stop", "length": "length", "context": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity; the number OpenAI writes


class Score(NamedTuple):
    """What is known of one token."""

    id: int
    logprob: float | None  # None: the first token of a text
    top: Sequence[tuple[int, float]]  # the likeliest ids, if asked for
    start: int  # where its text begins in the answer, in characters


class Delta(NamedTuple):
    """What a client has not seen yet."""

    text: str
    parts: list[dict[str, Any]]  # the same and the tool's, in order
    scores: list[Score]
    finish: str  # how the answer ended, in the engine's words; "" while it goes on


@dataclass
class Answer:
    """Reads one answer. chat: the tool's parts are no text; else all that is written is. scored:
    with what is known of the tokens."""

    tokenizer: Tokenizer
    stops: Sequence[str] = ()
    _: KW_ONLY
    chat: bool = True
    scored: bool = False
    finish: str = ""
    num_tokens: int = 0
    num_chars: int = 0  # of text that was read
    num_sent: int = 0
    offset: int = 0  # characters of an echoed prompt before it
    _held: str = ""  # may be the beginning of a stop string
    _kind: str = "text"
    _parts: list[dict[str, Any]] = field(default_factory=list)
    _index: int = -1  # of the part that goes on, and its type
    _type: str = ""
    _scores: list[Score] = field(default_factory=list)

    def __post_init__(self):
        self._reader = AnswerReader(self.tokenizer)
        self._first_special = min(self.tokenizer.special.values())

    def feed(self, piece: Completion) -> Delta:
        """What a piece adds, up to the first stop string: then `finish` is "stop"."""
        assert not self.finish, "the answer has ended"
        sent = self.num_sent
        tops = piece.top or [()] * len(piece.tokens)
        for id, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True):
            start, self.num_tokens = self.num_chars, self.num_tokens + 1
            for kind, text in self._reader.feed([id]):
                self._take(kind, text)
            shown = not self.chat or (self._kind == "text" and id < self._first_special)
            if self.scored and shown:
                self._scores.append(Score(id, logprob, top, start))
            if self.finish:
                break
        if not self.finish and piece.finish:
            for kind, text in self._reader.finish():
                self._take(kind, text)
            if not self.finish:
                self.finish = piece.finish
                self._send(self._held)
        parts, self._parts = self._parts, []
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        assert len(text) == self.num_sent - sent, (text, self.num_sent, sent)
        return Delta(text, parts, self._scores_sent(), self.finish)

    def _take(self, kind: str, text: str) -> None:
        kind = kind if self.chat else "text"
        if self.finish:
            return
        if kind != "text":
            self._send(self._held)  # a stop string does not go on behind a call
            self._add(kind, text)
        self._kind = kind
        if kind == "text":
            self._held += text
            self.num_chars += len(text)
            self._look_for_stops()

    def _look_for_stops(self) -> None:
        ends = [
            (place + len(stop), place)
            for stop in self.stops
            if (place := self._held.find(stop)) >= 0
        ]
        if ends:
            self._send(self._held[: min(ends)[1]])
            self._held, self.finish = "", "stop"
            return
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for begin in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[begin:]) for stop in self.stops):
                self._send(self._held[:begin])
                return
        self._send(self._held)

    def _send(self, text: str) -> None:
        if text:
            self._add("text", text)
            self._held, self.num_sent = self._held[len(text) :], self.num_sent + len(text)

    def _add(self, kind: str, text: str) -> None:
        """`index` counts the answer's parts: by it OpenAI's client joins what comes in pieces."""
        new = {}
        if not text or kind != self._type:
            self._index, self._type = self._index + 1, kind
            new = {"new": True} if kind != "text" else {}
        add_part(self._parts, {"type": kind, "text": text, "index": self._index} | new)

    def _scores_sent(self) -> list[Score]:
        """Those of the tokens whose text is out; after the end no others follow."""
        num = len(self._scores)
        while num and not self.finish and self._scores[num - 1].start >= self.num_sent:
            num -= 1
        scores, self._scores = self._scores[:num], self._scores[num:]
        if self.num_chars > self.num_sent and self.finish:  # a stop string was cut off
            scores = [score for score in scores if score.start < self.num_sent]
        return [score._replace(start=score.start + self.offset) for score in scores]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """The text of a token alone; "bytes:\\xe2\\x80" when it is a part of a character."""
    if id >= tokenizer.vocab_size:
        return f"<|unused {id}|>"  # a vocabulary can be rounded up
    raw = tokenizer.decode_bytes([id])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _logprob(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST_LOGPROB)


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[Score]) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.decode_bytes([id]) if id < tokenizer.vocab_size else b""
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": _logprob(logprob), "bytes": list(raw)}

    content = [
        entry(s.id, s.logprob) | {"top_logprobs": [entry(*pair) for pair in s.top]} for s in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, scores: Sequence[Score]) -> dict[str, Any]:
    """The older form, of /v1/completions: the token itself is always among the likeliest."""
    tops = [
        None
        if s.logprob is None
        else {token_text(tokenizer, id): _logprob(p) for id, p in (*s.top, (s.id, s.logprob))}
        for s in scores
    ]
    return {
        "tokens": [token_text(tokenizer, s.id) for s in scores],
        "token_logprobs": [_logprob(s.logprob) for s in scores],
        "top_logprobs": tops,
        "text_offset": [s.start for s in scores],
    }


def echo(
    tokenizer: Tokenizer, ids: Sequence[int], added: int, scored: Sequence[tuple[float, Top]] | None
) -> tuple[str, list[Score]]:
    """The text of a prompt and, from the engine's scores of all ids but the first, those of the
    ids but the first `added`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    first_special, texts, scores, start = min(tokenizer.special.values()), [], [], 0
    for place, id in enumerate(ids):
        if scored is not None and place >= added:
            logprob, top = scored[place - 1] if place else (None, ())
            scores.append(Score(id, logprob, top, start))
        if id < first_special:
            texts.append(decoder.decode(tokenizer.decode_bytes([id])))
            start += len(texts[-1])
    return "".join(texts) + decoder.decode(b"", final=True), scores


def add_part(parts: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Append a piece of a part, or join it to the last one if that is the same part."""
    if parts and parts[-1]["index"] == part["index"]:
        parts[-1]["text"] += part["text"]
    else:
        parts.append(part)


def usage(num_prompt: int, answers: Sequence[Answer]) -> dict[str, int]:
    written = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": written,
        "total_tokens": num_prompt + written,
    }


class Envelope:
    """What is the same in all chunks of an answer, and how a choice is put into it."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, chat: bool, logprobs: bool):
        self.tokenizer, self.chat, self.logprobs = tokenizer, chat, logprobs
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model

    def wrap(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more

    def choice(self, index: int, delta: Delta, *, chunk: bool, first: bool) -> dict[str, Any]:
        """A choice of a chunk, or a whole one."""
        finish = FINISH[delta.finish] if delta.finish else None
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish}
        if delta.finish == "context":
            choice["finish_detail"] = "context"  # an extension: the context is full
        if self.logprobs and (delta.scores or not chunk):
            scored = chat_logprobs if self.chat else text_logprobs
            choice["logprobs"] = scored(self.tokenizer, delta.scores)
        if not self.chat:
            return choice | {"text": delta.text}
        said: dict[str, Any] = {"role": "assistant"} if first else {}
        if delta.text or first:
            said["content"] = delta.text
        if delta.parts:
            said["parts"] = delta.parts  # an extension: the tool's parts too
        return choice | {"delta" if chunk else "message": said}
