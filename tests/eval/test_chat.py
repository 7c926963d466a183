import itertools

import jax
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.eval import chat
from nanochat_jax.eval.passk import pass_at_k, pass_at_k_unbiased
from nanochat_jax.inference.engine import Completion, Engine
from nanochat_jax.inference.naive import generate_greedy
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.multiple_choice import ARC, MMLU
from nanochat_jax.tokenizer.chat import render_for_completion

CONFIG = GPTConfig(  # contexts shorter than some prompts, windows and all
    vocab_size=384,
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    seq_len=48,
    window_pattern="SL",
    extras=True,
)
LETTERS = "ABCD"


class Quiz(Task):
    """Questions of growing length; every third has two choices only."""

    kind = "categorical"

    def __init__(self, num_problems, rights):
        self.num_problems, self.rights = num_problems, rights

    def __len__(self):
        return self.num_problems

    def example(self, index):
        letters = LETTERS[: 2 if index % 3 == 0 else 4]
        messages = [
            {"role": "user", "content": f"{index}? {'boat ' * (10 * index)}"},
            {"role": "assistant", "content": self.rights[index]},
        ]
        return {"messages": messages, "letters": list(letters)}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    scale = {"table": 1.0, "lambdas": 1.0, "lambda": 0.3}
    return {
        path: rng.standard_normal(leaf.shape, np.float32)
        * np.float32(scale.get(path.rpartition(".")[2], leaf.shape[0] ** -0.5))
        for path, leaf in param_shapes(CONFIG).items()
    }


def test_categorical_is_the_best_letter_of_each_prompt_alone(tiny_tokenizer, params):
    quiz = Quiz(9, "A" * 9)
    forward = jax.jit(lambda params, ids: bind(CONFIG, params)(ids))
    best = []
    for problem in quiz:
        prompt = render_for_completion(tiny_tokenizer, problem)
        ids = np.zeros((1, 128), np.int32)  # what is to the right is not seen
        ids[0, : len(prompt)] = prompt
        logits = np.asarray(forward(params, ids))[0, len(prompt) - 1]
        best.append(max(problem["letters"], key=lambda x: logits[tiny_tokenizer.encode(x)[0]]))
    assert len(set(best)) > 1 and len(prompt) > CONFIG.seq_len

    quiz = Quiz(9, best[:6] + ["none of them"] * 3)
    for batch_rows, devices in ((8, jax.devices()), (3, jax.devices()[:1])):
        seen = []
        score = chat.categorical(
            CONFIG,
            make_mesh(devices=devices),
            params,
            tiny_tokenizer,
            quiz,
            batch_rows=batch_rows,
            progress=lambda done, total: seen.append((done, total)),  # noqa: B023
        )
        assert (score.num_correct, score.num_problems, score.accuracy) == (6, 9, 6 / 9)
        assert [example["answer"] for example in score.examples] == best[: len(score.examples)]
        assert seen[-1] == (9, 9) and seen == sorted(set(seen))


def test_categorical_refuses_letters_of_two_tokens_and_uneven_batches(tiny_tokenizer, params):
    class Words(Quiz):
        def example(self, index):
            return super().example(index) | {"letters": ["A", "zq"]}

    mesh = make_mesh()
    with pytest.raises(UserError, match="'zq' is 2 tokens .* expected 1"):
        chat.categorical(CONFIG, mesh, params, tiny_tokenizer, Words(2, "AA"), batch_rows=8)
    with pytest.raises(UserError, match="got 12 rows, expected a multiple of the 8"):
        chat.categorical(CONFIG, mesh, params, tiny_tokenizer, Quiz(2, "AA"), batch_rows=12)


