"""The engine: writes many texts at once, each as if it were alone.

The scheduler says which texts write; the engine computes the prompts of the new ones and decodes
all in bursts of several tokens (decode.py). All about a text but its cache lives on the host.

Invariants: an answer depends, up to rounding, on params, prompt, seed and settings alone, not on
slots, burst, order or company. Equal prompts admitted together are computed once. Few programs are
compiled: lengths are powers of two, numbers of prompts a few sizes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.inference import decode
from nanochat_jax.inference.sampling import Needs, Settings
from nanochat_jax.inference.scheduler import Completion, Request, Scheduler, Text, Tool
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.kv_cache import capacity, empty_cache, insert, resize
from nanochat_jax.model.sharding import num_row_shards, param_shardings

PREFILL_ROWS = (16, 4, 1)  # prompts computed at once
MIN_PREFILL, MIN_CACHE = 32, 128  # lengths are powers of two from these up
MIN_CANDIDATES = 64  # of top-k


class Engine:
    """Texts of at most `max_len` tokens, `slots` of them at once (rounded up to the mesh's rows).

    stop_ids end a text. burst: tokens between two looks of the host. Not thread-safe.
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
        self.config, self.mesh, self.max_len = config, mesh, max_len
        kept = (capacity(config, layer, max_len) for layer in range(config.num_layers))
        self.burst = min(burst, *kept)  # a ring must not lap itself
        shards = num_row_shards(mesh)
        self.slots = _round_up(slots, shards)
        self.scheduler = Scheduler(self.slots, max_len, config.vocab_size, stop_ids, tool)
        self._pause_ids = tuple(sorted({*stop_ids, *([tool.end_id] if tool else [])}))
        self._prefill_rows = sorted({_round_up(n, shards) for n in PREFILL_ROWS}, reverse=True)
        self._params: dict[str, jax.Array] | None = None
        self._shardings = param_shardings(mesh, param_shapes(config))
        self.length = min(MIN_CACHE, max_len)  # of the cache
        with jax.set_mesh(mesh):
            self._cache = empty_cache(config, self.slots, self.length)

    def load(self, params: dict[str, jax.Array]) -> None:
        """Write with these parameters, copied only where dtype or place change: after a training
        step that donates them, load again."""
        placed, dtype = jax.device_put(params, self._shardings), self.config.compute_dtype
        self._params = {path: value.astype(dtype) for path, value in placed.items()}

    def unload(self) -> None:
        """Let go of the parameters, whose memory a training step may need."""
        self._params = None

    def generate(
        self,
        requests: Sequence[Request],
        on_finish: Callable[[int, Completion], object] = lambda *_: None,
    ) -> list[Completion]:
        """Answers to any number of requests, in their order. on_finish gets each as it ends."""
        assert not self.scheduler.busy(), "generate needs the engine for itself"
        answers, numbers = [Completion() for _ in requests], {}
        try:
            for number, request in enumerate(requests):
                numbers[self.scheduler.submit(request)] = number
            # Start as a new engine would: what it did before leaves no trace.
            self._resize(min(MIN_CACHE, self.max_len))
            while self.scheduler.busy():
                for piece in self.step(self.burst):
                    number = numbers[piece.id]
                    answers[number].add(piece)
                    if piece.finish:
                        on_finish(number, answers[number])
        finally:
            self.scheduler.drop(numbers)  # an error: the engine is as good as before
        return answers

    def stream(self, request: Request) -> Iterator[Completion]:
        """One request, a piece for each burst; whoever stops reading cancels it."""
        assert not self.scheduler.busy(), "stream needs the engine for itself"
        id = self.scheduler.submit(request)
        try:
            while self.scheduler.busy():
                yield from self.step()
        finally:
            self.scheduler.drop([id])

    def step(self, first_tokens: int = 1) -> list[Completion]:
        """Fill free slots and decode a burst; of first_tokens only after an admission."""
        assert self._params is not None, "load parameters first"
        scheduler = self.scheduler
        cancelled, scheduler.cancelled = scheduler.cancelled, []
        admitted = scheduler.admit()
        if not (texts := scheduler.texts):
            return cancelled
        steps = first_tokens if admitted else self.burst
        budgets = {slot: min(steps, scheduler.left(text)) for slot, text in texts.items()}
        longest = max(len(text.ids) + budgets[slot] for slot, text in texts.items())
        length = min(_power_of_two(longest, MIN_CACHE), self.max_len)
        if length > self.length or length <= self.length // 4:  # down only to a quarter
            self._resize(length)
        with jax.set_mesh(self.mesh):
            new_prompts = prompt_batches(admitted, self._prefill_rows, self.slots, self.max_len)
            for ids, *where in new_prompts:
                fresh = decode.prefill(self.config, self._params, ids)
                self._cache = insert(self._cache, fresh, *where)
            static = self.config, self._pause_ids, self._needs(texts)
            table = self._table(texts, budgets)
            self._cache, written = decode.burst(*static, self._params, self._cache, table)
        written = jax.device_get(written)
        if not np.isfinite(written.logprobs).all():
            raise UserError(
                "logits are not finite: the parameters are broken; use an earlier checkpoint"
            )
        return cancelled + scheduler.advance(*written)

    def _resize(self, length: int) -> None:
        if length != self.length:
            with jax.set_mesh(self.mesh):
                self._cache, self.length = resize(self.config, length, self._cache), length

    def _table(self, texts: dict[int, Text], budgets: dict[int, int]) -> decode.SlotTable:
        """What the device is told of the slots."""
        numbers = np.zeros((6, self.slots), np.int32)
        forced = np.zeros((self.slots, self.burst), np.int32)
        seed = np.zeros((self.slots, 2), np.uint32)
        temperature, top_p = np.zeros(self.slots, np.float32), np.ones(self.slots, np.float32)
        for slot, text in texts.items():
            r, ids, ahead = text.request, text.ids, text.forced[: self.burst]
            previous = ids[-2] if len(ids) > 1 else -1
            top_k = min(r.top_k, self.config.vocab_size)  # more need not fit an int32
            numbers[:, slot] = ids[-1], previous, len(ids) - 1, budgets[slot], len(ahead), top_k
            forced[slot, : len(ahead)] = ahead
            seed[slot] = divmod(r.seed % 2**64, 2**32)
            temperature[slot], top_p[slot] = r.temperature, r.top_p
        token, previous, position, budget, num_forced, top_k = numbers
        settings = Settings(seed, temperature, top_k, top_p)
        return decode.SlotTable(token, previous, position, budget, num_forced, forced, settings)

    def _needs(self, texts: dict[int, Text]) -> Needs:
        """What the texts that sample need of the sampler: nothing more is compiled."""
        whole = self.config.vocab_size
        drawn = [text.request for text in texts.values() if text.request.temperature > 0]
        truncated = [r.top_k or whole for r in drawn if r.top_k or r.top_p < 1]
        candidates = _power_of_two(max(truncated), MIN_CANDIDATES) if truncated else 0
        return Needs(len(truncated) < len(drawn), min(candidates, whole))


def prompt_batches(
    texts: dict[int, Text], sizes: Sequence[int], num_slots: int, max_len: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The prompts of {slot: text}, each different one once, in few shapes.

    Yields ids [n, T] and lengths [n] without each prompt's last id, rows and slots [m]: which row
    goes to which slot (num_slots: to none). sizes: the values of n, falling.
    """
    slots_of: dict[tuple[int, ...], list[int]] = {}
    for slot, text in texts.items():
        slots_of.setdefault(tuple(text.ids[:-1]), []).append(slot)
    slots_of.pop((), None)  # a single id needs no prefill
    by_width: dict[int, list[tuple[int, ...]]] = {}
    for prompt in slots_of:
        width = min(_power_of_two(len(prompt), MIN_PREFILL), max_len)
        by_width.setdefault(width, []).append(prompt)
    for width, prompts in by_width.items():
        while prompts:
            size = next((n for n in sizes if n <= len(prompts)), sizes[-1])
            part, prompts = prompts[:size], prompts[size:]
            ids, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for row, prompt in enumerate(part):
                ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            pairs = [(row, slot) for row, prompt in enumerate(part) for slot in slots_of[prompt]]
            num_pairs = size if len(pairs) <= size else num_slots  # one of two, to compile few
            pairs += [(0, num_slots)] * (num_pairs - len(pairs))
            yield ids, lengths, *np.array(pairs, np.int32).T


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
