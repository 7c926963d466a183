"""Scores of a chat model at tasks: by the letter it prefers, or by the answer it writes.

  categorical  one forward pass a prompt; of the letters on offer the likeliest next token wins
  generative   the engine writes the answers, the task grades them; one right of num_samples counts
  chatcore     mean over tasks of (accuracy - chance) / (1 - chance): 0 is guessing, 1 perfect

A verdict depends on its problem alone: a prompt's padded width follows from its own length, and
every sampled answer has a seed of its own.
"""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.common import UserError, aligned, log
from nanochat_jax.eval.passk import pass_at_k, pass_at_k_unbiased
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.history import PromptTooLong, fit_prompt
from nanochat_jax.inference.request import Completion, Request
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import ROWS, num_row_shards
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS, render_for_completion

Progress = Callable[[int, int], object]  # (done, all there are)

MIN_WIDTH = 64  # prompts are padded to the powers of two from here on, so few shapes are compiled
NUM_EXAMPLES = 4  # answers shown in the report
TOO_LONG = "too_long"  # how a problem ended whose prompt does not fit

CHANCE = dict.fromkeys(("arc_easy", "arc_challenge", "mmlu"), 0.25)  # accuracy of guessing
CHANCE |= dict.fromkeys(("gsm8k", "humaneval", "spelling_bee"), 0.0)
MEANS = {
    "chatcore": tuple(CHANCE),
    "chatcore_5": tuple(name for name in CHANCE if name != "spelling_bee"),  # upstream's first form
    "chatcore_cat": tuple(name for name, chance in CHANCE.items() if chance),
}


@dataclass(frozen=True)
class Score:
    """What a model did at one task; `to_json` is what evaluations write."""

    num_correct: int
    num_problems: int
    seconds: float
    ended: dict[str, int] = field(default_factory=dict)  # answers by finish: stop, length, context
    pass_at_k: list[float] = field(default_factory=list)  # k = 1..num_samples, generative only
    pass_at_k_unbiased: list[float] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)  # the first problems and answers

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_problems

    def to_json(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, **asdict(self)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Score":
        return cls(**{key: value for key, value in saved.items() if key != "accuracy"})


def categorical(
    config: GPTConfig,
    mesh: Mesh,
    params: dict[str, jax.Array],
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_rows: int,
    max_problems: int = 0,
    progress: Progress = lambda *_: None,
) -> Score:
    """The share of problems whose right letter beats the others; UserError unless it is one token.

    batch_rows: over all devices. max_problems: the first so many; 0: all.
    """
    began = time.monotonic()
    if batch_rows < 1 or batch_rows % (shards := num_row_shards(mesh)):
        raise UserError(
            f"a batch got {batch_rows} rows, expected a multiple of config.mesh's {shards} shards"
        )
    problems = _problems(task, max_problems)
    prompts = [render_for_completion(tokenizer, problem) for problem in problems]
    letters = [problem["letters"] for problem in problems]
    ids_of = {letter: tokenizer.encode(letter) for row in letters for letter in row}
    if wrong := {letter: ids for letter, ids in ids_of.items() if len(ids) != 1}:
        raise UserError(f"letters got the ids {wrong}, expected one each; grade what is written")
    most, by_width = max(map(len, letters)), defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_width[max(MIN_WIDTH, 1 << (len(prompt) - 1).bit_length())].append(number)
    batches = [
        (width, numbers[first : first + batch_rows])
        for width, numbers in sorted(by_width.items())  # short ones first
        for first in range(0, len(numbers), batch_rows)
    ]
    answers, done, sharding = [""] * len(problems), 0, NamedSharding(mesh, ROWS)
    for width, numbers in batches:
        ids = np.full((batch_rows, width), tokenizer.bos_id, np.int32)
        last, among = np.zeros(batch_rows, np.int32), np.zeros((batch_rows, most), np.int32)
        for row, number in enumerate(numbers):
            prompt, offered = prompts[number], [ids_of[letter][0] for letter in letters[number]]
            ids[row, : len(prompt)], last[row] = prompt, len(prompt) - 1
            # What is missing repeats the first letter, which wins no more often for that.
            among[row] = offered + offered[:1] * (most - len(offered))
        arrays = (ids, last, among)
        batch = [jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays]
        with jax.set_mesh(mesh):
            best = np.asarray(_best(config, params, *batch))
        for row, number in enumerate(numbers):
            answers[number] = letters[number][best[row]]
        done += len(numbers)
        progress(done, len(problems))
    correct = [_expected(p) == answer for p, answer in zip(problems, answers, strict=True)]
    return _score(problems, answers, np.array(correct)[:, None], began)


@partial(jax.jit, static_argnums=0)
def _best(config: GPTConfig, params: dict, ids: jax.Array, last: jax.Array, among: jax.Array):
    """Which of the ids `among` [B, C] is the likeliest after position `last` [B]: an index [B]."""
    hidden = bind(config, params).hidden(ids)  # [B, T, D]
    hidden = hidden[jnp.arange(len(ids)), last]  # [B, D]
    head = params["lm_head.kernel"].astype(hidden.dtype)
    # In float32: letters are often closer than bfloat16 can tell. The softcap keeps their order.
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)  # [B, V]
    best = jnp.argmax(jnp.take_along_axis(logits, among, axis=-1), axis=-1)  # [B]
    return jax.lax.with_sharding_constraint(best, P())  # every process gets all of it


