"""CORE against the protocol written out: one example after the other, whole rows, all logits."""

import json
import math
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.eval import core
from nanochat_jax.eval.core_score import score_candidates
from nanochat_jax.eval.core_tasks import (
    KINDS,
    CoreTask,
    make_candidates,
    read_tasks,
    to_example,
)
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.tokenizer.bpe import Tokenizer

# Rows longer than seq_len are among the examples below.
CONFIG = GPTConfig(
    vocab_size=2048, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=4, seq_len=32
)
CHOICES = [
    {"query": "Question: What swims?", "choices": [" A cat", " A fish", " A stone"], "gold": 1},
    {"query": "Question: What is 7 + 5?", "choices": ["12", "123", "12.5"], "gold": 0},
    {"query": "Question: Which is red?", "choices": ["the sky", "blood", "blood"], "gold": 2},
    {"query": "Question: Where is Paris? " * 4, "choices": ["France", "In the north"], "gold": 0},
    {"query": "", "choices": ["up", "down"], "gold": 1},
]
SCHEMAS = [
    {"context_options": ["The boy", "The boys"], "continuation": "was late for school.", "gold": 0},
    {"context_options": ["Ann gave Eve", "Ann had from Eve"], "continuation": "a key", "gold": 1},
    {"context_options": ["It rained", "It has rained"], "continuation": "on us all day", "gold": 1},
    {"context_options": ["same", "same"], "continuation": "as before", "gold": 0},
]
TEXTS = [
    {"context": "The captain looked at the sea and said ", "continuation": "that he was late"},
    {"context": "  One, two,", "continuation": "three"},
    {"context": "Water boils at\n", "continuation": "100 degrees, and freezes at 0"},
]
OWN = {  # label: (kind, shots, delimiter, examples)
    "choices": ("multiple_choice", 2, "\nAnswer: ", CHOICES),
    "bare": ("multiple_choice", 0, " ", CHOICES),
    "schemas": ("schema", 0, " ", SCHEMAS),
    "schemas_shot": ("schema", 1, " ", SCHEMAS),
    "texts": ("language_modeling", 2, " ", TEXTS),
}


def make_task(label, kind, shots, delimiter, items) -> CoreTask:
    examples = [to_example(kind, item) for item in items]
    return CoreTask(label, kind, "", shots, delimiter, 0.0, examples, len(items))


def tasks() -> list[CoreTask]:
    return [make_task(label, *of_task) for label, of_task in OWN.items()]


@pytest.fixture(scope="module")
def tokenizer(goldens) -> Tokenizer:
    return Tokenizer.load(goldens)


