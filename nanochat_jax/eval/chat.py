"""Scores of a chat model at tasks: by the letter it prefers, or by the answer it writes.

  categorical  one forward pass a prompt; of the letters on offer the likeliest next token wins
  generative   the engine writes the answers, the task grades them; one right of num_samples counts
  chatcore     mean over tasks of (accuracy - chance) / (1 - chance): 0 is guessing, 1 perfect

A verdict depends on its problem alone: a prompt's padded width follows from its own length, what
lies right of it is never seen, and every sampled answer has a seed of its own.
"""

import itertools
import time
from collections import Counter
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
from nanochat_jax.inference.scheduler import Completion, Request
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import ROWS, num_row_shards
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS, render_for_completion

Progress = Callable[[int, int], None]  # (done, all there are)

MIN_WIDTH = 64  # prompts are padded to the powers of two from here on, so few shapes are compiled
NUM_EXAMPLES = 4  # answers shown in the report
TOO_LONG = "too_long"  # how a problem ended whose prompt does not fit

# Accuracy of guessing.
CHANCE = {name: 0.25 for name in ("arc_easy", "arc_challenge", "mmlu")}
CHANCE |= {name: 0.0 for name in ("gsm8k", "humaneval", "spelling_bee")}
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
    progress: Progress | None = None,
) -> Score:
    """The share of problems whose right letter beats the others. batch_rows: over all devices.

    max_problems: the first so many; 0: all. UserError when a letter is not exactly one token.
    """
    began = time.monotonic()
    if batch_rows < 1 or batch_rows % num_row_shards(mesh):
        raise UserError(
            f"a batch got {batch_rows} rows, expected a multiple of the {num_row_shards(mesh)} row "
            "shards of config.mesh"
        )
    problems = _problems(task, max_problems)
    prompts = [render_for_completion(tokenizer, problem) for problem in problems]
    letters = [problem["letters"] for problem in problems]
    ids_of = {letter: tokenizer.encode(letter) for row in letters for letter in row}
    if wrong := {letter: ids for letter, ids in ids_of.items() if len(ids) != 1}:
        raise UserError(f"letters got the ids {wrong}, expected one each; grade what is written")
    # Rows of unequal length repeat their first letter, which then wins no more often than before.
    most = max(map(len, letters))
    padded = [[*row, *[row[0]] * (most - len(row))] for row in letters]
    offered = np.array([[ids_of[letter][0] for letter in row] for row in padded], np.int32)
    by_width: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        width = max(MIN_WIDTH, 1 << (len(prompt) - 1).bit_length())
        by_width.setdefault(width, []).append(number)

    def put(array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, ROWS)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    answers = [""] * len(problems)
    done = 0
    with jax.set_mesh(mesh):
        for width, numbers in sorted(by_width.items()):  # short ones first
            for first in range(0, len(numbers), batch_rows):
                rows = numbers[first : first + batch_rows]
                ids = np.full((batch_rows, width), tokenizer.bos_id, np.int32)
                last, among = np.zeros(batch_rows, np.int32), np.zeros((batch_rows, most), np.int32)
                for row, number in enumerate(rows):
                    ids[row, : len(prompts[number])] = prompts[number]
                    last[row], among[row] = len(prompts[number]) - 1, offered[number]
                best = np.asarray(_best(config, params, put(ids), put(last), put(among)))
                for row, number in enumerate(rows):
                    answers[number] = letters[number][best[row]]
                done += len(rows)
                if progress:
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
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    max_problems: int = 0,
    progress: Progress | None = None,
) -> Score:
    """The share of problems that one of num_samples answers solves.

    max_problems: the first so many; 0: all. A long prompt loses its oldest turns; where one turn
    alone leaves no room for an answer, the problem counts as wrong.
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
    requests = [
        Request(prompts[i], max_new_tokens, temperature, top_k, seed=seed_of(seed, i, sample))
        for i, sample in asked
    ]
    done = itertools.count(1)

    def count(_index: int, _completion: Completion) -> None:
        if progress:
            progress(next(done), len(requests))

    completions = engine.generate(requests, on_finish=count)
    texts = [answer_text(tokenizer, completion) for completion in completions]
    verdicts = task.grade([(index, text) for (index, _), text in zip(asked, texts, strict=True)])
    correct = np.zeros((len(problems), num_samples), bool)
    answers = [""] * len(problems)  # the first of each
    for (index, sample), text, verdict in zip(asked, texts, verdicts, strict=True):
        correct[index, sample] = verdict
        answers[index] = answers[index] if sample else text
    ended = Counter(completion.finish for completion in completions)
    ended[TOO_LONG] = len(problems) * num_samples - len(requests)
    return _score(
        problems, answers, correct, began,
        ended={name: n for name, n in ended.items() if n},
        pass_at_k=pass_at_k(correct),
        pass_at_k_unbiased=pass_at_k_unbiased(correct),
    )  # fmt: skip


def answer_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What the task reads: tool calls and their results too, special tokens by name, no stop."""
    tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
    # Too little text makes a smaller vocabulary than the model's: the ids above mean nothing.
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])


def chatcore(accuracies: Mapping[str, float]) -> dict[str, Any]:
    """The means whose tasks are all there, by name (MEANS), and which tasks are "missing"."""
    centered = {
        name: (accuracy - CHANCE[name]) / (1 - CHANCE[name])
        for name, accuracy in accuracies.items()
        if name in CHANCE
    }
    means = {
        mean: sum(centered[name] for name in names) / len(names)
        for mean, names in MEANS.items()
        if centered.keys() >= set(names)
    }
    return {**means, "missing": [name for name in CHANCE if name not in centered]}


def table(scores: Mapping[str, Score]) -> str:
    """The scores for people, a line a task, and below them what `chatcore` makes of them."""
    rows = [["task", "accuracy", "correct", "of", "seconds", "answers ended by"]]
    for name, score in scores.items():
        ended = ", ".join(f"{end} {n:,}" for end, n in sorted(score.ended.items()))
        correct = [f"{score.accuracy:.2%}", f"{score.num_correct:,}", f"{score.num_problems:,}"]
        rows.append([name, *correct, f"{score.seconds:,.1f}", ended])
    lines = aligned(rows, left=(0, 5))
    means = chatcore({name: score.accuracy for name, score in scores.items()})
    missing = means.pop("missing")
    lines += [f"{name} {value:.4f}" for name, value in means.items()]
    if missing:
        lines.append(f"for chatcore, missing: {', '.join(missing)}")
    return "\n".join(lines)


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
    marks = [PARTS[part["type"]] for part in content]
    return "".join(
        f"{opening or ''}{part['text']}{closing or ''}"
        for part, (opening, closing, _) in zip(content, marks, strict=True)
    )


def _score(
    problems: list[Conversation], answers: list[str], correct: np.ndarray, began: float, **more
) -> Score:
    """answers: the first to each problem; correct [problems, answers to each]."""
    first = list(zip(problems, answers, correct[:, 0].tolist(), strict=True))[:NUM_EXAMPLES]
    asked = [[m for m in problem["messages"] if m["role"] == "user"][-1] for problem, *_ in first]
    examples = [
        {"prompt": m["content"], "answer": answer, "expected": _expected(p), "correct": verdict}
        for m, (p, answer, verdict) in zip(asked, first, strict=True)
    ]
    num_correct, seconds = int(correct.any(axis=1).sum()), time.monotonic() - began
    return Score(num_correct, len(problems), seconds, examples=examples, **more)