def generative(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    *,
    num_samples: int = 1,
    seed: int = 0,
    max_problems: int = 0,
    progress: Progress = lambda *_: None,
    **sampling: Any,
) -> Score:
    """The share of problems that one of num_samples answers solves.

    max_problems: the first so many; 0: all. sampling: max_new_tokens and more, as in Request.
    A long prompt loses its oldest turns; where one turn alone is too long, it counts as wrong.
    """
    began = time.monotonic()
    if num_samples < 1:
        raise UserError(f"got num_samples {num_samples}, expected at least 1")
    problems = _problems(task, max_problems)
    prompts: dict[int, list[int]] = {}
    for index, problem in enumerate(problems):
        try:
            prompts[index], _ = fit_prompt(tokenizer, problem["messages"], engine.max_len - 1)
        except PromptTooLong as error:
            log(f"problem {index} counts as wrong: {error}")
    asked = [(index, sample) for index in prompts for sample in range(num_samples)]
    requests = [Request(prompts[i], seed=seed_of(seed, i, n), **sampling) for i, n in asked]
    done = itertools.count(1)
    completions = engine.generate(requests, lambda *_: progress(next(done), len(requests)))
    texts = [answer_text(tokenizer, completion) for completion in completions]
    verdicts = task.grade([(index, text) for (index, _), text in zip(asked, texts, strict=True)])
    correct = np.zeros((len(problems), num_samples), bool)
    answers = [""] * len(problems)  # the first of each
    for (index, sample), text, verdict in zip(asked, texts, verdicts, strict=True):
        correct[index, sample] = verdict
        answers[index] = answers[index] if sample else text
    ended = Counter(completion.finish for completion in completions)
    ended[TOO_LONG] = len(problems) * num_samples - len(requests)
    curves = {"pass_at_k": pass_at_k(correct), "pass_at_k_unbiased": pass_at_k_unbiased(correct)}
    return _score(problems, answers, correct, began, ended=dict(+ended), **curves)


def answer_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What the task reads: tool calls and their results too, special tokens by name, no stop."""
    tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
    # Too little text makes a smaller vocabulary than the model's: the ids above mean nothing.
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])


def chatcore(accuracies: Mapping[str, float]) -> dict[str, Any]:
    """The means whose tasks are all there, by name (MEANS), and which tasks are "missing"."""
    missing, means = [name for name in CHANCE if name not in accuracies], {}
    for mean, names in MEANS.items():
        if not set(names) & set(missing):
            centered = [(accuracies[name] - CHANCE[name]) / (1 - CHANCE[name]) for name in names]
            means[mean] = sum(centered) / len(names)
    return {**means, "missing": missing}


def table(scores: Mapping[str, Score]) -> str:
    """The scores for people, a line a task, and below them what `chatcore` makes of them."""
    rows = [["task", "accuracy", "correct", "of", "seconds", "answers ended by"]]
    for name, score in scores.items():
        ended = ", ".join(f"{end} {n:,}" for end, n in sorted(score.ended.items()))
        correct = [f"{score.accuracy:.2%}", f"{score.num_correct:,}", f"{score.num_problems:,}"]
        rows.append([name, *correct, f"{score.seconds:,.1f}", ended])
    means = chatcore({name: score.accuracy for name, score in scores.items()})
    missing = means.pop("missing")
    lines = [f"{name} {value:.4f}" for name, value in means.items()]
    lines += [f"for chatcore, missing: {', '.join(missing)}"] if missing else []
    return "\n".join([*aligned(rows, left=(0, 5)), *lines])


def seed_of(*numbers: int) -> int:
    """One 31-bit seed out of several, without neighbours that share answers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def _problems(task: Task, max_problems: int) -> list[Conversation]:
    if max_problems < 0:
        raise UserError(f"got max_problems {max_problems}, expected 0 (all) or more")
    problems = task[: max_problems or None]
    if not problems:
        raise UserError(f"{type(task).__name__} has no problems; choose another slice of it")
    return problems


def _expected(problem: Conversation) -> str:
    """The answer that the conversation itself ends with; empty when it ends with the question."""
    last = problem["messages"][-1]
    content = last["content"] if last["role"] == "assistant" else ""
    if isinstance(content, str):
        return content
    marked = [(part["text"], *PARTS[part["type"]]) for part in content]
    return "".join((opening or "") + text + (closing or "") for text, opening, closing, _ in marked)


def _score(
    problems: list[Conversation], answers: list[str], correct: np.ndarray, began: float, **more
) -> Score:
    """answers: the first to each problem; correct [problems, answers to each]."""
    examples, first = [], zip(problems[:NUM_EXAMPLES], answers, correct[:, 0], strict=False)
    for problem, answer, verdict in first:
        asked = [m["content"] for m in problem["messages"] if m["role"] == "user"][-1]
        shown = {"prompt": asked, "answer": answer, "expected": _expected(problem)}
        examples.append(shown | {"correct": bool(verdict)})
    num_correct, seconds = int(correct.any(axis=1).sum()), time.monotonic() - began
    return Score(num_correct, len(problems), seconds, examples=examples, **more)
