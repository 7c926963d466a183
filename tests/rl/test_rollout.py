"""From answers to a batch: what is trained, how much it counts, and which seeds draw it."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference.request import Completion, Request
from nanochat_jax.rl.policy import advantages, policy_loss, token_weights
from nanochat_jax.rl.rollout import pad, practise
from nanochat_jax.tasks.base import Task
from nanochat_jax.tokenizer.chat import IGNORE, render_for_completion

PAD = 0


def test_weights_are_the_mean_over_passes_of_the_policy_loss():
    """Over several questions, the passes of which have unequal numbers of sampled tokens."""
    rng = np.random.default_rng(0)
    questions, samples, pass_rows, T, D, vocab = 3, 4, 2, 9, 8, 50
    rows = questions * samples
    hidden = jnp.asarray(rng.standard_normal((rows, T, D)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((D, 64)), jnp.float32)
    begins = rng.integers(0, T + 1, (rows, 1))
    targets = np.where(np.arange(T) < begins, IGNORE, rng.integers(vocab, size=(rows, T)))
    targets = targets.astype(np.int32)
    targets[:pass_rows] = IGNORE  # a pass in which nothing was sampled
    rewards = rng.random((questions, samples)).astype(np.float32)
    better = advantages(rewards).reshape(-1)
    for row in range(rows):
        of_question = rewards[row // samples].tolist()
        expected = of_question[row % samples] - sum(of_question) / samples
        assert better[row] == pytest.approx(expected, abs=1e-6)

    weights = token_weights(targets, better, pass_rows)
    assert weights.dtype == np.float32
    logits = 15 * np.tanh(np.asarray(hidden @ head, np.float64)[..., :vocab] / 15)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, np.maximum(targets, 0)[..., None], -1)[..., 0]
    losses = []
    for first in range(0, rows, pass_rows):
        part = slice(first, first + pass_rows)
        places = np.argwhere(targets[part] != IGNORE) + [first, 0]
        losses.append(sum(nll[row, t] * better[row] for row, t in places) / max(len(places), 1))
        ours = policy_loss(hidden[part], head, targets[part], better[part], vocab, 4)
        assert float(ours) == pytest.approx(losses[-1], abs=1e-5)
    assert float((weights * nll).sum()) == pytest.approx(np.mean(losses), abs=1e-5)


def test_targets_are_the_sampled_tokens_alone():
    requests = [Request([1, 5, 6], 9), Request([1, 7], 9)]
    answers = [
        # The tool's answer 30, 31 is forced; the stop token 9 is said.
        Completion([20, 21, 30, 31, 22, 9], [], [True, True, False, False, True, True], "stop"),
        Completion([23], [], [True], "length"),
    ]
    inputs, targets = pad(requests, answers, PAD, longest=1000)
    assert inputs.shape == targets.shape == (2, 64) and inputs.dtype == targets.dtype == np.int32
    assert inputs.tolist() == [[1, 5, 6, 20, 21, 30, 31, 22] + [PAD] * 56, [1, 7] + [PAD] * 62]
    first = [IGNORE, IGNORE, 20, 21, IGNORE, IGNORE, 22, 9]
    assert targets.tolist() == [first + [IGNORE] * 56, [IGNORE, 23] + [IGNORE] * 62]


@pytest.mark.parametrize(
    ("answer", "longest", "width"), [(63, 999, 64), (64, 999, 128), (64, 70, 70)]
)
def test_width_is_a_bucket(answer, longest, width):
    said = Completion([3] * answer, [], [True] * answer, "length")
    inputs, targets = pad([Request([1, 2], 99)], [said], PAD, longest)
    assert inputs.shape == (1, width)
    assert (targets != IGNORE).sum() == answer


class Parrot(Task):
    """Question n is right when the answer is worth it."""

    kind = "generative"

    def __init__(self, right=lambda index, said: True):
        self.right = right

    def __len__(self):
        return 10

    def example(self, index):
        return {"messages": [{"role": "user", "content": f"question {index}"}]}

    def grade(self, answers):
        return [self.right(index, said) for index, said in answers]


class Writer:
    """An engine that answers with the parity of its seed, and notes what it was asked."""

    max_len = 200

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def generate(self, requests):
        self.asked += requests
        answers = []
        for request in requests:
            said = self.tokenizer.encode("even" if request.seed % 2 == 0 else "odd, odd")
            tokens = [*said, self.tokenizer.special_id("<|assistant_end|>")]
            answers.append(Completion(tokens, [], [True] * len(tokens), "stop"))
        return answers


def practised(tokenizer, task, questions, seed=(0, 0)):
    """(batch, what the engine was asked)"""
    engine = Writer(tokenizer)
    settings = {"samples": 4, "pass_rows": 2, "max_new_tokens": 8, "temperature": 1.0, "top_k": 0}
    return practise(engine, tokenizer, task, questions, seed=seed, **settings), engine.asked


def test_a_batch_rewards_what_the_task_accepts(tiny_tokenizer):
    task = Parrot(lambda index, said: said == "even" and index != 9 or index == 7)
    batch, asked = practised(tiny_tokenizer, task, [3, 7, 5, 9], (1, 2))
    prompts = [
        render_for_completion(tiny_tokenizer, task[q]) for q in (3, 7, 5, 9) for _ in range(4)
    ]
    assert [request.prompt for request in asked] == prompts
    even = np.array([request.seed % 2 == 0 for request in asked]).reshape(4, 4)
    rewards = np.array([even[0], [True] * 4, even[2], [False] * 4])
    assert rewards[[0, 2]].any() and not rewards[[0, 2]].all()  # or this test says nothing
    expected = token_weights(batch["targets"], advantages(rewards * 1.0).reshape(-1), 2)
    np.testing.assert_allclose(batch["weights"], expected, rtol=1e-6)
    assert not batch["weights"][[*range(4, 8), *range(12, 16)]].any()  # all right, all wrong
    metrics = batch["metrics"]
    assert metrics["reward"] == pytest.approx(rewards.mean())
    assert metrics["solved_frac"] == pytest.approx(rewards.any(1).mean())
    assert metrics["mixed_frac"] == pytest.approx((rewards.any(1) & ~rewards.all(1)).mean())
    assert metrics["stopped_frac"] == 1
    assert batch["doc_ids"] == [[f"question {q}"] for q in (3, 7, 5, 9) for _ in range(4)]


def test_seeds_differ_between_samples_questions_steps_and_runs_and_nothing_else(tiny_tokenizer):
    def seeds(questions, seed):
        return [request.seed for request in practised(tiny_tokenizer, Parrot(), questions, seed)[1]]

    drawn = [seeds([1, 2, 3], (run, step)) for run, step in product((0, 1, 42), range(20))]
    assert len(set(sum(drawn, []))) == 12 * len(drawn)
    assert seeds([4, 4], (0, 3)) == seeds([8, 9], (0, 3))  # by place, not by question