@pytest.fixture(scope="module")
def params(goldens) -> dict[str, jax.Array]:
    arrays = params_from_upstream(dict(np.load(goldens / "core_model.npz")))
    return {path: jnp.asarray(value) for path, value in arrays.items()}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def naive_prompts(label: str, index: int) -> list[str]:
    kind, shots, delimiter, items = OWN[label]

    def texts(item) -> list[str]:
        if kind == "multiple_choice":
            return [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
        if kind == "schema":
            options = item["context_options"]
            return [f"{option}{delimiter}{item['continuation']}" for option in options]
        return [f"{item['context'].strip()}{delimiter}{item['continuation']}"]

    others = [item for i, item in enumerate(items) if i != index]
    drawn = random.Random(1234 + index).sample(others, shots)
    before = "".join(f"{texts(shot)[shot.get('gold', 0)]}\n\n" for shot in drawn)
    whole = [before + text for text in texts(items[index])]
    if kind == "language_modeling":
        return [f"{before}{items[index]['context'].strip()}{delimiter}".strip(), *whole]
    return whole


def naive_spans(kind: str, rows: list[list[int]]) -> list[tuple[list[int], int, int]]:
    if kind == "language_modeling":
        alone, whole = rows
        assert whole[: len(alone)] == alone
        return [(whole, len(alone), len(whole))]
    shared = 0
    step = [row[::-1] for row in rows] if kind == "schema" else rows
    while all(shared < len(row) for row in step) and len({row[shared] for row in step}) == 1:
        shared += 1
    if kind == "schema":
        return [(row, len(row) - shared, len(row)) for row in rows]
    return [(row, shared, len(row)) for row in rows]


def naive_verdict(forward, tokenizer: Tokenizer, task: CoreTask, index: int):
    """(verdict, spans, losses), each row on its own and unpadded."""
    tokens = [tokenizer.encode(text, bos=True) for text in naive_prompts(task.label, index)]
    losses, hits, spans = [], [], []
    for row, start, end in naive_spans(task.kind, tokens):
        logits = np.asarray(forward(row), np.float64)[: len(row)]
        nll = np.log(np.sum(np.exp(logits[:-1]), axis=-1)) - logits[range(len(row) - 1), row[1:]]
        span = nll[max(start - 1, 0) : end - 1] if start else nll[:0]
        losses.append(span.mean() if len(span) else math.nan)
        hits.append(logits[start - 1 : end - 1].argmax(axis=-1).tolist() == row[start:end])
        spans.append((start, end))
    if task.kind == "language_modeling":
        return hits[0], spans, losses
    return losses.index(min(losses)) == task.items[index].gold, spans, losses


@pytest.fixture(scope="module")
def naive(tokenizer, params):
    """{label: what each example must come to}."""
    whole = jax.jit(lambda ids: bind(CONFIG, params)(ids))

    def forward(row):
        ids = np.zeros((1, 160), np.int32)  # one shape to compile; the future is not seen
        ids[0, : len(row)] = row
        return whole(ids)[0]

    with jax.default_matmul_precision("highest"):
        return {
            task.label: [naive_verdict(forward, tokenizer, task, i) for i in range(len(task.items))]
            for task in tasks()
        }


@pytest.mark.parametrize(
    "batch_tokens, tile_tokens, axes",
    [(64, 3, {"devices": 1}), (128, 64, {"devices": 8, "fsdp": 2, "tensor": 2})],
)
def test_shared_batches_give_the_verdicts_of_one_by_one(
    tokenizer, params, naive, batch_tokens, tile_tokens, axes
):
    axes = axes | {"devices": jax.devices()[: axes["devices"]]}
    sizes = {"device_batch_tokens": batch_tokens, "tile_tokens": tile_tokens}
    score = partial(score_candidates, CONFIG, make_mesh(**axes), params, **sizes)
    graded = core.grade(tasks(), tokenizer, score)
    for task, examples in zip(tasks(), graded, strict=True):
        for example, (correct, spans, losses) in zip(examples, naive[task.label], strict=True):
            assert (example.correct, example.spans) == (correct, spans)
            np.testing.assert_allclose(example.losses, losses, atol=1e-5)
    assert max(length for e in graded[0] for length in e.lengths) > 2 * CONFIG.seq_len

    verdicts = {correct for examples in naive.values() for correct, _, _ in examples}
    assert verdicts == {True, False}  # the examples show both, and empty spans
    assert any(math.isnan(loss) for _, _, losses in naive["bare"] for loss in losses)


CHOICE, _, TEXT = KINDS


def test_a_continuation_that_merges_with_the_prompt_is_scored_from_that_token(tokenizer):
    def candidates(continuation):
        item = {"context": "The cap", "continuation": continuation}
        return list(make_candidates(make_task("t", TEXT, 0, "", [item]), tokenizer))

    (((ids, start, _),),) = candidates("tain")
    scored = tokenizer.decode(ids[start:].tolist())
    assert scored.endswith("tain") and "The captain".endswith(scored) and start > 0
    with pytest.raises(UserError):
        candidates("")


def test_of_equal_options_the_first_is_chosen(tokenizer, params, mesh):
    score = partial(score_candidates, CONFIG, mesh, params, device_batch_tokens=128, tile_tokens=16)

    def verdicts(choices):
        items = [{"query": "Well", "choices": choices, "gold": g} for g in range(len(choices))]
        (graded,) = core.grade([make_task("t", CHOICE, 0, " ", items)], tokenizer, score)
        return [example.correct for example in graded]

    assert verdicts(["so", "so"]) == [True, False]
    three = verdicts(["so", "no", "so"])
    assert three in ([True, False, False], [False, True, False])
    # The span of "now" is empty, its loss nan: chosen where it comes first, as `min` has it.
    assert verdicts(["now", "now or never"]) == [True, False]
    assert verdicts(["now or never", "now"]) == [True, False]


@pytest.fixture
def bundle(tmp_path):
    listed, table = [], "Eval Task,#datapoints,Random baseline,Description\n"
    for i, (label, (kind, shots, delimiter, items)) in enumerate(OWN.items()):
        listed.append({"label": label, "dataset_uri": f"some/{label}.jsonl"})
        listed[-1] |= {"num_fewshot": [shots], "icl_task_type": kind}
        listed[-1] |= {} if delimiter == " " else {"continuation_delimiter": delimiter}
        table += f'{label},9,{10 * i},"with, ""signs"""\n'
        path = tmp_path / "eval_data" / "some" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listed}))
    (tmp_path / "eval_meta_data.csv").write_text(table)
    return tmp_path


