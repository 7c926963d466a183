"""Parity of CORE: items that the goldens carry themselves, and a bundle made for the occasion."""

import csv
import json
import math
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, bind
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
    assert len([row for row in rows if not row.compared]) == 8


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


def test_a_model_of_other_sizes_is_a_miss(folder):
    edit(folder, lambda content: content["model_config"].update(n_layer=3))
    assert "names, shapes" in misses(compare_files(folder, FILES))


@pytest.fixture
def data(folder) -> Path:
    """A bundle with one task, and a core.json that says what upstream would find for it."""
    data = folder / "data"
    path = data / "eval_data" / "sea.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (data / "core.yaml").write_text(
        "icl_tasks:\n-\n  label: sea\n  dataset_uri: sea.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: multiple_choice\n"
    )
    with open(data / "eval_meta_data.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Eval Task", "Random baseline"], ["sea", "25"]])
    return data


def naive(folder: Path) -> list[dict]:
    """The first KEPT examples after the shuffle, one by one: all logits, spans by hand."""
    tokenizer = Tokenizer.load(folder)
    arrays = params_from_upstream(dict(np.load(folder / "core_model.npz")))
    params = {path: jnp.asarray(value) for path, value in arrays.items()}
    config = GPTConfig(2048, 2, 32, 4, 4, 1024)
    random.Random(1337).shuffle(items := list(ITEMS))
    examples = []
    for item in items[:KEPT]:
        rows = [tokenizer.encode(f"{item['query']} {c}", bos=True) for c in item["choices"]]
        width, start = max(map(len, rows)), 0
        while len({row[start] if start < len(row) else -1 for row in rows}) == 1:
            start += 1
        padded = np.array([row + [tokenizer.bos_id] * (width - len(row)) for row in rows])
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(bind(config, params)(jnp.asarray(padded, jnp.int32)), np.float64)
        nll = np.log(np.exp(logits).sum(-1))[:, :-1]
        nll -= np.take_along_axis(logits[:, :-1], padded[:, 1:, None], 2)[..., 0]
        ends = [len(row) for row in rows]
        losses = [
            float(nll[i, start - 1 : end - 1].mean()) if end > start else math.nan
            for i, end in enumerate(ends)
        ]
        correct = losses.index(min(losses)) == item["gold"]
        example = {"correct": correct, "batch_shape": list(padded.shape), "span_loss": losses}
        example |= {"mean_loss": nll.mean(1).tolist(), "span": [[start] * len(rows), ends]}
        examples.append(example)
    return examples


def test_tasks_with_data_are_compared_to_the_last_loss(folder, data):
    examples = naive(folder)
    assert any(math.isnan(loss) for example in examples for loss in example["span_loss"])
    accuracy = float(np.float32(sum(example["correct"] for example in examples) / KEPT))
    meta = {"task_type": "multiple_choice", "dataset_uri": "sea.jsonl", "num_fewshot": 0}
    sea = {"meta": meta | {"continuation_delimiter": " "}, "max_per_task": KEPT}
    sea |= {"accuracy": accuracy, "centered": (accuracy - 0.25) / 0.75, "random_baseline": 25.0}
    sea |= {"examples": examples}
    edit(folder, lambda content: content.update(tasks={"sea": sea, "other": sea}))
    rows = compare_files(folder, FILES, data)
    assert not misses(rows)
    compared = {row.what.removeprefix("sea: "): row.compared for row in rows}
    assert compared.pop("names, shapes") > 10
    assert compared == {
        **{"meta": 5, "accuracy": 1, "centered": 1, "correct": 2, "batch_shape": 2, "span": 2},
        **{"mean_loss": 6, "span_loss": 6, "other": 0},
    }

    sea["meta"]["num_fewshot"] = 1
    sea["random_baseline"] = 20
    for example in examples:
        example["mean_loss"][0] += 2e-4
        example["span_loss"] = [0.0 if math.isnan(x) else x for x in example["span_loss"]]
    edit(folder, lambda content: content.update(tasks={"sea": sea}))
    missed = misses(compare_files(folder, FILES, data))
    assert set(missed) == {"sea: meta", "sea: mean_loss", "sea: span_loss"}
    assert missed["sea: meta"].difference == 2
    assert missed["sea: mean_loss"].difference == pytest.approx(2e-4, rel=0.1)
