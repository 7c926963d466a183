import itertools

import jax
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.eval import chat
from nanochat_jax.eval.passk import pass_at_k, pass_at_k_unbiased
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Completion
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.tasks.base import Task, messages
from nanochat_jax.tasks.multiple_choice import ARC, MMLU
from nanochat_jax.tokenizer.chat import render_for_completion
from scripts.bench.infer import generate_greedy

# A context shorter than some prompts, windows and all.
CONFIG = GPTConfig(384, 2, 32, 2, 1, 48, window_pattern="SL", extras=True)


class Listed(Task):
    """`num_problems` examples of a function; `grade` is another."""

    def __init__(self, num_problems, example, kind="generative", grade=None):
        self.num_problems, self.make, self.kind = num_problems, example, kind
        self.grade = grade or self.grade

    def __len__(self):
        return self.num_problems

    def example(self, index):
        return self.make(index)


def quiz(rights, letters="ABCD"):
    """Questions of growing length; every third has two choices only."""

    def example(index):
        asked = messages(f"{index}? {'boat ' * (10 * index)}", rights[index])
        return asked | {"letters": list(letters[: 2 if index % 3 == 0 else 4])}

    return Listed(len(rights), example, "categorical")


def sums(num_problems, padding="", grade=None):
    """What is n + n? The second question may be long."""

    def example(index):
        solution = [{"type": "text", "text": "It is "}, {"type": "python", "text": f"{2 * index}"}]
        return messages(f"{index} + {index}?{padding * (index == 1)}", solution)

    right = grade or (lambda answers: [text == f"#### {2 * index}" for index, text in answers])
    return Listed(num_problems, example, grade=right)


@pytest.fixture(scope="module")
def params(random_params):
    return {path: np.flip(value) for path, value in random_params(CONFIG).items()}  # not all "A"


def test_categorical_is_the_best_letter_of_each_prompt_alone(tiny_tokenizer, params):
    forward = jax.jit(lambda params, ids: bind(CONFIG, params)(ids))
    best = []
    for problem in quiz("A" * 9):
        prompt = render_for_completion(tiny_tokenizer, problem)
        ids = np.zeros((1, 128), np.int32)  # what is to the right is not seen
        ids[0, : len(prompt)] = prompt
        logits = np.asarray(forward(params, ids))[0, len(prompt) - 1]
        best.append(max(problem["letters"], key=lambda x: logits[tiny_tokenizer.encode(x)[0]]))
    assert len(set(best)) > 1 and len(prompt) > CONFIG.seq_len

    task = quiz(best[:6] + ["none of them"] * 3)
    for rows, devices in ((8, jax.devices()), (3, jax.devices()[:1])):
        mesh, seen = make_mesh(devices=devices), {}
        more = {"batch_rows": rows, "progress": seen.__setitem__}
        score = chat.categorical(CONFIG, mesh, params, tiny_tokenizer, task, **more)
        assert (score.num_correct, score.num_problems, score.accuracy) == (6, 9, 6 / 9)
        assert [example["answer"] for example in score.examples] == best[: len(score.examples)]
        assert max(seen) == 9 and set(seen.values()) == {9}


@pytest.mark.parametrize(
    "task, batch_rows, got", [(quiz("AA", ["A", "zq"]), 8, "zq"), (quiz("AA"), 12, "12 rows")]
)
def test_categorical_refuses(task, batch_rows, got, tiny_tokenizer, params):
    """A letter of two tokens, a batch that the devices cannot share."""
    with pytest.raises(UserError, match=got):
        chat.categorical(CONFIG, make_mesh(), params, tiny_tokenizer, task, batch_rows=batch_rows)


class Scripted:
    """An engine whose answers are written down: (problem, sample) -> text."""

    max_len = 60

    def __init__(self, tokenizer, answers, finish="stop"):
        self.tokenizer, self.answers, self.finish = tokenizer, answers, finish

    def generate(self, requests, on_finish):
        self.requests = list(requests)
        seen, completions = {}, []
        for number, request in enumerate(requests):
            text = self.tokenizer.decode(request.prompt)
            problem = int(text.split("<|user_start|>")[1].split(" ")[0])
            sample = seen[problem] = seen.get(problem, -1) + 1
            tokens = self.tokenizer.encode(self.answers(problem, sample))
            tokens += [10_000]  # an id that no text has
            if self.finish == "stop":
                tokens += [self.tokenizer.special_id("<|assistant_end|>")]
            completions.append(Completion(tokens, finish=self.finish))
            on_finish(number, completions[-1])
        return completions


