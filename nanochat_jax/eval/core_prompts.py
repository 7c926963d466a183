"""From an example of CORE to its candidates: texts as tokens, and the span that is scored.

                       scored, of context, delimiter, continuation
  multiple choice      from where the options begin to differ
  schema               from where they are all the same again
  language modelling   what the context alone does not hold

In front come the shots: other examples of the task with their right answer, each followed by a
blank line, drawn with a seed of its own for every example. A candidate starts with BOS. Spans are
found in tokens, not in text, because tokens do not end where strings do.
"""

import os
import random
from collections.abc import Iterator

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.eval.core_bundle import CoreTask
from nanochat_jax.eval.core_score import Candidate
from nanochat_jax.tokenizer.bpe import Tokenizer

SHOTS_SEED = 1234  # plus the example's place
EXAMPLES_AT_ONCE = 256  # rendered and tokenised together


def render(task: CoreTask, index: int) -> list[str]:
    """The prompts of example `index`: one for each option; of language modelling two, without its
    continuation and with it."""
    rng = random.Random(SHOTS_SEED + index)
    others = rng.sample(range(len(task.items) - 1), task.num_shots) if task.num_shots else []
    before = ""
    for shot in [task.items[i + (i >= index)] for i in others]:  # never itself
        before += _text(task, *shot.options[shot.gold]) + "\n\n"
    prompts = [before + _text(task, *option) for option in task.items[index].options]
    if task.kind == "language_modeling":
        # A blank at the end would be part of the continuation's first token.
        alone = before + _text(task, task.items[index].options[0][0], "")
        return [alone.strip(), *prompts]
    return prompts


def _text(task: CoreTask, context: str, continuation: str) -> str:
    if task.kind == "language_modeling":
        context = context.strip()
    return context + task.delimiter + continuation


def make_candidates(task: CoreTask, tokenizer: Tokenizer) -> Iterator[list[Candidate]]:
    """The candidates of each example, one for each option, in order."""
    for first in range(0, len(task.items), EXAMPLES_AT_ONCE):
        examples = range(first, min(first + EXAMPLES_AT_ONCE, len(task.items)))
        prompts = [render(task, index) for index in examples]
        texts = [text for of_example in prompts for text in of_example]
        tokens = iter(tokenizer.encode_batch(texts, bos=True, num_threads=os.cpu_count() or 1))
        for of_example in prompts:
            found = find_spans(task.kind, [np.array(next(tokens), np.int32) for _ in of_example])
            if task.kind == "language_modeling" and found[0].start == found[0].end:
                raise UserError(
                    f"{task.label}: got nothing to score in {of_example[-1][-60:]!r}, expected a "
                    "continuation; mend the example or leave it out"
                )
            yield found


def find_spans(kind: str, tokens: list[np.ndarray]) -> list[Candidate]:
    """The candidates, given the tokens of the prompts that `render` made."""
    if kind == "schema":
        shared = common_prefix([ids[::-1] for ids in tokens])
        return [Candidate(ids, len(ids) - shared, len(ids)) for ids in tokens]
    # Where the prompt alone ends within a token of the whole, the span begins with that token;
    # upstream stops with an assertion there.
    start = common_prefix(tokens)
    scored = tokens[1:] if kind == "language_modeling" else tokens
    return [Candidate(ids, start, len(ids)) for ids in scored]


def common_prefix(rows: list[np.ndarray]) -> int:
    """How many leading tokens all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(same.argmin())
