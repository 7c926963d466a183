"""What the device is told of the texts in their slots, and what it says back; no device here."""

from collections.abc import Mapping

import numpy as np

from nanochat_jax.inference.decode import MOST_BIASED, Extras, Scores, SlotTable
from nanochat_jax.inference.request import Top
from nanochat_jax.inference.sampling import Settings
from nanochat_jax.inference.scheduler import Text


def make_table(
    texts: Mapping[int, Text], budgets: Mapping[int, int], slots: int, burst: int
) -> SlotTable:
    """Where the texts stand, by slot, for a burst in which all take the most likely token."""
    token, previous, position, budget, num_forced = np.zeros((5, slots), np.int32)
    forced = np.zeros((slots, burst), np.int32)
    for slot, text in texts.items():
        ids, ahead = text.ids, text.forced[:burst]
        token[slot], previous[slot] = ids[-1], ids[-2] if len(ids) > 1 else -1
        position[slot], budget[slot], num_forced[slot] = len(ids) - 1, budgets[slot], len(ahead)
        forced[slot, : len(ahead)] = ahead
    return SlotTable(token, previous, position, budget, num_forced, forced, None)


def make_sampling(
    texts: Mapping[int, Text], slots: int, longest: int, vocab_size: int
) -> tuple[Settings, Extras]:
    """How the texts sample; longest: tokens an answer may have."""
    seed = np.zeros((slots, 2), np.uint32)
    top_k = np.zeros(slots, np.int32)
    temperature, presence, frequency = np.zeros((3, slots), np.float32)
    top_p = np.ones(slots, np.float32)
    said = np.full((slots, longest), vocab_size, np.int32)
    bias_ids = np.full((slots, MOST_BIASED), vocab_size, np.int32)
    bias, num_top = np.zeros(bias_ids.shape, np.float32), 0
    for slot, text in texts.items():
        r = text.request
        seed[slot] = divmod(r.seed % 2**64, 2**32)
        top_k[slot] = min(r.top_k, vocab_size)  # more need not fit an int32
        temperature[slot], top_p[slot] = r.temperature, r.top_p
        presence[slot], frequency[slot] = r.presence_penalty, r.frequency_penalty
        num_top = max(num_top, r.top_logprobs)
        if r.presence_penalty or r.frequency_penalty:
            answer = text.ids[len(r.prompt) :]
            said[slot, : len(answer)] = answer
        bias_ids[slot, : len(r.logit_bias)] = list(r.logit_bias)
        bias[slot, : len(r.logit_bias)] = list(r.logit_bias.values())
    settings = Settings(seed, temperature, top_k, top_p, presence, frequency)
    return settings, Extras(said, bias_ids, bias, np.array(num_top, np.int32))


def alternatives(scores: Scores, row: int, count: int, text: Text) -> list[Top]:
    """As many of each of `count` tokens as the text asked for."""
    if not (wanted := text.request.top_logprobs):
        return [[] for _ in range(count)]
    ids = scores.top_ids[row, :count, :wanted].tolist()
    logprobs = scores.top_logprobs[row, :count, :wanted].tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
