"""Parity of CORE: core_model.npz and core.json of a folder, on the tasks' own data.

Verdict by verdict and span by span: examples are rendered, tokenised and scored as an evaluation
does it, all tasks in shared batches. `mean_loss` is that of whole rows, padded with BOS as upstream
pads them; as that needs no more than a longer text and a longer span, it is scored the same way. A
task that carries its own items needs no data; the others are listed as not compared without it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.eval.core import Graded, Score, grade
from nanochat_jax.eval.core_bundle import CoreTask, read_tasks, to_example
from nanochat_jax.eval.core_prompts import make_candidates
from nanochat_jax.eval.core_score import Candidate, score_candidates
from nanochat_jax.parity.case import read_case
from nanochat_jax.parity.reference import Comparison, Reference, collect, miss
from nanochat_jax.tokenizer.bpe import Tokenizer

TOLERANCE = 1e-4  # losses
ACCURACY_TOLERANCE = 1e-6  # verdicts may be averaged in float32
BATCH = {"device_batch_tokens": 8_192, "tile_tokens": 512}
META = {  # the reference's word: ours
    "task_type": "kind",
    "dataset_uri": "uri",
    "num_fewshot": "num_shots",
    "continuation_delimiter": "delimiter",
}
EXACT: dict[str, Callable[[Graded], Any]] = {  # of an example; lists as JSON has them
    "correct": lambda example: example.correct,
    "span": lambda example: [list(ends) for ends in zip(*example.spans, strict=True)],
    "batch_shape": lambda example: [len(example.lengths), max(example.lengths)],
}


def compare_core(
    folder: Path, arrays: Reference, settings: Reference, data: Path | None
) -> Iterable[Comparison]:
    """data: a folder like the evaluation bundle."""
    case = read_case(arrays, settings, "classic", weights="", sizes="model_config.")
    row = case.compare_shapes("names, shapes")
    yield row
    if not row.ok:
        return
    if "note" in settings:
        settings.take("note")
    score = partial(score_candidates, case.config, case.mesh, case.params, **BATCH)
    tokenizer = Tokenizer.load(folder)
    labels = dict.fromkeys(match[1] for match in settings.matching(r"tasks\.([^.]+)\..+"))
    if not labels:
        raise KeyError("tasks is missing")
    bundle = {task.label: task for task in read_tasks(data) if task.items} if data else {}
    where = f"no examples in {data}" if data else "it needs data: --core-data=DIR"
    tasks, references = [], []
    for label in labels:
        reference = Reference(settings.file, settings.under(f"tasks.{label}."))
        meta = {META.get(key, key): value for key, value in reference.under("meta.").items()}
        if "items" in reference:
            items = [to_example(meta["kind"], item) for item in reference.take("items")]
            given = {"uri": "", "num_shots": 0, "delimiter": " ", "baseline": 0.0} | meta
            tasks.append(CoreTask(**given, label=label, items=items, num_available=len(items)))
        elif label in bundle:
            task, keep = bundle[label], reference.take("max_per_task")
            meta["baseline"] = reference.take("random_baseline")
            ours = {key: getattr(task, key, None) for key in meta}
            yield settings.compare(f"{label}: meta", ours, meta)
            tasks.append(replace(task, items=task.items[:keep]) if keep > 0 else task)
        else:
            yield Comparison(settings.file, label, 0, 0.0, 0.0, f"not compared: {where}")
            continue
        references.append(reference)
    graded = grade(tasks, tokenizer, score)
    for task, examples, reference in zip(tasks, graded, references, strict=True):
        rows = _compare_task(
            task, examples, reference, partial(_row_losses, task, tokenizer, score)
        )
        rows = collect(settings.file, "all", rows)
        yield from (row._replace(what=f"{task.label}: {row.what}") for row in rows)


def _compare_task(
    task: CoreTask, examples: list[Graded], reference: Reference, row_losses: Callable
) -> Iterable[Comparison]:
    accuracy = sum(example.correct for example in examples) / len(examples)
    for key, ours in (("accuracy", accuracy), ("centered", task.centered(accuracy))):
        if key in reference:
            yield reference.compare(key, ours, reference.take(key), ACCURACY_TOLERANCE)
    theirs = reference.take("examples")
    for key in dict.fromkeys(key for example in theirs for key in example):
        values = [example[key] for example in theirs]
        if key in EXACT:
            yield reference.compare(key, [EXACT[key](example) for example in examples], values)
        elif key in ("span_loss", "mean_loss"):
            ours = row_losses() if key == "mean_loss" else [e.losses for e in examples]
            yield reference.compare(key, _without_nan(ours), _without_nan(values), TOLERANCE)
        else:
            yield miss(reference.file, key)
    yield from reference.leftovers()


def _without_nan(losses: list[list[float]]) -> list[np.ndarray]:
    """An empty span has no loss: nan on both sides is no difference, nan on one side is."""
    return [np.nan_to_num(row, nan=-1.0) for row in losses]


def _row_losses(task: CoreTask, tokenizer: Tokenizer, score: Score) -> list[list[float]]:
    """Mean loss over the whole rows of each example, padded with BOS to its longest."""
    rows, counts = [], []
    for options in make_candidates(task, tokenizer):
        longest = max(len(option.ids) for option in options)
        for option in options:
            padding = (0, longest - len(option.ids))
            ids = np.pad(option.ids, padding, constant_values=tokenizer.bos_id)
            rows.append(Candidate(ids, 1, longest))
        counts.append(len(options))
    losses = [loss for loss, _ in score(rows)]
    return [part.tolist() for part in np.split(np.array(losses), np.cumsum(counts)[:-1])]
