"""Evaluations: those of the base model, those of a chat model, and the functions that training
stages run between steps.

A result is a file in eval/ that names its checkpoint and settings. If both are the same, nothing is
computed again; otherwise the earlier file moves to eval/replaced/. The chat evaluation keeps each
task's score as it comes, so that a long one survives a kill.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from nanochat_jax import recipe
from nanochat_jax.common import UserError, log, read_json, write_json
from nanochat_jax.config import REMOVED, Recipe
from nanochat_jax.data import hub
from nanochat_jax.data.lanes import DataOrder
from nanochat_jax.data.pipeline import eval_batches
from nanochat_jax.data.sources import Corpus
from nanochat_jax.eval import chat, core
from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.checkpoint import (
    STAGES,
    StageCheckpoint,
    find_stage,
    make_engine,
    open_stage,
)
from nanochat_jax.inference.request import Request
from nanochat_jax.stages.run import Run, has_stage, start
from nanochat_jax.stages.same import same_run
from nanochat_jax.stages.text import run_data, run_tokenizer
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_for_completion
from nanochat_jax.tools.sandbox import statement
from nanochat_jax.train.step import loss_tile, put_batch

ANSWER_TOKENS = 128  # at most, of an answer that the report shows


def run_base_eval(config: Recipe) -> None:
    """Evaluate the base model: bits per byte on both texts, CORE, samples."""
    run = start(config)
    config, e = run.config, run.config.eval
    found = find_stage(run.dir, "base")
    keys = {k: v for k, v in recipe.flat_json(config, "eval.").items() if "eval.chat_" not in k}
    out, settings = run.dir / "eval" / "base.json", {"checkpoint": found.checksum, **keys}
    values = _found(out, settings)
    if values and _answers(values, e.chat_prompts):
        log(f"base_eval: {out} is there, of step {found.step}")
        return
    began = time.monotonic()
    bundle = hub.eval_bundle(e.core_dir) if e.core else None
    tokenizer, params = _open(run, found)
    if not values:
        train_paths, val_path = run_data(config)
        values = {"step": found.step, "eval_secs": 0.0, "settings": settings}
        values["val_bpb"] = text_bpb(run, tokenizer, val_path)(params)
        values["train_bpb"] = text_bpb(run, tokenizer, train_paths[0])(params)
        if bundle:
            values |= make_core(run, tokenizer, bundle, e.core_per_task)(params)
        continued = make_answers(run, tokenizer, e.prompts, e.sample_tokens, in_chat=False)
        values["samples"] = continued(params)
    continued = make_answers(run, tokenizer, e.chat_prompts, ANSWER_TOKENS, in_chat=False)
    values["answers"] = continued(params)
    for name, value in values.items():
        if isinstance(value, float):
            log(f"base_eval: {name} {value:.4f}")
    _tell([*values["samples"], *values["answers"]])
    values["eval_secs"] += time.monotonic() - began
    _write(run, out, values)


def run_chat_eval(config: Recipe, score: Callable | None = None) -> None:
    """Score the model of eval.chat_stage at every task of eval.chat_tasks, and ChatCORE; let it
    answer eval.chat_prompts.

    score(run, tokenizer, params, spec, task) -> Score of one task; by default the model's own.
    """
    name, specs, score = config.eval.chat_stage, config.eval.chat_tasks, score or task_score
    if name not in STAGES:
        raise UserError(f"config.eval.chat_stage got {name!r}, expected one of {', '.join(STAGES)}")
    if not has_stage(config, name):
        return
    if not specs or len({*map(_metric, specs)}) < len(specs):
        what = f"got {specs}, expected some tasks, no two of one name: {[*map(_metric, specs)]}"
        raise UserError(f"config.eval.chat_tasks {what}")
    run = start(config)
    config, prompts = run.config, config.eval.chat_prompts
    found = find_stage(run.dir, name)
    keys = recipe.flat_json(config, "eval.chat_")
    del keys["eval.chat_tasks"], keys["eval.chat_prompts"]  # each result names its own
    made_of = {"persona": config.data.persona, "task_dir": config.data.task_dir}
    settings = {"checkpoint": found.checksum, **made_of, **keys}
    out = run.dir / "eval" / f"{name}_chat.json"
    values = {"step": found.step, "tasks": {}, "eval_secs": 0.0, "settings": settings}
    values |= _found(out, settings)
    wanted = [spec for spec in specs if spec not in values["tasks"]]
    if not wanted and _answers(values, prompts):
        log(f"chat_eval: {out} is there, of {name}, step {found.step}")
        if values != (asked := _with_means(values, specs)):
            _write(run, out, asked)
        return
    kinds = ("categorical", "generative")  # all are opened before the first runs
    tasks = {s: graded_task(config, "config.eval.chat_tasks", s, kinds) for s in wanted}
    tokenizer, params = _open(run, found)
    if not _answers(values, prompts):
        new_tokens = min(config.eval.chat_max_new_tokens, ANSWER_TOKENS)
        answers = make_answers(run, tokenizer, prompts, new_tokens, in_chat=True)
        values["answers"] = answers(params)
        _tell(values["answers"])
        _write(run, out, _with_means(values, specs))
    for spec, task in tasks.items():
        values["tasks"][spec] = found_score = score(run, tokenizer, params, spec, task).to_json()
        values["eval_secs"] += found_score["seconds"]
        _write(run, out, _with_means(values, specs))
    log(chat.table({_metric(spec): chat.Score.from_json(values["tasks"][spec]) for spec in specs}))


def graded_task(config: Recipe, key: str, spec: str, kinds: Sequence[str]) -> Task:
    """The task that `key` names; its answers can be graded."""
    task = open_task(spec, task_dir=config.data.task_dir, persona=config.data.persona)
    if task.kind not in kinds:
        expected = f"expected one that is {' or '.join(kinds)}, with right answers"
        raise UserError(f"{key} got {spec!r}, which is {task.kind}; {expected}")
    return task


def _with_means(values: dict[str, Any], specs: Sequence[str]) -> dict[str, Any]:
    """A result with the named scores of `specs`, as far as they are there, and their means."""
    tasks, own = values["tasks"], ("step", "tasks", "answers", "eval_secs", "settings")
    named = {_metric(spec): tasks[spec]["accuracy"] for spec in specs if spec in tasks}
    means = chat.chatcore({name: named[name] for name in chat.CHANCE if name in named})
    kept = {key: values[key] for key in own if key in values}
    return kept | named | {"chatcore_missing": means.pop("missing"), **means}


def task_score(
    run: Run, tokenizer: bpe.Tokenizer, params: dict, spec: str, task: Task
) -> chat.Score:
    """The score of a model at one task."""
    e = run.config.eval
    count = min(e.chat_problems or len(task), len(task))
    log(f"chat_eval: {spec}, {count:,} problems")
    if spec.split()[0] == "humaneval":
        for line in statement():  # those who run programs should know
            log(f"  sandbox: {line}")
    shared: dict[str, Any] = {"max_problems": e.chat_problems, "progress": progress_bar(spec)}
    if task.kind == "categorical":
        rows = e.device_batch_size * run.row_shards
        model = run.model, run.mesh, params
        score = chat.categorical(*model, tokenizer, task, batch_rows=rows, **shared)
    else:
        max_len = longest_prompt(tokenizer, task, range(count)) + e.chat_max_new_tokens
        sizes = {"slots": e.chat_slots, "max_len": max_len}
        engine = make_engine(run.model, run.mesh, tokenizer, **sizes)
        engine.load(params)
        shared |= {"num_samples": e.chat_samples, "seed": run.config.run.seed}
        shared |= {"max_new_tokens": e.chat_max_new_tokens}
        shared |= {"temperature": e.chat_temperature, "top_k": e.chat_top_k}
        score = chat.generative(engine, tokenizer, task, **shared)
    log(f"chat_eval: {spec} {score.accuracy:.2%} ({score.seconds:.1f}s)")
    return score


def longest_prompt(tokenizer: bpe.Tokenizer, task: Task, problems) -> int:
    return max(len(render_for_completion(tokenizer, task[problem])) for problem in problems)


def _metric(spec: str) -> str:
    """The name of a task's score: the task's, unless another split than test was asked."""
    name, *split = spec.split(maxsplit=1)
    return name if "".join(split).startswith("test") else spec


def _found(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The result in a file if it was made with these settings, else {}."""
    saved = read_json(out, "delete it") if out.exists() else {}
    made_with = {k: v for k, v in saved.get("settings", {}).items() if k not in REMOVED}
    return saved if made_with == settings else {}