def test_generative_grades_every_sample_and_counts_any_right_one(tiny_tokenizer):
    right, seen = {(0, 0), (2, 1), (2, 2), (3, 2)}, []

    def answer(problem, sample):
        return f"#### {2 * problem}" if (problem, sample) in right else "no"

    def score(progress=lambda *_: None, **changes):
        settings = {"max_new_tokens": 7, "num_samples": 3, "seed": 1} | changes
        return chat.generative(engine, tiny_tokenizer, sums(5), progress=progress, **settings)

    engine = Scripted(tiny_tokenizer, answer)
    found = score(lambda *counts: seen.append(counts), temperature=0.5, top_k=9)
    assert (found.num_correct, found.num_problems) == (3, 5)
    assert found.pass_at_k == [1 / 5, 2 / 5, 3 / 5]
    assert found.ended == {"stop": 15}
    expected = "It is <|python_start|>0<|python_end|>"
    example = {"prompt": "0 + 0?", "answer": "#### 0", "expected": expected, "correct": True}
    assert found.examples[0] == example
    assert seen == [(n, 15) for n in range(1, 16)]
    assert {(r.max_new_tokens, r.temperature, r.top_k) for r in engine.requests} == {(7, 0.5, 9)}

    def seeds(**changes):
        score(**changes)
        return [request.seed for request in engine.requests]

    assert len(set(seeds())) == 15 and not set(seeds()) & set(seeds(seed=2))
    first = seeds()  # a problem's seeds do not depend on what else is asked
    assert seeds(max_problems=2) == first[:6]
    assert seeds(num_samples=1) == first[::3]


def test_generative_counts_a_prompt_that_does_not_fit_as_wrong(tiny_tokenizer, capsys):
    engine = Scripted(tiny_tokenizer, lambda problem, _: f"#### {2 * problem}", "length")
    task = sums(3, "!?" * 40)
    score = chat.generative(engine, tiny_tokenizer, task, max_new_tokens=4, num_samples=2)
    assert (score.num_correct, score.num_problems) == (2, 3)
    assert score.ended == {"length": 4, "too_long": 2}
    assert score.examples[1]["answer"] == ""
    assert "problem 1 counts as wrong" in capsys.readouterr().out


def test_generative_with_the_engine_reads_what_full_forward_passes_say(tiny_tokenizer, params):
    heard = {}

    def grade(answers):
        heard.update(answers)
        return [index == 1 for index, _ in answers]

    stop = tiny_tokenizer.special_id("<|assistant_end|>")
    mesh = make_mesh(devices=jax.devices()[:1])
    engine = Engine(CONFIG, mesh, slots=2, max_len=64, stop_ids={stop})
    engine.load(params)
    score = chat.generative(engine, tiny_tokenizer, sums(3, grade=grade), max_new_tokens=8)
    prompts = [render_for_completion(tiny_tokenizer, problem) for problem in sums(3)]
    naive = generate_greedy(CONFIG, params, prompts, 8)
    naive = [ids[: ids.index(stop)] if stop in ids else ids for ids in naive]
    assert [heard[index] for index in range(3)] == [tiny_tokenizer.decode(ids) for ids in naive]
    assert score.num_correct == 1 and sum(score.ended.values()) == 3
    assert score.ended.get("length", 0) == sum(len(ids) == 8 for ids in naive)


def test_pass_at_k_against_counting():
    correct = np.random.default_rng(3).random((6, 5)) < 0.3
    for k in range(1, 6):
        first = sum(any(row[:k]) for row in correct) / 6
        chosen = [any(row[list(c)]) for row in correct for c in itertools.combinations(range(5), k)]
        assert pass_at_k(correct)[k - 1] == pytest.approx(first)
        assert pass_at_k_unbiased(correct)[k - 1] == pytest.approx(np.mean(chosen))


def test_chatcore_is_what_upstream_published():
    """For d20 after SFT, without spelling."""
    scores = {"arc_challenge": 0.2807, "arc_easy": 0.3876, "gsm8k": 0.0455}
    found = chat.chatcore(scores | {"humaneval": 0.0854, "mmlu": 0.3151})
    assert round(found["chatcore_5"], 4) == 0.0884
    assert found["missing"] == ["spelling_bee"] and "chatcore" not in found


def test_chatcore_of_all_tasks_and_of_few():
    assert {ARC.chance, MMLU.chance} == {chat.CHANCE[n] for n in ("arc_easy", "mmlu")}
    means = ("chatcore", "chatcore_5", "chatcore_cat")
    guessing = chat.chatcore(chat.CHANCE | {"another task": 0.9})
    assert guessing == {**dict.fromkeys(means, 0), "missing": []}
    found = chat.chatcore({"arc_easy": 0.25, "arc_challenge": 1.0, "mmlu": 0.625})
    assert found == {"chatcore_cat": 0.5, "missing": ["gsm8k", "humaneval", "spelling_bee"]}
