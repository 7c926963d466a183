"""CORE: how well a base model does on 22 tasks, by what it finds likely (DCLM, arXiv 2406.11794).

  core_bundle    tasks and their examples
  core_prompts   example -> a row of tokens for each option, and the span of it that counts
  core_score     row -> mean loss over the span, and whether all of it is the first guess
  here           -> verdict -> accuracy, centred accuracy -> CORE

An example is right when its right option has the lowest mean loss (the first, where two are equal);
in language modelling when every token of the continuation is the most likely one. Centred accuracy
is 0 for guessing and 1 for no mistake; CORE is its mean over the 22 tasks. The verdicts are those
of upstream, which runs example by example; here rows of all tasks share batches.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.eval.core_bundle import NUM_EXAMPLES, CoreTask, read_tasks
from nanochat_jax.eval.core_prompts import make_rows, num_rows
from nanochat_jax.eval.core_score import Row, score_rows
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tokenizer.bpe import Tokenizer

Progress = Callable[[int, int], object]  # (rows done, rows in all)


class Graded(NamedTuple):
    """An example with its verdict; the lists have an entry for each of its options."""

    correct: bool
    lengths: list[int]  # tokens of the row
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
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The score of each task and `core`, their mean; `core_partial` unless all 22 are there, whole.

    max_per_task: so many examples of each task; 0 or less: all. device_batch_tokens, tile_tokens:
    see `score_rows`.

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
    graded = grade(
        config,
        mesh,
        params,
        tokenizer,
        tasks,
        device_batch_tokens=device_batch_tokens,
        tile_tokens=tile_tokens,
        progress=progress,
    )
    scores = {
        task.label: _score(task, examples) for task, examples in zip(tasks, graded, strict=True)
    }
    secs, tokens = time.monotonic() - began, sum(score["tokens"] for score in scores.values())
    for score in scores.values():
        score["secs"] = secs * score["tokens"] / tokens
    labels = list(dict.fromkeys([*NUM_EXAMPLES, *(task.label for task in listed)]))
    missing = [label for label in labels if label not in scores]
    parts = {
        task.label: f"{task.num_available} of {NUM_EXAMPLES[task.label]}"
        for task in tasks
        if task.num_available < NUM_EXAMPLES.get(task.label, 0)
    }
    whole = set(scores) == set(NUM_EXAMPLES) and not parts
    return {
        "core" if whole else "core_partial": sum(s["centered"] for s in scores.values())
        / len(tasks),
        "missing": missing,
        "partial": parts,
        "tasks": scores,
        "max_per_task": max_per_task,
        "tokens": tokens,
        "secs": secs,
    }


def _score(task: CoreTask, examples: list[Graded]) -> dict[str, Any]:
    accuracy = sum(example.correct for example in examples) / len(examples)
    return {
        "accuracy": accuracy,
        "centered": task.centered(accuracy),
        "num_examples": len(examples),
        "tokens": sum(sum(example.lengths) for example in examples),
    }


def grade(
    config: GPTConfig,
    mesh: Mesh,
    params: dict,
    tokenizer: Tokenizer,
    tasks: list[CoreTask],
    *,
    device_batch_tokens: int,
    tile_tokens: int,
    progress: Progress = lambda done, total: None,
) -> list[list[Graded]]:
    """A verdict on every example of every task, in their order."""
    layouts: list[list[_Layout]] = [[] for _ in tasks]

    def rows() -> Iterator[Row]:
        count = 0
        for task, of_task in zip(tasks, layouts, strict=True):
            for options in make_rows(task, tokenizer):
                places: dict[bytes, int] = {}  # equal options are one row: no rounding between them
                for row in options:
                    if (ids := row.ids.tobytes()) not in places:
                        places[ids] = count
                        count += 1
                        yield row
                of_task.append(
                    _Layout(
                        [len(row.ids) for row in options],
                        [(row.start, row.end) for row in options],
                        [places[row.ids.tobytes()] for row in options],
                    )
                )

    total = sum(num_rows(item) for task in tasks for item in task.items)
    losses, hits = [0.0] * total, [False] * total
    done = 0
    for places, batch_losses, batch_hits in score_rows(
        config,
        mesh,
        params,
        rows(),
        device_batch_tokens=device_batch_tokens,
        tile_tokens=tile_tokens,
    ):
        for place, loss, hit in zip(places, batch_losses, batch_hits, strict=True):
            losses[place], hits[place] = loss, hit
        progress(done := done + len(places), total)
    return [
        [
            _verdict(task, item, layout, losses, hits)
            for item, layout in zip(task.items, of_task, strict=True)
        ]
        for task, of_task in zip(tasks, layouts, strict=True)
    ]


class _Layout(NamedTuple):
    """What is kept of an example's options while their tokens go to the devices."""

    lengths: list[int]
    spans: list[tuple[int, int]]
    places: list[int]  # of the row among all


def _verdict(
    task: CoreTask, item: dict[str, Any], layout: _Layout, losses: list[float], hits: list[bool]
) -> Graded:
    own = [losses[place] for place in layout.places]
    if task.kind == "language_modeling":
        correct = hits[layout.places[0]]
    else:
        # As `min` of a list has it: the first of equals, and a nan only where it comes first.
        correct = min(range(len(own)), key=own.__getitem__) == item["gold"]
    return Graded(correct, layout.lengths, layout.spans, own)
