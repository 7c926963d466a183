"""Which request writes in which slot, and how each text goes on. No device here.

  submit -> queue -> admit -> slots -> advance -> pieces of answers

When a text ends, the next request takes its slot while the others write on (continuous batching, as
in Orca, OSDI 2022). A text that calls a tool stands still until the tool has answered; the others
write on. Requests are told apart by their ids alone: what goes wrong in one text ends that text.

The same calls make the same schedule, if the tools are waited for, so several processes that see
the same requests stay in step.
"""

from collections import deque
from collections.abc import Container, Hashable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from nanochat_jax.common import UserError
from nanochat_jax.inference.request import Completion, Request, Tool, Top

SHORTEST_REUSE = 16  # tokens of a prompt's beginning that are worth looking for in a used slot
TOOL_THREADS = 8


@dataclass
class Text:
    """A request on its way."""

    id: int
    request: Request
    ids: list[int]  # prompt and answer so far
    tool: Tool | None
    cached: int = 0  # how many of them lie in the slot's cache
    scores: list[tuple[float, Top]] = field(default_factory=list)  # of the prompt
    forced: list[int] = field(default_factory=list)  # what the tool still has to say
    call: list[int] | None = None  # what was said since the tool's start_id
    running: Future | None = None  # the tool, while it is

    @property
    def scored(self) -> bool:
        return self.request.prompt_logprobs

    @cached_property
    def prompt_key(self) -> Hashable:
        """Equal for texts whose prompts need be computed only once."""
        return tuple(self.request.prompt), self.scored, self.request.top_logprobs * self.scored

    @property
    def ready(self) -> bool:
        """All but the last id is in the cache: it can write."""
        return self.cached == len(self.ids) - 1 and self.running is None


