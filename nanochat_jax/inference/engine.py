"""The engine: writes many texts at once, each as if it were alone.

The scheduler says which texts write; the engine computes the prompts of the new ones, a piece at a
time, and decodes all in bursts of several tokens (decode.py). All about a text but its cache lives
on the host.

Invariants: an answer depends, up to rounding, on params, prompt, seed and settings alone, not on
slots, burst, order or company. Equal prompts admitted together are computed once. Few programs are
compiled (`programs`), whatever is asked.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.hardware import usable_cpus
from nanochat_jax.inference import decode
from nanochat_jax.inference.decode import Piece, Scores, SlotTable, Written
from nanochat_jax.inference.request import Completion, Request, Tool
from nanochat_jax.inference.scheduler import Scheduler
from nanochat_jax.inference.table import Place, alternatives, empty_piece, make_table, place_prompts
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.kv_cache import capacity, empty_cache, resize
from nanochat_jax.model.sharding import num_row_shards, param_shardings

PIECES = ((1, 32), (1, 128), (16, 32))  # how many prompts are computed at once, tokens of each
BURST_ROWS = (1, 8)  # and all slots: how many texts write at once
SHORTEST_CACHE = 128  # and two times, four times ... as long
BURST_SECS = 0.05  # in traffic: how long a reader waits for the next words
PREFILL_TOKENS = 512  # in traffic: of new prompts between two bursts
NOT_FINITE = "logits are not finite: the parameters are broken; use an earlier checkpoint"


class Engine:
    """Texts of at most `max_len` tokens, `slots` of them at once (rounded up to the mesh's rows).

    stop_ids end a text; never_ids are never sampled. tools: by name, and which of them a request
    may call that says nothing about it. burst: tokens between two looks of the host, at most. Not
    thread-safe.
    """

    def __init__(
        self,
        config: GPTConfig,
        mesh: Mesh,
        *,
        slots: int,
        max_len: int,
        stop_ids: Collection[int],
        never_ids: Collection[int] = (),
        tools: Mapping[str, Tool] | None = None,
        tool: str = "none",
        burst: int = 16,
    ):
        assert slots > 0 and max_len > 1 and burst > 0, (slots, max_len, burst)
        self.config, self.mesh, self.max_len = config, mesh, max_len
        longest = max_len if max_len < SHORTEST_CACHE else _round_up(max_len, SHORTEST_CACHE)
        lengths = [SHORTEST_CACHE * 2**i for i in range(20)]
        self.lengths = [*(n for n in lengths if n < longest), longest]  # of the cache
        window = min(capacity(config, layer, longest) for layer in range(config.num_layers))
        self.burst = min(burst, window)  # a ring must not lap itself
        shards = num_row_shards(mesh)
        self.slots = _round_up(slots, shards)
        fitting = ((_round_up(n, shards), min(tokens, window)) for n, tokens in PIECES)
        self.short, self.long, self.many = fitting
        self.burst_rows = [n for n in BURST_ROWS if n < self.slots and shards == 1] + [self.slots]
        self.scheduler = Scheduler(
            self.slots, max_len, config.vocab_size, stop_ids, tools, tool, window
        )
        ends = {tool.end_id for tool in self.scheduler.tools.values()}
        self._static = config, tuple(sorted({*stop_ids, *ends})), tuple(sorted(never_ids))
        self._params: dict[str, jax.Array] | None = None
        self._shardings = param_shardings(mesh, param_shapes(config))
        self._token_secs = math.inf  # of a burst, lately
        self.length = self.lengths[0]
        with jax.set_mesh(mesh):
            self._cache = empty_cache(config, self.slots, self.length)

    def load(self, params: dict[str, jax.Array]) -> None:
        """Write with these parameters, copied only where dtype or place change: after a training
        step that donates them, load again."""
        assert not self.busy(), "texts are half written with other parameters"
        placed, dtype = jax.device_put(params, self._shardings), self.config.compute_dtype
        self._params = {path: value.astype(dtype) for path, value in placed.items()}
        self.scheduler.left_behind.clear()  # what is cached is of other parameters

    def unload(self) -> None:
        """Let go of the parameters, whose memory a training step may need."""
        self._params = None

    def generate(
        self,
        requests: Sequence[Request],
        on_finish: Callable[[int, Completion], object] = lambda *_: None,
    ) -> list[Completion]:
        """Answers to any number of requests, in their order. on_finish gets each as it ends."""
        assert not self.busy(), "generate needs the engine for itself"
        answers, numbers = [Completion() for _ in requests], {}
        try:
            for number, request in enumerate(requests):
                numbers[self.scheduler.submit(request)] = number
            # Start as a new engine would: what it did before leaves no trace.
            self.scheduler.left_behind.clear()
            self._resize(self.lengths[0])
            while self.busy():
                for piece in self.step(in_traffic=False):
                    number = numbers[piece.id]
                    answers[number].add(piece)
                    if piece.finish == "error":
                        raise UserError(f"request {number}: {piece.reason}")
                    if piece.finish:
                        on_finish(number, answers[number])
        finally:
            self.scheduler.drop(numbers)  # an error: the engine is as good as before
        return answers

    def stream(self, request: Request) -> Iterator[Completion]:
        """One request, piece by piece; whoever stops reading cancels it."""
        assert not self.busy(), "stream needs the engine for itself"
        id = self.submit(request)
        try:
            while self.busy():
                yield from self.step()
        finally:
            self.scheduler.drop([id])

    def submit(self, request: Request) -> int:
        """Queue a request; the id of its pieces."""
        return self.scheduler.submit(request)

    def cancel(self, id: int) -> None:
        """End a request; the next step says so."""
        self.scheduler.cancel(id)

    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.busy()

    def step(self, in_traffic: bool = True) -> list[Completion]:
        """Fill free slots, compute a piece of the new prompts and decode a burst.

        in_traffic: steps are short, so that first tokens come soon and others are not held up, and
        tools are not waited for. Else they are as long as it pays, and the same every time.
        """
        assert self._params is not None, "load parameters first"
        scheduler = self.scheduler
        scheduler.hear(waited=not in_traffic)
        scheduler.admit()
        with jax.set_mesh(self.mesh):
            self._prefill(PREFILL_TOKENS if in_traffic else math.inf)
            scheduler.finish_scored()
            pieces = self._decode(in_traffic)
        ended, scheduler.ended = scheduler.ended, []
        return ended + pieces

    def programs(self) -> Iterator[tuple[Any, tuple]]:
        """All functions that may have to be compiled, and with what each is called."""
        sharding = self._cache[0][0].sharding
        for at, length in enumerate(self.lengths):
            cache = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                empty_cache.eval_shape(self.config, self.slots, length),
            )
            for piece in (
                empty_piece(*shape, self.slots) for shape in {self.short, self.long, self.many}
            ):
                for scored in {False, length == self.lengths[-1]}:
                    static, num_top = (self.config, scored), np.array(0, np.int32)
                    yield decode.extend, (*static, self._params, cache, piece, num_top)
            for rows, sampled in itertools.product(self.burst_rows, (False, True)):
                table = self._table({}, rows, sampled)
                yield decode.burst, (*self._static, self._params, cache, table)
            for other in {*self.lengths[max(0, at - 1) : at + 2]} - {length}:
                yield resize, (self.config, other, cache)

    def warm_up(self, progress: Callable[[int, int], object] = lambda *_: None) -> None:
        """Compile all programs, one a CPU; progress gets how many are done, of how many."""
        with ThreadPoolExecutor(usable_cpus()) as pool, jax.set_mesh(self.mesh):
            # Later calls with the same types of arguments find what this has compiled.
            lowered = (function.lower(*args) for function, args in self.programs())
            programs = [pool.submit(program.compile) for program in lowered]
            for done, program in enumerate(as_completed(programs), 1):
                program.result()
                progress(done, len(programs))

    def _prefill(self, budget: float) -> None:
        """Compute prompts, about `budget` tokens of them, those of the oldest requests first."""
        texts = self.scheduler.texts
        while budget > 0:
            equal: dict[Hashable, list[int]] = {}  # slots whose next piece is the same
            for slot, text in sorted(texts.items(), key=lambda item: item[1].id):
                if text.cached < len(text.ids) - 1:
                    equal.setdefault((text.prompt_key, text.cached), []).append(slot)
            if not equal:
                return
            groups, shape = list(equal.values()), self.many
            if len(groups) < self.many[0] / 2:
                text = texts[groups[0][0]]
                left = len(text.ids) - 1 - text.cached
                shape = self.long if left > 2 * self.short[1] else self.short
            budget -= self._compute(groups, *shape)

    def _compute(self, groups: list[list[int]], rows: int, width: int) -> int:
        """The next piece of the first prompts that have room, one prompt a group of slots; how many
        tokens."""
        texts, shards = self.scheduler.texts, num_row_shards(self.mesh)
        begun = {slot for slot, text in texts.items() if text.cached}
        placed = place_prompts(groups, begun, np.arange(rows).reshape(shards, -1), self.slots)
        texts = {row: texts[group[0]] for row, (group, _) in placed.items()}
        piece = empty_piece(rows, width, self.slots)
        for row, (group, slot) in placed.items():
            text = texts[row]
            begin, n = text.cached, min(len(text.ids) - 1 - text.cached, width)
            piece.start[row], piece.count[row], piece.slots[row] = begin, n, slot
            piece.ids[row, 0] = text.ids[begin - 1] if begin else -1
            piece.ids[row, 1 : n + 2] = text.ids[begin : begin + n + 1]
            piece.targets[group], piece.source[group] = group, row
        scored, num_top = any(text.scored for text in texts.values()), 0
        self._make_room(self.lengths[-1] if scored else int(np.max(piece.start + piece.count)))
        if scored:
            num_top = max(text.request.top_logprobs for text in texts.values())
        scores = self._extend(piece, scored, num_top)
        for row, (group, _) in placed.items():
            text = texts[row]
            n, told = int(piece.count[row]), []
            if scores and text.scored:
                logprobs = scores.logprobs[row, :n].tolist()
                told = list(zip(logprobs, alternatives(scores, row, n, text), strict=True))
            for slot in group:
                self.scheduler.texts[slot].cached += n
                self.scheduler.texts[slot].scores += told
                if not np.isfinite([logprob for logprob, _ in told]).all():
                    self.scheduler.fail(slot, NOT_FINITE)
        return int(piece.count.sum())

    def _decode(self, in_traffic: bool) -> list[Completion]:
        """A burst for all texts that can write."""
        scheduler = self.scheduler
        texts = {slot: text for slot, text in sorted(scheduler.texts.items()) if text.ready}
        if not texts:
            return []
        steps = self.burst
        if in_traffic:
            steps = max(1, min(steps, int(BURST_SECS / self._token_secs)))
        # In traffic few texts take a small program; else there is one, as compiling takes long.
        rows = next(n for n in self.burst_rows if n >= len(texts)) if in_traffic else self.slots
        places = {}
        for number, (slot, text) in enumerate(texts.items()):
            row = slot if rows == self.slots else number
            places[row] = Place(text, slot, min(steps, scheduler.left(text)))
        self._make_room(max(len(place.text.ids) + place.budget for place in places.values()))
        began = time.perf_counter()
        sampled = not all(text.request.greedy for text in texts.values())
        tokens, scores, count = self._burst(places, rows, sampled)
        secs = (time.perf_counter() - began) / max(1, count.max())
        self._token_secs = min(secs, 1.1 * self._token_secs)  # a pause is soon forgotten
        pieces = []
        for row, (text, slot, _) in places.items():
            n, forced = int(count[row]), len(text.forced)
            logprobs = scores.logprobs[row, :n]
            if np.isfinite(logprobs[forced:]).all():
                top = alternatives(scores, row, n, text) if text.request.top_logprobs else None
                new = tokens[row, :n].tolist(), logprobs.tolist(), top
                pieces.append(scheduler.advance(slot, *new))
            else:
                scheduler.fail(slot, NOT_FINITE)
        return pieces

    def _extend(self, piece: Piece, scored: bool, num_top: int) -> Scores | None:
        static = self.config, scored, self._params
        num = np.array(num_top, np.int32)
        self._cache, scores = decode.extend(*static, self._cache, piece, num)
        return jax.device_get(scores)

    def _burst(self, places: dict[int, Place], rows: int, sampled: bool) -> Written:
        table = self._table(places, rows, sampled)
        self._cache, written = decode.burst(*self._static, self._params, self._cache, table)
        return jax.device_get(written)

    def _table(self, places: dict[int, Place], rows: int, sampled: bool) -> SlotTable:
        sizes = {"vocab_size": self.config.vocab_size, "max_len": self.lengths[-1]}
        return make_table(places, rows, self.burst, no_slot=self.slots, sampled=sampled, **sizes)

    def _make_room(self, longest: int) -> None:
        """Resize the cache for texts of this length, and for those that lie in it."""
        longest = max([longest, *(text.cached for text in self.scheduler.texts.values())])
        least = next(n for n in self.lengths if n >= longest)
        # Smaller only by much, so that it does not go up and down.
        if least > self.length or least <= self.length // 4:
            self._resize(least)

    def _resize(self, length: int) -> None:
        """Through all lengths between, so that few programs are compiled."""
        held, at = self.scheduler.left_behind, self.lengths.index(self.length)
        goal = self.lengths.index(length)
        while at != goal:
            at += 1 if goal > at else -1
            self.length = self.lengths[at]
            with jax.set_mesh(self.mesh):
                self._cache = resize(self.config, self.length, self._cache)
        for slot in [slot for slot, ids in held.items() if len(ids) > length]:
            held[slot] = []


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
