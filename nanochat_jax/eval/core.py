"""CORE: how well a base model does on 22 tasks, by what it finds likely (DCLM, arXiv 2406.11794).

  core_tasks   tasks, their examples, a candidate (tokens, the span that counts) for each option
  core_score   candidate -> mean loss over the span, and whether all of it is the first guess
  here         -> verdict -> accuracy, centred accuracy -> CORE

An example is right when its right option has the lowest mean loss (the first, where two are equal);
in language modelling when every token of the continuation is the most likely one. Centred accuracy
is 0 for guessing and 1 for no mistake; CORE is its mean over the 22 tasks. The verdicts are those
of upstream, which runs example by example; here candidates of all tasks share batches.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.eval.core_score import Candidate, score_candidates
from nanochat_jax.eval.core_tasks import (
    NUM_EXAMPLES,
    CoreTask,
    Example,
    make_candidates,
    read_tasks,
)
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer.bpe import Tokenizer

Score = Callable[[Iterable[Candidate]], list[tuple[float, bool]]]  # see `score_candidates`


class Graded(NamedTuple):
    """An example with its verdict; the lists have an entry for each of its options."""

    correct: bool
    lengths: list[int]  # tokens of the candidate
    spans: list[tuple[int, int]]  # start and end of what is scored
    losses: list[float]  # mean over the span; nan where it is empty


def evaluate(
    config: GPTConfig,
    mesh: Mesh,
    params: dict,
    tokenizer: Tokenizer,
    bundle: Path,
    *,
    max_per_task: int = -1,
    device_batch_tokens: int,
    tile_tokens: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
    num_examples: Mapping[str, int] = NUM_EXAMPLES,
) -> dict[str, Any]:
    """The score of each task and `core`, their mean; `core_partial` unless all are there, whole.

    max_per_task: so many examples of each task; 0 or less: all. device_batch_tokens, tile_tokens:
    see `score_candidates`. num_examples: what the whole bundle holds of each task.

    Returns {"core" or "core_partial", "missing": labels, "partial": {label: "3 of 5"}, "tasks":
    {label: {"accuracy", "centered", "num_examples", "tokens", "secs"}}, "max_per_task", "tokens",
    "secs"}. Batches mix tasks, so the seconds of a task are its share by tokens.
    """
    began = time.monotonic()
    listed = read_tasks(bundle, max_per_task)
    tasks = [task for task in listed if task.items]
    if not tasks:
        raise UserError(
            f"got {bundle} without any examples, expected eval_data/ with those that its core.yaml "
            "lists; unpack the whole bundle or set config.eval.core_dir"
        )
    total = sum(len(set(example.options)) for task in tasks for example in task.items)
    sizes = {"device_batch_tokens": device_batch_tokens, "tile_tokens": tile_tokens}
    told = {"progress": lambda done: progress(done, total)}
    score = partial(score_candidates, config, mesh, params, **sizes, **told)
    scores: dict[str, dict[str, Any]] = {}
    for task, examples in zip(tasks, grade(tasks, tokenizer, score), strict=True):
        accuracy = sum(example.correct for example in examples) / len(examples)
        scores[task.label] = {
            "accuracy": accuracy,
            "centered": task.centered(accuracy),
            "num_examples": len(examples),
            "tokens": sum(sum(example.lengths) for example in examples),
        }
    secs, tokens = time.monotonic() - began, sum(s["tokens"] for s in scores.values())
    for s in scores.values():
        s["secs"] = secs * s["tokens"] / tokens
    labels = dict.fromkeys([*num_examples, *(task.label for task in listed)])
    wanted = [(task, num_examples.get(task.label, 0)) for task in tasks]
    partly = {t.label: f"{t.num_available} of {n}" for t, n in wanted if t.num_available < n}
    whole = set(scores) == set(num_examples) and not partly
    mean = sum(s["centered"] for s in scores.values()) / len(scores)
    return {
        "core" if whole else "core_partial": mean,
        "missing": [label for label in labels if label not in scores],
        "partial": partly,
        "tasks": scores,
        "max_per_task": max_per_task,
        "tokens": tokens,
        "secs": secs,
    }


def grade(tasks: list[CoreTask], tokenizer: Tokenizer, score: Score) -> list[list[Graded]]:
    """A verdict on every example of every task, in their order."""
    kept = []  # of each example's options, while their tokens go to the devices

    def candidates() -> Iterator[Candidate]:
        count = 0
        for task in tasks:
            for options in make_candidates(task, tokenizer):
                # Equal options are scored once, so that no rounding comes between them.
                unique = {option.ids.tobytes(): option for option in options}
                places = dict(zip(unique, itertools.count(count), strict=False))
                yield from unique.values()
                count += len(unique)
                kept.append(
                    [(places[o.ids.tobytes()], len(o.ids), (o.start, o.end)) for o in options]
                )

    scores, of_examples = score(candidates()), iter(kept)

    def verdict(task: CoreTask, example: Example) -> Graded:
        places, lengths, spans = map(list, zip(*next(of_examples), strict=True))
        losses = [scores[place][0] for place in places]
        if task.kind == "language_modeling":
            correct = scores[places[0]][1]
        else:
            # As `min` of a list has it: the first of equals, and a nan only where it comes first.
            correct = min(range(len(losses)), key=losses.__getitem__) == example.gold
        return Graded(correct, lengths, spans, losses)

    return [[verdict(task, example) for example in task.items] for task in tasks]