def test_a_bundle_is_read_as_it_lies(bundle):
    read = read_tasks(bundle)
    assert [task.label for task in read] == list(OWN)
    for i, task in enumerate(read):
        kind, shots, delimiter, items = OWN[task.label]
        random.Random(1337).shuffle(items := list(items))
        assert (task.kind, task.num_shots, task.delimiter) == (kind, shots, delimiter)
        assert task.items == [to_example(kind, item) for item in items]
        assert task.baseline == 10 * i
    assert [len(task.items) for task in read_tasks(bundle, 3)] == [3, 3, 3, 3, 3]
    assert read_tasks(bundle, 3)[0].items == read[0].items[:3]
    assert read_tasks(bundle, 3)[0].num_available == 5


def run(bundle, params, tokenizer, mesh, **more):
    sizes = {"device_batch_tokens": 400, "tile_tokens": 100}
    return core.evaluate(CONFIG, mesh, params, tokenizer, bundle, **sizes, **more)


def test_core_is_the_mean_of_centred_scores(bundle, params, tokenizer, mesh, naive):
    seen, whole = [], {label: len(items) for label, (*_, items) in OWN.items()}
    more = {"num_examples": whole, "progress": lambda *done: seen.append(done)}
    result = run(bundle, params, tokenizer, mesh, **more)
    assert seen[-1][0] == seen[-1][1] and sorted(seen) == seen
    # Without shots the verdicts do not depend on the order, which the bundle shuffles.
    for label in ("bare", "schemas"):
        accuracy = np.mean([correct for correct, _, _ in naive[label]])
        assert result["tasks"][label]["accuracy"] == pytest.approx(accuracy)
    scores = list(result["tasks"].values())
    for i, score in enumerate(scores):
        assert score["centered"] == pytest.approx((score["accuracy"] - i / 10) / (1 - i / 10))
    assert result["core"] == pytest.approx(np.mean([score["centered"] for score in scores]))
    assert "core_partial" not in result and result["missing"] == [] and result["partial"] == {}
    assert sum(score["secs"] for score in scores) == pytest.approx(result["secs"])
    assert json.loads(json.dumps(result)) == result


def test_part_of_the_tasks_is_not_core(bundle, params, tokenizer, mesh):
    wanted = {label: len(items) for label, (*_, items) in OWN.items()} | {"coqa": 7, "bare": 6}
    (bundle / "eval_data" / "some" / "schemas.jsonl").unlink()
    result = run(bundle, params, tokenizer, mesh, max_per_task=3, num_examples=wanted)
    assert result["missing"] == ["schemas", "coqa"] and result["partial"] == {"bare": "5 of 6"}
    scores = result["tasks"].values()
    assert result["core_partial"] == pytest.approx(np.mean([s["centered"] for s in scores]))
    assert "core" not in result and [score["num_examples"] for score in scores] == [3] * 4


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("core.yaml", "type: schema", "type: riddle", "riddle"),
        ("core.yaml", "num_fewshot", "shots", "num_fewshot"),
        ("core.yaml", "- 2", "- 5", "choices"),
        ("eval_meta_data.csv", "Random", "Rnd", "eval_meta_data.csv"),
        ("eval_data/some/texts.jsonl", '"continuation"', '"end"', "texts.jsonl:1"),
        ("eval_data/some/choices.jsonl", '"gold": 1', '"gold": 3', "choices.jsonl:1"),
        ("eval_data/some/schemas.jsonl", "}\n", "\n", "schemas.jsonl:1"),
    ],
)
def test_a_broken_bundle_is_said_in_one_line(bundle, name, old, new, said):
    (bundle / name).write_text((bundle / name).read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        read_tasks(bundle)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_bundle_without_examples_is_refused(bundle, params, tokenizer, mesh):
    for path in (bundle / "eval_data" / "some").iterdir():
        path.unlink()
    with pytest.raises(UserError):
        run(bundle, params, tokenizer, mesh)
