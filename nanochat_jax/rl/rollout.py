"""Practice: the model answers questions, the task grades them, and the answers become a batch.

Targets are the sampled tokens alone, the stop token among them. What is sampled depends on the
parameters, the seed and the question's place, so a continued run repeats it.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat_jax.data.conversations import bucket
from nanochat_jax.eval.chat import answer_text, seed_of
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Completion, Request
from nanochat_jax.rl.policy import advantages, token_weights
from nanochat_jax.tasks.base import Task
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import IGNORE, pad_batch, render_for_completion


def practise(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[int],
    *,
    samples: int,
    pass_rows: int,
    seed: tuple[int, ...],
    **sampling: Any,
) -> dict[str, Any]:
    """A batch of all processes' rows, [questions * samples, T], and metrics of the answers."""
    began = time.perf_counter()
    asked = [question for question in questions for _ in range(samples)]
    requests = []
    for place, question in enumerate(questions):
        prompt = render_for_completion(tokenizer, task[question])
        seeds = [seed_of(*seed, place, sample) for sample in range(samples)]
        requests += [Request(prompt, seed=one, **sampling) for one in seeds]
    answers = engine.generate(requests)
    texts = [answer_text(tokenizer, answer) for answer in answers]
    verdicts = task.grade(list(zip(asked, texts, strict=True)))
    rewards = np.array(verdicts, np.float32).reshape(len(questions), samples)
    inputs, targets = pad(requests, answers, tokenizer.bos_id, engine.max_len)
    metrics = {
        "reward": float(rewards.mean()),
        "solved_frac": float(rewards.max(axis=1).mean()),
        "mixed_frac": float((rewards.min(axis=1) < rewards.max(axis=1)).mean()),
        "answer_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
        "stopped_frac": float(np.mean([answer.finish == "stop" for answer in answers])),
        "rollout_secs": time.perf_counter() - began,
    }
    return {
        "inputs": inputs,
        "targets": targets,
        "weights": token_weights(targets, advantages(rewards).reshape(-1), pass_rows),
        "doc_ids": [[f"question {question}"] for question in asked],
        "epoch": 0,
        "metrics": metrics,
    }


def pad(
    requests: Sequence[Request], answers: Sequence[Completion], pad_id: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """inputs and targets, int32 [R, T]; T is the bucket of the longest row."""
    ids = [[*r.prompt, *a.tokens] for r, a in zip(requests, answers, strict=True)]
    mask = [[0] * len(r.prompt) + a.sampled for r, a in zip(requests, answers, strict=True)]
    inputs, targets = pad_batch(list(zip(ids, mask, strict=True)), pad_id)
    extra = ((0, 0), (0, bucket(inputs.shape[1], longest) - inputs.shape[1]))
    targets = np.pad(targets, extra, constant_values=IGNORE)
    return np.pad(inputs, extra, constant_values=pad_id), targets
