"""Parity of CORE: core_model.npz and core.json of a folder, on the tasks' own data.

Verdict by verdict and span by span: examples are rendered, tokenised and scored as an evaluation
does it, all tasks in shared batches. `mean_loss` is that of whole rows, padded with BOS as upstream
pads them; as that needs no more than a longer row and a longer span, it is scored the same way. A
task that carries its own items needs no data; the others are listed as not compared without it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.config import load
from nanochat_jax.eval.core import Graded, grade
from nanochat_jax.eval.core_bundle import CoreTask, read_tasks
from nanochat_jax.eval.core_prompts import make_rows
from nanochat_jax.eval.core_score import Row as Scored
from nanochat_jax.eval.core_score import score_rows
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.parity.case import RECIPES, SIZES, exact_arithmetic
from nanochat_jax.parity.reference import (
    Reference,
    close_row,
    exact_row,
    guarded,
    read_arrays,
    read_settings,
)
from nanochat_jax.parity.rows import Row, not_comparable
from nanochat_jax.recipe import gpt_config
from nanochat_jax.tokenizer.bpe import Tokenizer

MODEL_FILE, FILE = FILES = ("core_model.npz", "core.json")
TOLERANCE = 1e-4  # losses
ACCURACY_TOLERANCE = 1e-6  # verdicts may be averaged in float32
BATCH: dict[str, Any] = {"device_batch_tokens": 8_192, "tile_tokens": 512}
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


@dataclass(frozen=True)
class CoreCase:
    config: GPTConfig
    mesh: Mesh
    params: dict[str, jax.Array]
    tokenizer: Tokenizer
    settings: Reference


def compare_core(folder: Path, data: Path | None) -> list[Row]:
    """Rows for everything in the two files; `data` is a folder like the evaluation bundle."""
    with exact_arithmetic():
        try:
            case = _read_case(Path(folder))
        except (UserError, LookupError, TypeError, ValueError, AssertionError) as error:
            return [not_comparable(MODEL_FILE, "all", str(error.args[0] if error.args else error))]
        shapes = {path: leaf.shape for path, leaf in param_shapes(case.config).items()}
        reference = {path: value.shape for path, value in case.params.items()}
        rows = [exact_row(MODEL_FILE, "names, shapes", shapes, reference)]
        if not rows[0].ok:
            return rows
        rows += guarded(FILE, "tasks", lambda: _compare_tasks(case, data))
    if "note" in case.settings:
        case.settings.take("note")
    return rows + case.settings.leftovers()


def _read_case(folder: Path) -> CoreCase:
    settings = read_settings(folder / FILE)
    overrides = {"model.compute_dtype": "float32"}
    for theirs, ours in SIZES.items():
        if theirs != "window_pattern" or f"model_config.{theirs}" in settings:  # classic has none
            overrides[ours] = str(settings.take(f"model_config.{theirs}")).upper()
    params = params_from_upstream(read_arrays(folder / MODEL_FILE).under(""))
    return CoreCase(
        config=gpt_config(load(RECIPES["classic"], overrides)),
        mesh=make_mesh(devices=jax.devices()[:1]),
        params={path: jnp.asarray(value, jnp.float32) for path, value in params.items()},
        tokenizer=Tokenizer.load(folder),
        settings=settings,
    )


def _compare_tasks(case: CoreCase, data: Path | None) -> Iterable[Row]:
    labels = dict.fromkeys(match[1] for match in case.settings.matching(r"tasks\.([^.]+)\..+"))
    if not labels:
        raise KeyError("tasks is missing")
    bundle = {task.label: task for task in read_tasks(data) if task.items} if data else {}
    where = f"no examples in {data}" if data else "it needs data: --core-data=DIR"
    tasks, references = [], []
    for label in labels:
        reference = Reference(FILE, case.settings.under(f"tasks.{label}."))
        if "items" in reference:
            tasks.append(_task_with_items(label, reference))
        elif label in bundle:
            tasks.append(bundle[label])
            yield _meta_row(bundle[label], reference)
            keep = reference.take("max_per_task")
            if keep > 0:
                tasks[-1] = replace(bundle[label], items=bundle[label].items[:keep])
        else:
            yield Row(FILE, label, 0, 0.0, 0.0, f"not compared: {where}")
            continue
        references.append(reference)
    graded = grade(case.config, case.mesh, case.params, case.tokenizer, tasks, **BATCH)
    for task, examples, reference in zip(tasks, graded, references, strict=True):
        compare = partial(_compare_task, case, task, examples, reference)
        yield from guarded(FILE, task.label, compare)


def _task_with_items(label: str, reference: Reference) -> CoreTask:
    """A task whose examples are in the reference itself, in order."""
    items, meta = reference.take("items"), reference.under("meta.")
    given = {META[key]: value for key, value in meta.items()}
    defaults = {"uri": "", "num_shots": 0, "delimiter": " ", "baseline": 0.0}
    return CoreTask(**defaults | given, label=label, items=items, num_available=len(items))


def _meta_row(task: CoreTask, reference: Reference) -> Row:
    theirs = {META.get(key, key): value for key, value in reference.under("meta.").items()}
    theirs["baseline"] = reference.take("random_baseline")
    ours = {key: getattr(task, key, None) for key in theirs}
    return exact_row(FILE, f"{task.label}: meta", ours, theirs)


def _compare_task(
    case: CoreCase, task: CoreTask, examples: list[Graded], reference: Reference
) -> Iterable[Row]:
    accuracy = sum(example.correct for example in examples) / len(examples)
    for key, value in (("accuracy", accuracy), ("centered", task.centered(accuracy))):
        if key in reference:
            what = f"{task.label}: {key}"
            yield close_row(FILE, what, value, reference.take(key), ACCURACY_TOLERANCE)
    theirs = reference.take("examples")
    for key in dict.fromkeys(key for example in theirs for key in example):
        what, values = f"{task.label}: {key}", [example[key] for example in theirs]
        if key in EXACT:
            yield exact_row(FILE, what, [EXACT[key](example) for example in examples], values)
        elif key in ("span_loss", "mean_loss"):
            losses = _row_losses(case, task) if key == "mean_loss" else [e.losses for e in examples]
            yield close_row(FILE, what, _numbered(losses), _numbered(values), TOLERANCE)
        else:
            yield not_comparable(FILE, what)
    yield from (row._replace(what=f"{task.label}: {row.what}") for row in reference.leftovers())


def _numbered(losses: list[list[float]]) -> dict[str, np.ndarray]:
    """An empty span has no loss: nan here and there is no difference, nan on one side is."""
    return {f"example {i}": np.nan_to_num(row, nan=-1.0) for i, row in enumerate(losses)}


def _row_losses(case: CoreCase, task: CoreTask) -> list[list[float]]:
    """Mean loss over the whole rows of each example, padded with BOS to its longest."""
    rows, counts = [], []
    for options in make_rows(task, case.tokenizer):
        longest = max(len(row.ids) for row in options)
        for row in options:
            padding = (0, longest - len(row.ids))
            ids = np.pad(row.ids, padding, constant_values=case.tokenizer.bos_id)
            rows.append(Scored(ids, 1, longest))
        counts.append(len(options))
    losses = np.zeros(len(rows))
    for places, means, _ in score_rows(case.config, case.mesh, case.params, rows, **BATCH):
        losses[places] = means
    return [part.tolist() for part in np.split(losses, np.cumsum(counts)[:-1])]
