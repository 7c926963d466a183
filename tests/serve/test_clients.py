"""Other people's clients, as they come: langchain-openai and lm-evaluation-harness."""

import json

import jax
import numpy as np
import pytest

from nanochat_jax.eval.core_score import Candidate, score_candidates

pytestmark = pytest.mark.slow
WORDS = ["boat", "river", "mill", "winter", "seven", "daughter"]
QUESTIONS = [
    (f"The {a} of the {b} is", [f" {c}" for c in WORDS[:3]], n % 3)
    for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:4] if a != b)
]


def test_langchain(scripted):
    langchain = pytest.importorskip("langchain_openai", reason="in the extra `clients`")
    model = langchain.ChatOpenAI(
        model=scripted.model, base_url=f"{scripted.url}/v1", api_key="none", max_tokens=50
    )
    answer = model.invoke("some words")
    assert answer.content == "some words"
    assert answer.usage_metadata["output_tokens"] == 11
    pieces = list(model.stream("some words"))
    assert "".join(piece.content for piece in pieces) == "some words"


def harness(tmp_path, kind, url, task, **model_args):
    evaluator = pytest.importorskip("lm_eval", reason="in the extra `clients`")
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "local_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **task,
    }
    (tmp_path / "local_task.yaml").write_text(json.dumps(config))  # JSON is YAML
    path = "chat/completions" if "chat" in kind else "completions"
    args = {"model": "test-sft", "base_url": f"{url}/v1/{path}", "num_concurrent": 2} | model_args
    return evaluator.simple_evaluate(
        kind,
        model_args=args,
        tasks=["local_task"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template="chat" in kind,
        log_samples=True,
        bootstrap_iters=0,
    )


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_choices_as_our_own_evaluation(tmp_path, real, tiny_model, tiny_tokenizer):
    task = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    found = harness(tmp_path, "local-completions", real.url, task, batch_size=4)
    samples = sorted(found["samples"]["local_task"], key=lambda sample: sample["doc_id"])
    candidates = []
    for question, choices, _ in QUESTIONS:
        begin = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode(question)]
        for choice in choices:
            whole = tiny_tokenizer.encode(question + choice)
            ids = np.array([tiny_tokenizer.bos_id, *whole], np.int32)
            candidates.append(Candidate(ids, len(begin), len(ids)))
    config, mesh, params = tiny_model
    with jax.set_mesh(mesh):
        scores = score_candidates(
            config, mesh, params, candidates, device_batch_tokens=1024, tile_tokens=1024
        )
    sums = [
        -loss * (candidate.end - candidate.start)
        for (loss, _), candidate in zip(scores, candidates, strict=True)
    ]
    theirs = [float(pair[0]) for sample in samples for pair in sample["filtered_resps"]]
    np.testing.assert_allclose(theirs, sums, atol=2e-3)
    hits = [pair[1] in (True, "True") for sample in samples for pair in sample["filtered_resps"]]
    assert hits == [hit for _, hit in scores]
    best = np.array(sums).reshape(-1, 3).argmax(axis=1)
    right = np.mean([b == answer for b, (_, _, answer) in zip(best, QUESTIONS, strict=True)])
    assert found["results"]["local_task"]["acc,none"] == right


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_reads_chat_answers(tmp_path, scripted):
    """The engine repeats the question; half of the answers are right up to a stop string."""
    task = {
        "output_type": "generate_until",
        "doc_to_target": "{{'The' if answer == 0 else 'no'}}",
        "generation_kwargs": {"until": [" ", "\n", "~", "|", "x"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = harness(tmp_path, "local-chat-completions", scripted.url, task)
    right = np.mean([answer == 0 for _, _, answer in QUESTIONS])
    assert found["results"]["local_task"]["exact_match,none"] == right
