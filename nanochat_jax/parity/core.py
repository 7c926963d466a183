"""Parity of CORE: core_model.npz and core.json of a folder, on the tasks' own data.

Examples are rendered, tokenised and scored as an evaluation does it, all tasks in shared batches.
`mean_loss` is that of whole rows, padded with BOS as upstream pads them; it is scored the same way,
with a longer text and a longer span. A task that carries its own items needs no data; without data
the others are listed as not compared.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.eval.core import Graded, Score, grade
from nanochat_jax.eval.core_score import Candidate, score_candidates
from nanochat_jax.eval.core_tasks import CoreTask, make_candidates, read_tasks, to_example
from nanochat_jax.parity.model import read_case
from nanochat_jax.parity.reference import ABSENT, Reference, Row, collect
from nanochat_jax.tokenizer.bpe import Tokenizer

TOLERANCE = {"accuracy": 1e-6, "centered": 1e-6, "span_loss": 1e-4, "mean_loss": 1e-4}
BATCH = {"device_batch_tokens": 8_192, "tile_tokens": 512}
META = {  # the reference's word: ours
    "task_type": "kind",
    "dataset_uri": "uri",
    "num_fewshot": "num_shots",
    "continuation_delimiter": "delimiter",
}


def compare_core(
    folder: Path, arrays: Reference, settings: Reference, data: Path | None
) -> Iterable[Row]:
    """data: a folder like the evaluation bundle."""
    weights = Reference(arrays.file, {f"state/{name}": value for name, value in arrays.items()})
    sizes = {f"config.{key}": value for key, value in settings["model_config"].items()}
    case = read_case(weights, Reference(settings.file, sizes), "classic")
    row = case.compare_shapes("names, shapes")
    yield row
    if not row.ok:
        return
    settings.get("note")
    score = partial(score_candidates, case.config, case.mesh, case.params, **BATCH)
    tokenizer = Tokenizer.load(folder)
    bundle = {task.label: task for task in read_tasks(data) if task.items} if data else {}
    tasks, references = [], []
    for label in dict.fromkeys(key.partition(".")[0] for key in settings["tasks"]):
        reference = Reference(settings.file, settings[f"tasks.{label}"])
        meta = {META.get(key, str(key)): value for key, value in reference["meta"].items()}
        if "items" in reference:
            items = [to_example(meta["kind"], item) for item in reference["items"]]
            given = {"uri": "", "num_shots": 0, "delimiter": " ", "baseline": 0.0} | meta
            tasks.append(CoreTask(**given, label=label, items=items, num_available=len(items)))
        elif label in bundle:
            task, keep = bundle[label], reference["max_per_task"]
            meta["baseline"] = reference["random_baseline"]
            ours = {key: getattr(task, key, None) for key in meta}
            yield settings.compare(f"{label}: meta", ours, meta)
            tasks.append(replace(task, items=task.items[:keep]) if keep > 0 else task)
        else:
            where = f"no examples in {data}" if data else "it needs data: --core-data=DIR"
            yield Row(settings.file, label, 0, 0.0, 0.0, f"not compared: {where}")
            continue
        references.append(reference)
    graded = grade(tasks, tokenizer, score)
    for task, examples, reference in zip(tasks, graded, references, strict=True):
        rows = _compare_task(task, examples, reference, tokenizer, score)
        rows = collect(settings.file, "all", rows)
        yield from (row._replace(what=f"{task.label}: {row.what}") for row in rows)


def _compare_task(
    task: CoreTask, examples: list[Graded], file: Reference, tokenizer: Tokenizer, score: Score
) -> Iterable[Row]:
    accuracy = sum(example.correct for example in examples) / len(examples)
    ours: dict[str, Any] = {
        "accuracy": accuracy,
        "centered": task.centered(accuracy),
        "correct": [example.correct for example in examples],
        "span": [[list(ends) for ends in zip(*e.spans, strict=True)] for e in examples],
        "batch_shape": [[len(e.lengths), max(e.lengths)] for e in examples],
        "span_loss": [example.losses for example in examples],
    }
    theirs = {key: file[key] for key in ("accuracy", "centered") if key in file}
    for key in dict.fromkeys(key for example in file["examples"] for key in example):
        theirs[key] = [example[key] for example in file["examples"]]
    if "mean_loss" in theirs:
        ours["mean_loss"] = _row_losses(task, tokenizer, score)
    for key, value in theirs.items():
        yield file.compare(key, ours.get(key, ABSENT), value, TOLERANCE.get(key, 0.0))
    yield from file.unread()


def _row_losses(task: CoreTask, tokenizer: Tokenizer, score: Score) -> list[list[float]]:
    """Mean loss over the whole rows of each example, padded with BOS to its longest."""
    examples, rows = list(make_candidates(task, tokenizer)), []
    for options in examples:
        longest = max(len(option.ids) for option in options)
        for option in options:
            ids = np.full(longest, tokenizer.bos_id, np.int32)
            ids[: len(option.ids)] = option.ids
            rows.append(Candidate(ids, 1, longest))
    losses = iter(score(rows))
    return [[next(losses)[0] for _ in options] for options in examples]