class Sums(Task):
    """What is n + n?"""

    kind = "generative"

    def __init__(self, num_problems, padding=""):
        self.num_problems, self.padding = num_problems, padding

    def __len__(self):
        return self.num_problems

    def example(self, index):
        question = f"{index} + {index}?" + (self.padding if index == 1 else "")
        solution = [{"type": "text", "text": "It is "}, {"type": "python", "text": f"{2 * index}"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": solution},
        ]
        return {"messages": messages}

    def grade(self, answers):
        return [text == f"#### {2 * index}" for index, text in answers]


class Scripted:
    """An engine whose answers are written down: (problem, sample) -> text."""

    max_len = 60

    def __init__(self, tokenizer, answers, finish="stop"):
        self.tokenizer, self.answers, self.finish = tokenizer, answers, finish
        self.requests = []

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
            rest = [0.0] * len(tokens), [True] * len(tokens)
            completions.append(Completion(tokens, *rest, self.finish))
            on_finish(number, completions[-1])
        return completions


def test_generative_grades_every_sample_and_counts_any_right_one(tiny_tokenizer):
    right = {(0, 0), (2, 1), (2, 2), (3, 2)}

    def answer(problem, sample):
        return f"#### {2 * problem}" if (problem, sample) in right else "no"

    engine, seen = Scripted(tiny_tokenizer, answer), []
    score = chat.generative(
        engine,
        tiny_tokenizer,
        Sums(5),
        max_new_tokens=7,
        num_samples=3,
        temperature=0.5,
        top_k=9,
        seed=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (score.num_correct, score.num_problems) == (3, 5)
    assert score.pass_at_k == [1 / 5, 2 / 5, 3 / 5]
    assert score.ended == {"stop": 15}
    assert score.examples[0] == {
        "prompt": "0 + 0?",
        "answer": "#### 0",
        "expected": "It is <|python_start|>0<|python_end|>",
        "correct": True,
    }
    assert seen == [(n, 15) for n in range(1, 16)]
    assert {(r.max_new_tokens, r.temperature, r.top_k) for r in engine.requests} == {(7, 0.5, 9)}

    def seeds(**changes):
        settings = {"max_new_tokens": 7, "num_samples": 3, "seed": 1} | changes
        chat.generative(engine, tiny_tokenizer, Sums(5), **settings)
        return [request.seed for request in engine.requests]

    assert len(set(seeds())) == 15 and not set(seeds()) & set(seeds(seed=2))
    first = seeds()  # a problem's seeds do not depend on what else is asked
    assert seeds(max_problems=2) == first[:6]
    assert seeds(num_samples=1) == first[::3]


def test_generative_counts_a_prompt_that_does_not_fit_as_wrong(tiny_tokenizer, capsys):
    engine = Scripted(tiny_tokenizer, lambda problem, _: f"#### {2 * problem}", "length")
    score = chat.generative(
        engine, tiny_tokenizer, Sums(3, "!?" * 40), max_new_tokens=4, num_samples=2
    )
    assert (score.num_correct, score.num_problems) == (2, 3)
    assert score.ended == {"length": 4, "too_long": 2}
    assert score.examples[1]["answer"] == ""
    assert "problem 1 counts as wrong: the last message is" in capsys.readouterr().out


def test_generative_with_the_engine_reads_what_full_forward_passes_say(tiny_tokenizer, params):
    heard = {}

    class Heard(Sums):
        def grade(self, answers):
            heard.update(answers)
            return [index == 1 for index, _ in answers]

    stop = tiny_tokenizer.special_id("<|assistant_end|>")
    mesh = make_mesh(devices=jax.devices()[:1])
    engine = Engine(CONFIG, mesh, slots=2, max_len=64, stop_ids={stop})
    engine.load(params)
    score = chat.generative(engine, tiny_tokenizer, Heard(3), max_new_tokens=8)
    prompts = [render_for_completion(tiny_tokenizer, problem) for problem in Sums(3)]
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
    names = ("arc_challenge", "arc_easy", "gsm8k", "humaneval", "mmlu")
    for accuracies, published in (  # d20 after mid-training and after SFT, without spelling
        ((0.2875, 0.3561, 0.0250, 0.0671, 0.3111), 0.0730),
        ((0.2807, 0.3876, 0.0455, 0.0854, 0.3151), 0.0884),
    ):
        found = chat.chatcore(dict(zip(names, accuracies, strict=True)))
        assert round(found["chatcore_5"], 4) == published
        assert found["missing"] == ["spelling_bee"] and "chatcore" not in found


def test_chatcore_of_all_tasks_and_of_few():
    assert {ARC.chance, MMLU.chance} == {chat.CHANCE[n] for n in ("arc_easy", "mmlu")}
    guessing = dict(chat.CHANCE) | {"another task": 0.9}
    assert chat.chatcore(guessing) == {
        "chatcore": 0,
        "chatcore_5": 0,
        "chatcore_cat": 0,
        "missing": [],
    }
    found = chat.chatcore({"arc_easy": 0.25, "arc_challenge": 1.0, "mmlu": 0.625})
    assert found == {"chatcore_cat": 0.5, "missing": ["gsm8k", "humaneval", "spelling_bee"]}


def test_table_lines_up():
    scores = {
        "arc_easy": chat.Score(1, 4, 0.25),
        "gsm8k": chat.Score(10, 1319, 1234.56, {"stop": 1300, "length": 19}),
    }
    assert chat.table(scores).splitlines() == [
        "task      accuracy  correct     of  seconds  answers ended by",
        "arc_easy    25.00%        1      4      0.2",
        "gsm8k        0.76%       10  1,319  1,234.6  length 19, stop 1,300",
        "for chatcore, missing: arc_challenge, mmlu, humaneval, spelling_bee",
    ]