def _answers(values: dict[str, Any], prompts: Sequence[str]) -> bool:
    """Whether a result holds the answers to these prompts."""
    return [answer["prompt"] for answer in values.get("answers", ())] == list(prompts)


def _tell(answers: Sequence[dict[str, str]]) -> None:
    for answer in answers:
        log(f"  {answer['prompt']!r} -> {answer['text']!r}")


def _write(run: Run, out: Path, values: dict[str, Any]) -> None:
    """Write a result; one of another checkpoint or other settings is kept in replaced/."""
    if not run.is_main:
        return
    if out.exists() and not _found(out, values["settings"]):
        aside = out.parent / "replaced" / f"{out.stem}-{out.stat().st_mtime_ns}.json"
        log(f"{out} is of another checkpoint or other settings: moved to {aside}")
        aside.parent.mkdir(exist_ok=True)
        out.rename(aside)
    write_json(out, values)
    run.keep_derived()


def _open(run: Run, found: StageCheckpoint) -> tuple[bpe.Tokenizer, dict[str, jax.Array]]:
    """Tokenizer and parameters of a checkpoint, which must be of this recipe."""
    tokenizer = run_tokenizer(run.config)
    same_run(run.config, tokenizer, found.host, found.folder.parent, found.stage)
    return tokenizer, open_stage(found, run.model, run.mesh).params


