"""Which request writes in which slot, and how each text goes on. No device here.

  submit -> queue -> admit -> slots -> advance -> pieces of answers

When a text ends, the next request takes its slot while the others write on (continuous batching, as
in Orca, OSDI 2022). The same calls make the same schedule, so several processes that see the same
requests stay in step.
"""

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_jax.common import UserError


@dataclass(frozen=True)
class Request:
    """What to continue, how far and how. UserError when a setting is out of range."""

    prompt: Sequence[int]  # ids, not empty
    max_new_tokens: int
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        least = {"max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, value in least.items():
            if not value <= (got := getattr(self, name)) < math.inf:
                raise UserError(f"{name} got {got}, expected {value} or more; change it")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p got {self.top_p}, expected above 0, at most 1 (all); change it")


@dataclass
class Completion:
    """What a request got: a piece of it in one step, or all of it."""

    tokens: list[int] = field(default_factory=list)  # with the stop token, if it ended by one
    logprobs: list[float] = field(default_factory=list)  # untempered; 0 for forced tokens
    sampled: list[bool] = field(default_factory=list)  # False: forced by the tool
    finish: str = ""  # "stop", "length" (max_new_tokens), "context" (cache full), "cancelled"
    id: int = 0  # of the request

    def add(self, piece: "Completion") -> None:
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.sampled += piece.sampled
        self.finish = piece.finish


class Tool(NamedTuple):
    """`run` gets the ids between start_id and end_id; what it returns is forced next."""

    start_id: int
    end_id: int
    run: Callable[[list[int]], list[int]]


@dataclass
class Text:
    """A request on its way."""

    id: int
    request: Request
    ids: list[int]  # prompt and answer so far
    forced: list[int] = field(default_factory=list)  # what the tool still has to say
    call: list[int] | None = None  # what was said since the tool's start_id


class Scheduler:
    """The texts in `slots` slots and the requests that wait for one."""

    def __init__(
        self, slots: int, max_len: int, vocab_size: int, stop_ids: Container[int], tool: Tool | None
    ):
        self.slots, self.max_len, self.vocab_size = slots, max_len, vocab_size
        self.stop_ids, self.tool = stop_ids, tool
        self.texts: dict[int, Text] = {}  # by slot
        self.cancelled: list[Completion] = []  # for the next step to tell
        self._waiting: deque[Text] = deque()
        self._last_id = 0

    def submit(self, request: Request) -> int:
        """Queue a request; the id of its pieces. UserError for a bad prompt."""
        ids = list(request.prompt)
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"got id {wrong[0]}, expected 0..{self.vocab_size - 1}; use the model's tokenizer"
            )
        if not 0 < len(ids) < self.max_len:
            raise UserError(
                f"got a prompt of {len(ids)} tokens, expected 1 to {self.max_len - 1}; shorten it"
            )
        self._last_id += 1
        self._waiting.append(Text(self._last_id, request, ids))
        return self._last_id

    def cancel(self, id: int) -> None:
        """End a request; the next step says so. One that has ended is left alone."""
        if any(text.id == id for text in (*self._waiting, *self.texts.values())):
            self.drop([id])
            self.cancelled.append(Completion(finish="cancelled", id=id))

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these requests, without telling."""
        gone = set(ids)
        self.cancelled = [piece for piece in self.cancelled if piece.id not in gone]
        self._waiting = deque(text for text in self._waiting if text.id not in gone)
        self.texts = {slot: text for slot, text in self.texts.items() if text.id not in gone}

    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.cancelled or self._waiting or self.texts)

    def admit(self) -> dict[int, Text]:
        """Give waiting requests the free slots, in the order they came: {slot: text}."""
        free = [slot for slot in range(self.slots) if slot not in self.texts]
        admitted = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
        self.texts |= admitted
        return admitted

    def left(self, text: Text) -> int:
        """Tokens the text may still get."""
        all_ids = len(text.request.prompt) + text.request.max_new_tokens
        return min(all_ids, self.max_len) - len(text.ids)

    def advance(self, tokens, logprobs, count) -> list[Completion]:
        """Take in what was written: arrays [slots, steps], of which count [slots] are a text's."""
        pieces = []
        for slot, text in sorted(self.texts.items()):
            new = slice(count[slot])
            piece = self._extend(text, tokens[slot, new].tolist(), logprobs[slot, new].tolist())
            if piece.finish:
                del self.texts[slot]
            pieces.append(piece)
        return pieces

    def _extend(self, text: Text, tokens: list[int], logprobs: list[float]) -> Completion:
        """Look for the text's end; run the tool if it was called."""
        num_forced, finish = min(len(text.forced), len(tokens)), ""
        text.ids += tokens
        text.forced = text.forced[num_forced:]
        said = tokens[num_forced:]  # what the tool says ends no text and calls no tool
        if said and said[-1] in self.stop_ids:
            finish = "stop"
        elif not self.left(text):
            answer = len(text.ids) - len(text.request.prompt)
            finish = "length" if answer == text.request.max_new_tokens else "context"
        elif self.tool:
            for token in said:
                if token == self.tool.start_id:
                    text.call = []
                elif text.call is not None:
                    text.call.append(token)
            if said and said[-1] == self.tool.end_id and text.call is not None:
                text.forced, text.call = list(self.tool.run(text.call[:-1])), None
        sampled = [False] * num_forced + [True] * len(said)
        return Completion(tokens, logprobs, sampled, finish, text.id)
