"""What the device is told of the texts that write, and what it says back, as arrays."""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nanochat_jax.inference.decode import MOST_BIASED, Extras, Piece, Scores, SlotTable
from nanochat_jax.inference.request import Top
from nanochat_jax.inference.sampling import Settings
from nanochat_jax.inference.scheduler import Text


def empty_piece(rows: int, width: int, num_slots: int) -> Piece:
    """Room for a piece of prompts; as it is, it goes nowhere."""
    start, count, slots = np.zeros((3, rows), np.int32)
    source, targets = np.zeros(num_slots, np.int32), np.full(num_slots, num_slots, np.int32)
    return Piece(np.zeros((rows, width + 2), np.int32), start, count, slots, targets, source)


def place_prompts(
    groups: Sequence[list[int]], begun: Container[int], rows: np.ndarray, num_slots: int
) -> dict[int, tuple[list[int], int]]:
    """{row: (group, slot)} of as many groups of slots as have room, the first ones first.

    rows [shards, n]: a row shard computes from the slots that are its own. What no slot of a group
    has yet (begun) may be computed anywhere.
    """
    placed, free = {}, rows.tolist()
    for group in groups:
        choices = [(free[slot * len(free) // num_slots], slot) for slot in group]
        if group[0] not in begun:
            choices += [(room, group[0]) for room in free]
        if choice := next((choice for choice in choices if choice[0]), None):
            placed[choice[0].pop(0)] = group, choice[1]
    return placed


class Place(NamedTuple):
    """A text that is to write."""

    text: Text
    slot: int
    budget: int  # tokens, at most


def make_table(
    places: Mapping[int, Place],
    rows: int,
    steps: int,
    *,
    no_slot: int,
    vocab_size: int,
    max_len: int,
    sampled: bool,
) -> SlotTable:
    """The table of `rows` rows, of which some have a text; steps: the longest burst."""
    token, previous, position, budget, num_forced = np.zeros((5, rows), np.int32)
    slots, forced = np.full(rows, no_slot, np.int32), np.zeros((rows, steps), np.int32)
    for row, (text, slot, tokens) in places.items():
        ids, ahead = text.ids, text.forced[:steps]
        token[row], previous[row] = ids[-1], ids[-2] if len(ids) > 1 else -1
        position[row], budget[row], num_forced[row] = len(ids) - 1, tokens, len(ahead)
        slots[row], forced[row, : len(ahead)] = slot, ahead
    texts = {row: place.text for row, place in places.items()}
    sampling = _sampling(texts, rows, vocab_size, max_len) if sampled else None
    return SlotTable(slots, token, previous, position, budget, num_forced, forced, sampling)


def _sampling(
    texts: Mapping[int, Text], rows: int, vocab_size: int, max_len: int
) -> tuple[Settings, Extras]:
    seed, top_k = np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32)
    temperature, presence, frequency = np.zeros((3, rows), np.float32)
    top_p, num_top = np.ones(rows, np.float32), 0
    said = np.full((rows, max_len), vocab_size, np.int32)
    bias_ids = np.full((rows, MOST_BIASED), vocab_size, np.int32)
    bias = np.zeros(bias_ids.shape, np.float32)
    for row, text in texts.items():
        r, answer = text.request, text.ids[len(text.request.prompt) :]
        seed[row] = divmod(r.seed % 2**64, 2**32)
        top_k[row] = min(r.top_k, vocab_size)  # more need not fit an int32
        temperature[row], top_p[row] = r.temperature, r.top_p
        presence[row], frequency[row] = r.presence_penalty, r.frequency_penalty
        num_top = max(num_top, r.top_logprobs)
        if r.presence_penalty or r.frequency_penalty:
            said[row, : len(answer)] = answer
        bias_ids[row, : len(r.logit_bias)] = list(r.logit_bias)
        bias[row, : len(r.logit_bias)] = list(r.logit_bias.values())
    settings = Settings(seed, temperature, top_k, top_p, presence, frequency)
    return settings, Extras(said, bias_ids, bias, np.array(num_top, np.int32))


def alternatives(scores: Scores, row: int, count: int, text: Text) -> list[Top]:
    """As many of each of `count` tokens as the text asked for."""
    if not (wanted := text.request.top_logprobs):
        return [[] for _ in range(count)]
    ids = scores.top_ids[row, :count, :wanted].tolist()
    logprobs = scores.top_logprobs[row, :count, :wanted].tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