def make_core(
    run: Run, tokenizer: bpe.Tokenizer, bundle: Path, per_task: int
) -> Callable[[dict], dict[str, Any]]:
    """params -> CORE and the score of each of its tasks."""
    e, model = run.config.eval, run.model

    def evaluate(params: dict) -> dict[str, Any]:
        sizes = {"device_batch_tokens": e.device_batch_size * model.seq_len}
        sizes |= {"max_per_task": per_task, "tile_tokens": run.config.model.loss_tile_tokens}
        ours, progress = (model, run.mesh, params, tokenizer), progress_bar("CORE")
        result = core.evaluate(*ours, bundle, progress=progress, **sizes)
        if result["missing"] or result["partial"]:
            log(f"not CORE: missing {result['missing']}, incomplete {result['partial']}")
        names = [name for name in ("core", "core_partial") if name in result]
        return {name: result[name] for name in names} | {"core_tasks": result}

    return evaluate


def text_bpb(run: Run, tokenizer: bpe.Tokenizer, path: Path) -> Callable[[dict], float]:
    """params -> bits per byte over the first eval.val_tokens of the shard at `path`."""
    e, rows = run.config.eval, run.config.eval.device_batch_size * run.row_shards
    batches = eval_batches(
        DataOrder(Corpus([path]), tokenizer, run.model.seq_len),
        batch_rows=rows,
        num_batches=max(1, e.val_tokens // (rows * run.model.seq_len)),
        **run.process,
    )
    return validation_bpb(run, tokenizer, batches)


def validation_bpb(
    run: Run, tokenizer: bpe.Tokenizer, batches: Sequence[dict[str, Any]]
) -> Callable[[dict], float]:
    """params -> bits per byte of the targets in `batches`."""
    e, model = run.config.eval, run.model
    tile = loss_tile(run.config.model.loss_tile_tokens, e.device_batch_size, model.seq_len)
    bpb = make_bpb(model, run.mesh, tokenizer.token_bytes(), tile)
    return lambda params: bpb(params, (put_batch(batch, run.mesh) for batch in batches))


def make_answers(
    run: Run, tokenizer: bpe.Tokenizer, prompts: Sequence[str], new_tokens: int, *, in_chat: bool
) -> Callable[[dict], list[dict[str, str]]]:
    """params -> the prompts with what the model writes greedily: answers, or continued text."""
    if not prompts:
        return lambda params: []
    users = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    ids = [render_for_completion(tokenizer, user) for user in users]
    if not in_chat:
        ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    sizes: dict[str, Any] = {"slots": len(ids), "max_len": max(map(len, ids)) + new_tokens}
    engine = make_engine(run.model, run.mesh, tokenizer, base=not in_chat, **sizes)

    def answers(params: dict) -> list[dict[str, str]]:
        engine.load(params)
        completions = engine.generate([Request(prompt, new_tokens) for prompt in ids])
        engine.unload()
        texts = [chat.answer_text(tokenizer, completion) for completion in completions]
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]

    return answers


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A function (done, total) that draws a bar on a terminal, and nothing elsewhere."""
    bar = tqdm(desc=what, leave=False, disable=None if jax.process_index() == 0 else True)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
