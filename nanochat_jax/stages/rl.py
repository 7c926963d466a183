"""RL: the model practises on questions whose answers can be graded."""

import random
from typing import Any

import jax

from nanochat_jax.data.conversations import bucket
from nanochat_jax.eval.chat import generative
from nanochat_jax.inference.checkpoint import make_engine
from nanochat_jax.rl.rollout import practise
from nanochat_jax.stages.evals import graded_task, longest_prompt
from nanochat_jax.stages.run import Run, finished_parent
from nanochat_jax.stages.text import run_tokenizer
from nanochat_jax.stages.train import Stage
from nanochat_jax.train.loop import Evaluation


class Questions:
    """The questions of each step, in an order fixed by the seed; its place is the step."""

    def __init__(self, num_questions: int, per_step: int, seed: int):
        self.step, self.per_step = 0, per_step
        self.order = list(range(num_questions))
        random.Random(seed).shuffle(self.order)

    def __next__(self) -> list[int]:
        first = self.step * self.per_step
        self.step += 1
        return [self.order[i % len(self.order)] for i in range(first, first + self.per_step)]

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def start_prefetch(self) -> None:
        """Answers need the current parameters: nothing can be made ahead."""

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Nothing is held open."""


class RL(Stage):
    name, on_policy = "rl", True
    batches: Questions

    def __init__(self, run: Run):
        config, r = run.config, run.config.rl
        self.parent = finished_parent(run, "rl")
        self.tokenizer = run_tokenizer(config)
        specs = {"config.rl.task": r.task, "config.rl.val_task": r.val_task}
        tasks = (graded_task(config, *named, ("generative",)) for named in specs.items())
        self.task, self.val_task = tasks
        super().__init__(run)
        self.use_rows(r.questions_per_step * r.samples)
        all_steps, num_val = max(1, len(self.task) // r.questions_per_step), len(self.val_task)
        self.use_optimizer(min(r.num_steps or all_steps, all_steps))
        self.batches = Questions(len(self.task), r.questions_per_step, r.seed)
        asked = self.batches.order[: self.num_steps * r.questions_per_step]
        longest = longest_prompt(self.tokenizer, self.task, asked)
        asked = range(min(r.eval_questions or num_val, num_val))
        longest_val = longest_prompt(self.tokenizer, self.val_task, asked)
        max_len = max(longest, longest_val) + r.max_new_tokens
        sizes = {"slots": r.slots, "max_len": max_len}
        self.engine = make_engine(run.model, run.mesh, self.tokenizer, **sizes)
        self.widest = bucket(longest + r.max_new_tokens - 1, max_len)
        self.sampling = {key: r[key] for key in ("max_new_tokens", "temperature", "top_k")}
        self.evaluations = [Evaluation("pass_at_k", r.eval_every, self.pass_at_k, at_start=True)]

    def next_batch(self, params: dict[str, jax.Array]) -> dict[str, Any]:
        r = self.section
        self.engine.load(params)
        del params  # the engine has its own copy
        seed, questions = (r.seed, self.batches.step), next(self.batches)
        how = {"samples": r.samples, "pass_rows": r.pass_rows, **self.sampling}
        batch = practise(self.engine, self.tokenizer, self.task, questions, seed=seed, **how)
        self.engine.unload()
        share = len(batch["inputs"]) // jax.process_count()
        ours = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return {k: v[ours] if k not in ("epoch", "metrics") else v for k, v in batch.items()}

    def pass_at_k(self, params: dict[str, jax.Array]) -> dict[str, Any]:
        r = self.section
        self.engine.load(params)
        how = {"num_samples": r.eval_samples, "max_problems": r.eval_questions, **self.sampling}
        score = generative(self.engine, self.tokenizer, self.val_task, seed=r.seed, **how)
        self.engine.unload()
        return {f"pass@{k + 1}": value for k, value in enumerate(score.pass_at_k)}
