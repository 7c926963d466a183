"""The engine: writes many texts at once, each as if it were alone.

  requests -> queue -> slots of the cache -> bursts of decoding -> events

A slot holds one text; when it ends the next request takes the slot, while the others write on
(continuous batching, as in Orca, OSDI 2022). The device decodes in bursts of several tokens, the
host looks in between: it hands out what was written, runs the tool for rows that called it, fills
free slots. Everything about a row but its cache lives on the host, so a burst takes and gives a few
small arrays, and several processes that see the same requests run the same schedule.

Invariants: an answer is a function of (params, prompt, seed, settings), up to rounding: not of
slots, burst, order or company. Prompts alike that are admitted together are computed once. Few
programs are compiled: lengths are powers of two, numbers of prompts a few sizes.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.inference import decode
from nanochat_jax.inference.sampling import Plan, Settings
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.kv_cache import capacity, empty_cache, insert, resize
from nanochat_jax.model.sharding import num_row_shards, param_shardings

PREFILL_ROWS = (16, 4, 1)  # prompts computed at once
MIN_PREFILL, MIN_CACHE = 32, 128  # lengths are powers of two from these up
MIN_CANDIDATES = 64  # of top-k


@dataclass(frozen=True)
class Request:
    """What to continue, how far and how.

    The same prompt, seed and settings give the same answer, whatever else is in the batch.
    """

    prompt: Sequence[int]  # ids, not empty
    max_new_tokens: int
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Completion:
    tokens: list[int] = field(default_factory=list)  # with the stop token, if it ended by one
    logprobs: list[float] = field(default_factory=list)  # untempered; 0 for forced tokens
    sampled: list[bool] = field(default_factory=list)  # False: forced by the tool
    finish: str = ""  # "stop", "length" (max_new_tokens), "context" (cache full), "cancelled"


class Event(NamedTuple):
    """What a request got in one step."""

    id: int
    tokens: list[int]
    logprobs: list[float]
    sampled: list[bool]
    finish: str | None  # None: there is more to come


class Tool(NamedTuple):
    """When the model says end_id after start_id, `run` gets the ids between them.

    The ids it returns are forced next; none: the model goes on by itself.
    """

    start_id: int
    end_id: int
    run: Callable[[list[int]], list[int]]


@dataclass
class _Row:
    """A request in a slot."""

    id: int
    request: Request
    ids: list[int]  # prompt and answer
    num_new: int = 0
    forced: list[int] = field(default_factory=list)  # what the tool still has to say
    call: list[int] | None = None  # what was said since start_id


class Engine:
    """Texts of at most `max_len` tokens, `slots` of them at once (rounded up to the mesh's rows).

    stop_ids end a text. burst: tokens between two looks of the host. Not for several threads.
    """

    def __init__(
        self,
        config: GPTConfig,
        mesh: Mesh,
        *,
        slots: int,
        max_len: int,
        stop_ids: Collection[int],
        tool: Tool | None = None,
        burst: int = 16,
    ):
        assert slots > 0 and max_len > 1 and burst > 0, (slots, max_len, burst)
        self.config, self.mesh, self.tool = config, mesh, tool
        self.max_len, self.stop_ids = max_len, frozenset(stop_ids)
        kept = (capacity(config, layer, max_len) for layer in range(config.num_layers))
        self.burst = min(burst, *kept)  # a ring must not lap itself
        shards = num_row_shards(mesh)
        self.slots = _round_up(slots, shards)
        self._sizes = sorted({_round_up(n, shards) for n in PREFILL_ROWS}, reverse=True)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row | None] = [None] * self.slots
        self._cancelled: list[Event] = []
        self._next_id = 0
        self._params: dict[str, Array] | None = None
        self._shardings = param_shardings(mesh, param_shapes(config))
        self.length = min(MIN_CACHE, max_len)  # of the cache
        with jax.set_mesh(mesh):
            self._cache = empty_cache(config, self.slots, self.length)
        self._pause_ids = tuple(sorted(self.stop_ids | ({tool.end_id} if tool else set())))

    def load(self, params: dict[str, Array]) -> None:
        """Write with these parameters from now on.

        Where neither dtype nor place changes they are not copied: a training step that consumes
        (donates) them must be followed by another load.
        """
        placed = jax.device_put(params, self._shardings)
        dtype = jnp.dtype(self.config.compute_dtype)
        self._params = {path: value.astype(dtype) for path, value in placed.items()}

    def unload(self) -> None:
        """Let go of the parameters, whose memory a training step may need."""
        self._params = None

    def generate(
        self,
        requests: Sequence[Request],
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answers in the order of the requests; any number of them. on_finish gets each at once."""
        assert not self.busy(), "generate needs the engine for itself"
        for request in requests:
            self._check(request)
        numbers = {self.submit(request): number for number, request in enumerate(requests)}
        answers = [Completion() for _ in requests]
        self._shrink()
        try:
            while self.busy():
                for event in self._step(self.burst):
                    number = numbers[event.id]
                    _extend(answers[number], event)
                    if event.finish and on_finish:
                        on_finish(number, answers[number])
        finally:
            self._drop(numbers)  # an error: the engine is as good as before
        return answers

    def stream(self, request: Request) -> Iterator[Event]:
        """One request, an event for each burst; whoever stops reading cancels it."""
        assert not self.busy(), "stream needs the engine for itself"
        id = self.submit(request)
        try:
            while self.busy():
                yield from self.step()
        finally:
            self._drop([id])

    def submit(self, request: Request) -> int:
        """Put a request into the queue; its id in the events to come. Raises UserError."""
        self._check(request)
        self._next_id += 1
        self._waiting.append(_Row(self._next_id, request, list(request.prompt)))
        return self._next_id

    def cancel(self, id: int) -> None:
        """End a request; the next step says so. One that has ended is left alone."""
        if self._drop([id]):
            self._cancelled.append(Event(id, [], [], [], "cancelled"))

    def step(self) -> list[Event]:
        """Fill free slots, decode one burst. After an admission it is short: a first token soon."""
        return self._step(1)

    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._cancelled or self._waiting or any(self._rows))

    def _step(self, first_steps: int) -> list[Event]:
        assert self._params is not None, "load parameters first"
        events, self._cancelled = self._cancelled, []
        with jax.set_mesh(self.mesh):
            new = self._take_slots()
            if any(self._rows):
                steps = first_steps if new else self.burst
                self._make_room(steps)
                self._admit(new)
                events += self._decode(steps)
        return events

    def _drop(self, ids: Iterable[int]) -> bool:
        """Forget these requests; whether one was there."""
        ids, before = set(ids), len(self._waiting)
        self._cancelled = [event for event in self._cancelled if event.id not in ids]
        self._waiting = deque(row for row in self._waiting if row.id not in ids)
        found = len(self._waiting) < before
        for slot, row in enumerate(self._rows):
            if row and row.id in ids:
                self._rows[slot], found = None, True
        return found

    # Prefill

    def _take_slots(self) -> dict[int, _Row]:
        """Give waiting requests the free slots."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        taken = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
        for slot, row in taken.items():
            self._rows[slot] = row
        return taken

    def _make_room(self, steps: int) -> None:
        """Resize the cache for the longest text after this burst; down only to a quarter."""
        longest = max(len(row.ids) + self._budget(row, steps) for row in self._rows if row)
        length = min(_power_of_two(longest, MIN_CACHE), self.max_len)
        if length > self.length or length <= self.length // 4:
            self._cache, self.length = resize(self.config, length, self._cache), length

    def _shrink(self) -> None:
        """An idle engine starts as a new one would: what it did before leaves no trace."""
        least = min(MIN_CACHE, self.max_len)
        if self.length != least:
            with jax.set_mesh(self.mesh):
                self._cache, self.length = resize(self.config, least, self._cache), least

    def _admit(self, rows: dict[int, _Row]) -> None:
        """Compute the prompts of these rows, each different one once, into their slots."""
        same: dict[tuple[int, ...], list[int]] = {}  # prompt without its last id -> slots
        for slot, row in rows.items():
            same.setdefault(tuple(row.ids[:-1]), []).append(slot)
        by_width: dict[int, list[tuple[int, ...]]] = {}
        for prompt in same:
            if prompt:  # a single id needs no prefill
                width = min(_power_of_two(len(prompt), MIN_PREFILL), self.max_len)
                by_width.setdefault(width, []).append(prompt)
        for width, prompts in by_width.items():
            while prompts:
                size = next((n for n in self._sizes if n <= len(prompts)), self._sizes[-1])
                part, prompts = prompts[:size], prompts[size:]
                self._prefill_prompts(size, width, part, [same[prompt] for prompt in part])

    def _prefill_prompts(self, size: int, width: int, prompts, slots: list[list[int]]) -> None:
        ids, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        pairs = [(i, slot) for i, group in enumerate(slots) for slot in group]
        pairs += [(0, self.slots)] * ((size if len(pairs) <= size else self.slots) - len(pairs))
        source, target = np.array(pairs, np.int32).T
        fresh = decode.prefill(self.config, self._params, ids)
        self._cache = insert(self._cache, fresh, lengths, source, target)

    # Decoding

    def _decode(self, steps: int) -> list[Event]:
        self._cache, written = decode.burst(
            self.config,
            self._pause_ids,
            self._plan(),
            self._params,
            self._cache,
            self._table(steps),
            steps,
        )
        written = jax.device_get(written)
        if not np.isfinite(written.logprobs).all():
            raise UserError(
                "got logits that are not finite, expected numbers: the model's parameters are "
                "broken; use an earlier checkpoint"
            )
        events = []
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            count = int(written.count[slot])
            event = self._advance(
                row,
                written.tokens[slot, :count].tolist(),
                written.logprobs[slot, :count].tolist(),
                min(len(row.forced), count),
            )
            if event.finish:
                self._rows[slot] = None
            events.append(event)
        return events

    def _table(self, steps: int) -> decode.Rows:
        """What the device is told of the rows."""
        B = self.slots
        token, previous, position, budget, num_forced, top_k = np.zeros((6, B), np.int32)
        forced, seed = np.zeros((B, self.burst), np.int32), np.zeros((B, 2), np.uint32)
        temperature, top_p = np.zeros(B, np.float32), np.ones(B, np.float32)
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            r, written = row.request, len(row.ids) - 1
            token[slot], position[slot] = row.ids[-1], written
            previous[slot] = row.ids[-2] if written else -1
            budget[slot] = self._budget(row, steps)
            ahead = row.forced[: self.burst]
            forced[slot, : len(ahead)], num_forced[slot] = ahead, len(ahead)
            seed[slot] = (r.seed >> 32) & 0xFFFFFFFF, r.seed & 0xFFFFFFFF
            temperature[slot], top_p[slot] = r.temperature, r.top_p
            top_k[slot] = min(r.top_k, self.config.vocab_size)  # more need not fit an int32
        settings = Settings(seed, temperature, top_k, top_p)
        return decode.Rows(token, previous, position, budget, forced, num_forced, settings)

    def _budget(self, row: _Row, steps: int) -> int:
        """Tokens the row may get in a burst of so many steps."""
        left = row.request.max_new_tokens - row.num_new
        return min(steps, left, self.max_len - len(row.ids))

    def _plan(self) -> Plan:
        """What the rows that sample need of the sampler: nothing more is compiled."""
        drawn = [row.request for row in self._rows if row and row.request.temperature > 0]
        whole, needed = self.config.vocab_size, 0
        for r in drawn:
            if r.top_k or r.top_p < 1:
                needed = max(needed, r.top_k or whole)
        return Plan(
            untruncated=any(not r.top_k and r.top_p == 1 for r in drawn),
            candidates=min(_power_of_two(needed, MIN_CANDIDATES), whole) if needed else 0,
        )

    def _advance(
        self, row: _Row, tokens: list[int], logprobs: list[float], num_forced: int
    ) -> Event:
        """Take in what a row got: look for its end, run the tool if it was called."""
        row.ids += tokens
        row.num_new += len(tokens)
        row.forced = row.forced[num_forced:]
        # What the tool says ends no text and calls no tool.
        last = tokens[-1] if len(tokens) > num_forced else None
        finish = None
        if last in self.stop_ids:
            finish = "stop"
        elif row.num_new == row.request.max_new_tokens:
            finish = "length"
        elif len(row.ids) == self.max_len:
            finish = "context"
        elif self.tool:
            for token in tokens[num_forced:]:
                if token == self.tool.start_id:
                    row.call = []
                elif row.call is not None:
                    row.call.append(token)
            if last == self.tool.end_id and row.call is not None:
                row.forced, row.call = list(self.tool.run(row.call[:-1])), None
        sampled = [i >= num_forced for i in range(len(tokens))]
        return Event(row.id, tokens, logprobs, sampled, finish)

    def _check(self, r: Request) -> None:
        ids, vocab_size = list(r.prompt), self.config.vocab_size
        if not ids or not all(0 <= i < vocab_size for i in ids):
            wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
            got = "an empty prompt" if not ids else f"id {wrong} in a prompt"
            raise UserError(
                f"got {got}, expected ids of the model's vocabulary, 0..{vocab_size - 1}; "
                "use the tokenizer that the model was trained with"
            )
        if len(ids) > self.max_len - 1:
            raise UserError(
                f"got a prompt of {len(ids)} tokens, the cache holds {self.max_len} with the "
                "answer's; cut the history"
            )
        for name, fine, expected in (
            ("max_new_tokens", r.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= r.temperature < math.inf, "0 (the most likely token) or more"),
            ("top_k", r.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < r.top_p <= 1, "more than 0, at most 1 (all)"),
        ):
            if not fine:
                got = f"{name} got {getattr(r, name)}"
                raise UserError(f"{got}, expected {expected}; change the request")


def _extend(answer: Completion, event: Event) -> None:
    answer.tokens += event.tokens
    answer.logprobs += event.logprobs
    answer.sampled += event.sampled
    answer.finish = event.finish or ""


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
