"""Parity of CORE: items that the goldens carry themselves, and a bundle made for the occasion."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.eval.core import grade
from nanochat_jax.eval.core_score import score_candidates
from nanochat_jax.eval.core_tasks import read_tasks
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.parity.folder import compare_files
from nanochat_jax.parity.reference import Row
from nanochat_jax.tokenizer.bpe import Tokenizer

FILES = ("core_model.npz", "core.json")
ITEMS = [
    {"query": "The sea is", "choices": ["deep", "a", "a deep"], "gold": 0},
    {"query": "Boats", "choices": ["float", "float up", "float on"], "gold": 1},
    {"query": "1, 2,", "choices": ["12", "123", "12.5"], "gold": 2},
]
KEPT = 2


def misses(rows: list[Row]) -> dict[str, Row]:
    return {row.what: row for row in rows if not row.ok}


@pytest.fixture
def folder(goldens, tmp_path) -> Path:
    for name in (*FILES, "tokenizer.json"):
        shutil.copyfile(goldens / name, tmp_path / name)
    return tmp_path


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "core.json").read_text())
    change(content)
    (folder / "core.json").write_text(json.dumps(content))


def test_without_data_the_goldens_own_items_are_compared(goldens):
    rows = compare_files(goldens, FILES)
    compared = {row.what: row.compared for row in rows if row.compared}
    assert compared.pop("names, shapes") > 10
    assert compared == {"lm_own_items: correct": 40, "lm_own_items: span": 40}
    assert not misses(rows)


def test_each_change_is_a_miss_that_is_named(folder):
    def change(content):
        own = content["tasks"]["lm_own_items"]
        own["examples"][3]["correct"] = True
        own["examples"][5]["span"][1][0] += 1
        own["examples"] = [example | {"score": 1} for example in own["examples"]]
        own["new"] = 1
        content["more"] = 2

    edit(folder, change)
    missed = misses(compare_files(folder, FILES))
    own = "lm_own_items: "
    assert set(missed) == {own + "correct", own + "span", own + "score", own + "new", "more"}
    assert missed[own + "correct"].note == "3: got False, reference True"
    assert missed[own + "span"].difference == 1


def test_tasks_with_data_are_compared_to_the_last_loss(folder):
    """A bundle of one task, and a core.json with what tests/eval shows to be right for it."""
    path = folder / "data" / "eval_data" / "sea.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    data = folder / "data"
    (data / "core.yaml").write_text(
        "icl_tasks:\n-\n  label: sea\n  dataset_uri: sea.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: multiple_choice\n"
    )
    (data / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsea,25\n")
    arrays = params_from_upstream(dict(np.load(folder / "core_model.npz")))
    params = {path: jnp.asarray(value) for path, value in arrays.items()}
    model = GPTConfig(2048, 2, 32, 4, 4, 1024), make_mesh(devices=jax.devices()[:1]), params
    score = partial(score_candidates, *model, device_batch_tokens=256, tile_tokens=16)
    (graded,) = grade(read_tasks(data, KEPT), Tokenizer.load(folder), score)
    assert any(math.isnan(loss) for example in graded for loss in example.losses)
    examples = [
        {
            "correct": example.correct,
            "batch_shape": [len(example.lengths), max(example.lengths)],
            "span": [list(ends) for ends in zip(*example.spans, strict=True)],
            "span_loss": example.losses,
        }
        for example in graded
    ]
    accuracy = sum(example.correct for example in graded) / KEPT
    meta = {"task_type": "multiple_choice", "dataset_uri": "sea.jsonl", "num_fewshot": 0}
    sea = {"meta": meta | {"continuation_delimiter": " "}, "max_per_task": KEPT}
    sea |= {"accuracy": accuracy, "centered": (accuracy - 0.25) / 0.75, "random_baseline": 25.0}
    edit(folder, lambda content: content.update(tasks={"sea": sea | {"examples": examples}}))
    rows = compare_files(folder, FILES, data)
    compared = {row.what for row in rows if row.compared and row.what.startswith("sea: ")}
    assert compared == {f"sea: {key}" for key in ("meta", "accuracy", "centered", *examples[0])}
    assert not misses(rows)

    sea["random_baseline"] = 20
    for example in examples:
        example["span_loss"] = [0.0 if math.isnan(x) else x + 2e-4 for x in example["span_loss"]]
    edit(folder, lambda content: content.update(tasks={"sea": sea | {"examples": examples}}))
    assert set(misses(compare_files(folder, FILES, data))) == {"sea: meta", "sea: span_loss"}