class Scheduler:
    """The texts in `slots` slots and the requests that wait for one.

    tools: by name; tool: the one of requests that name none. window: the positions that every
    layer of the cache keeps.
    """

    def __init__(
        self,
        slots: int,
        max_len: int,
        vocab_size: int,
        stop_ids: Container[int],
        tools: Mapping[str, Tool] | None = None,
        tool: str = "none",
        window: int = 0,
    ):
        self.slots, self.max_len, self.vocab_size = slots, max_len, vocab_size
        self.stop_ids, self.window = stop_ids, window
        self.tools, self.tool = dict(tools or {}), tool
        self.texts: dict[int, Text] = {}  # by slot
        self.ended: list[Completion] = []  # for the next step to tell
        self.left_behind: dict[int, list[int]] = {}  # ids in a free slot's cache; the latest last
        self._waiting: deque[Text] = deque()
        self._last_id = 0
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, request: Request) -> int:
        """Queue a request; the id of its pieces. UserError for a bad prompt, bias or tool."""
        ids = list(request.prompt)
        self._check([*ids, *request.logit_bias])
        # Where nothing is to be written, the prompt may fill the context.
        if not 0 < len(ids) < self.max_len + (request.max_new_tokens == 0):
            raise UserError(
                f"got a prompt of {len(ids)} tokens, expected 1 to {self.max_len - 1}; shorten it"
            )
        name = self.tool if request.tool is None else request.tool
        if name not in ("none", *self.tools):
            raise UserError(f"got tool {name!r}, expected one of none, {', '.join(self.tools)}")
        self._last_id += 1
        self._waiting.append(Text(self._last_id, request, ids, self.tools.get(name)))
        return self._last_id

    def _check(self, ids: Iterable[int]) -> None:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                expected = f"0..{self.vocab_size - 1}; use the model's tokenizer"
                raise UserError(f"got id {id}, expected {expected}")

    def cancel(self, id: int) -> None:
        """End a request; the next step says so. One that has ended is left alone."""
        if any(text.id == id for text in (*self._waiting, *self.texts.values())):
            self.drop([id])
            self.ended.append(Completion(finish="cancelled", id=id))

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these requests, without telling."""
        gone = set(ids)
        self.ended = [piece for piece in self.ended if piece.id not in gone]
        self._waiting = deque(text for text in self._waiting if text.id not in gone)
        for slot, text in list(self.texts.items()):
            if text.id in gone:
                self._leave(slot)

    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.ended or self._waiting or self.texts)

    def admit(self) -> None:
        """Give waiting requests the free slots, in the order they came: of these the one that holds
        the longest beginning of the prompt, then the one that was left first."""
        used = {*self.texts, *self.left_behind}
        free = [slot for slot in range(self.slots) if slot not in used] + list(self.left_behind)
        while free and self._waiting:
            text = self._waiting.popleft()
            reusable = [self._reusable(text, slot) for slot in free]
            text.cached = max(reusable)
            slot = free.pop(reusable.index(text.cached))
            self.left_behind.pop(slot, None)
            self.texts[slot] = text

    def _reusable(self, text: Text, slot: int) -> int:
        """How many ids of the prompt need not be computed in this slot."""
        held, wanted = self.left_behind.get(slot, []), text.ids[:-1]
        if len(held) < SHORTEST_REUSE or text.scored:
            return 0
        pairs = zip(held, wanted, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(wanted)))
        # A ring that was written beyond these has lost what lies before them.
        kept = same == len(held) or len(held) <= self.window
        return same if kept and same >= SHORTEST_REUSE else 0

    def hear(self, waited: bool) -> None:
        """Take in what the tools have answered; waited: what all of them answer."""
        calling = {slot: text.running for slot, text in self.texts.items() if text.running}
        if waited:
            wait(calling.values())
        elif len(calling) == len(self.texts):  # nobody else has anything to do
            wait(calling.values(), 0.02, return_when=FIRST_COMPLETED)
        for slot, answer in calling.items():
            if answer.done() and (error := answer.exception()):
                self.fail(slot, f"the tool failed: {error!r}")
            elif answer.done():
                text = self.texts[slot]
                text.forced, text.running = answer.result(), None

    def fail(self, slot: int, reason: str) -> None:
        """End the text in a slot for a reason; the others know nothing of it."""
        text = self._leave(slot)
        self.left_behind[slot] = []  # nobody knows how far it was written
        self.ended.append(Completion(finish="error", id=text.id, reason=reason))

    def finish_scored(self) -> None:
        """End the texts that were only to be scored, and are."""
        for slot, text in list(self.texts.items()):
            if text.ready and text.request.max_new_tokens == 0:
                self._leave(slot)
                piece = Completion(finish="length", id=text.id, prompt=text.scores)
                self.ended.append(piece)

    def left(self, text: Text) -> int:
        """Tokens the text may still get."""
        all_ids = len(text.request.prompt) + text.request.max_new_tokens
        return min(all_ids, self.max_len) - len(text.ids)

    def advance(
        self, slot: int, tokens: list[int], logprobs: list[float], top: list[Top] | None = None
    ) -> Completion:
        """Take in what was written in a slot; the piece of the answer that it is."""
        text = self.texts[slot]
        is_first = len(text.ids) == len(text.request.prompt)
        piece = self._extend(text, tokens, logprobs)
        piece.top = top or []
        piece.prompt = text.scores if is_first and text.scored else None
        if piece.finish:
            self._leave(slot)
        return piece

    def _extend(self, text: Text, tokens: list[int], logprobs: list[float]) -> Completion:
        """Look for the text's end; start the tool if it was called."""
        num_forced, finish = min(len(text.forced), len(tokens)), ""
        text.ids += tokens
        text.cached = len(text.ids) - 1
        text.forced = text.forced[num_forced:]
        said = tokens[num_forced:]  # what the tool says ends no text and calls no tool
        if said and said[-1] in self.stop_ids:
            finish = "stop"
        elif not self.left(text):
            answer = len(text.ids) - len(text.request.prompt)
            finish = "length" if answer == text.request.max_new_tokens else "context"
        elif text.tool:
            for token in said:
                if token == text.tool.start_id:
                    text.call = []
                elif text.call is not None:
                    text.call.append(token)
            if said and said[-1] == text.tool.end_id and text.call is not None:
                self._threads = self._threads or ThreadPoolExecutor(TOOL_THREADS, "tool")
                text.running = self._threads.submit(self._call, text.tool, text.call[:-1])
                text.call = None
        sampled = [False] * num_forced + [True] * len(said)
        logprobs = [0.0] * num_forced + logprobs[num_forced:]
        return Completion(tokens, logprobs, sampled, finish, text.id)

    def _call(self, tool: Tool, ids: list[int]) -> list[int]:
        """What the tool says, as far as a text can hold it. In a thread of its own."""
        said = list(islice(tool.run(ids), self.max_len))
        self._check(said)
        return said

    def _leave(self, slot: int) -> Text:
        text = self.texts.pop(slot)
        if text.running:
            text.running.cancel()  # if it has not begun
        self.left_behind[slot] = text.ids[: text.cached]
        return text
