"""From an example of CORE to rows of tokens and the span of each that is scored.

                      text of an option                       scored
  multiple choice     query, delimiter, choice                from where the rows begin to differ
  schema              option, delimiter, continuation         from where they are all the same again
  language modelling  context, delimiter, continuation        what the prompt alone does not hold

In front come the shots: other examples of the task with their right answer, each followed by a
blank line, drawn with a seed of its own for every example. A row starts with BOS. Spans are found
in tokens, not in text, because tokens do not end where strings do.
"""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.eval.core_bundle import CoreTask
from nanochat_jax.eval.core_score import Row
from nanochat_jax.tokenizer.bpe import Tokenizer

SHOTS_SEED = 1234  # plus the example's place
EXAMPLES_AT_ONCE = 256  # rendered and tokenised together
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


def render(task: CoreTask, index: int) -> list[str]:
    """The prompts of example `index`: one for each option; of language modelling two, without its
    continuation and with it."""
    item = task.items[index]
    before = "".join(_text(task, shot, shot.get("gold", 0)) + "\n\n" for shot in shots(task, index))
    if task.kind == "language_modeling":
        # A blank at the end would be part of the continuation's first token.
        alone = (before + item["context"].strip() + task.delimiter).strip()
        return [alone, before + _text(task, item, 0)]
    return [before + _text(task, item, option) for option in range(len(item[OPTIONS[task.kind]]))]


def shots(task: CoreTask, index: int) -> list[dict[str, Any]]:
    """The worked examples in front of example `index`: never itself."""
    rng = random.Random(SHOTS_SEED + index)
    others = rng.sample(range(len(task.items) - 1), task.num_shots) if task.num_shots else []
    return [task.items[i + (i >= index)] for i in others]


def _text(task: CoreTask, item: dict[str, Any], option: int) -> str:
    match task.kind:
        case "multiple_choice":
            context, continuation = item["query"], item["choices"][option]
        case "schema":
            context, continuation = item["context_options"][option], item["continuation"]
        case _:
            context, continuation = item["context"].strip(), item["continuation"]
    return context + task.delimiter + continuation


def make_rows(task: CoreTask, tokenizer: Tokenizer) -> Iterator[list[Row]]:
    """The rows of each example, one for each option, in order."""
    for first in range(0, len(task.items), EXAMPLES_AT_ONCE):
        items = task.items[first : first + EXAMPLES_AT_ONCE]
        prompts = [render(task, first + i) for i in range(len(items))]
        texts = [text for example in prompts for text in example]
        tokens = iter(tokenizer.encode_batch(texts, bos=True, num_threads=os.cpu_count() or 1))
        for item, example in zip(items, prompts, strict=True):
            rows = to_rows(task.kind, [np.array(next(tokens), np.int32) for _ in example])
            if task.kind == "language_modeling" and rows[0].start == rows[0].end:
                raise UserError(
                    f"{task.label}: got nothing to score in {str(item)[:60]!r}, expected a "
                    "continuation; mend the example or leave it out"
                )
            yield rows


def num_rows(item: dict[str, Any]) -> int:
    """How many different rows an example has."""
    return len(set(item.get("choices") or item.get("context_options") or [""]))


def to_rows(kind: str, tokens: list[np.ndarray]) -> list[Row]:
    """The rows that are scored, given the tokens of the prompts that `render` made."""
    if kind == "schema":
        shared = common_prefix([ids[::-1] for ids in tokens])
        return [Row(ids, len(ids) - shared, len(ids)) for ids in tokens]
    # Where the prompt alone ends within a token of the whole, the span begins with that token;
    # upstream stops with an assertion there.
    start = common_prefix(tokens)
    scored = tokens[1:] if kind == "language_modeling" else tokens
    return [Row(ids, start, len(ids)) for ids in scored]


def common_prefix(rows: list[np.ndarray]) -> int:
    """How many leading tokens all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(same.argmin())
