"""Evaluations: those of the base model, those of a chat model, and the functions that training
stages run between steps.

A result is a file, eval/<stage>.json, which says of which checkpoint and settings it is: asked
again, nothing is computed twice; of another checkpoint or other settings, the earlier file moves to
eval/replaced/. The chat evaluation keeps each task's score as it comes, so that a long one survives
a kill.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nanochat_jax import recipe
from nanochat_jax.common import UserError, log, read_json, write_json
from nanochat_jax.config import Recipe
from nanochat_jax.data import hub
from nanochat_jax.data.pipeline import eval_batches
from nanochat_jax.eval import chat, core, ngram
from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.inference.tools import calculator_tool
from nanochat_jax.model.gpt import param_shapes
from nanochat_jax.model.sharding import num_row_shards, param_shardings
from nanochat_jax.stages.same import ORDER, Parent, same_run
from nanochat_jax.stages.text import run_data, run_tokenizer
from nanochat_jax.stages.train import Run, has_stage, last_checkpoint, start
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_for_completion
from nanochat_jax.tools.sandbox import protections
from nanochat_jax.train.checkpoint import read_host, restore_params
from nanochat_jax.train.step import loss_tile, put_batch


def run_base_eval(config: Recipe) -> None:
    """Evaluate the base model: bits per byte on both texts, trigram yardstick, CORE, samples."""
    run = start(config)
    config, e = run.config, run.config.eval
    found = last_checkpoint(run, "base")
    keys = {k: v for k, v in recipe.flat_json(config, "eval.").items() if "eval.chat_" not in k}
    out, settings = run.dir / "eval" / "base.json", {"checkpoint": found.checksum, **keys}
    if _is_done(out, settings):
        log(f"base_eval: {out} is there, of step {found.step}")
        return
    began = time.monotonic()
    tokenizer = run_tokenizer(config)
    score_core = make_core(run, tokenizer, e.core_per_task) if e.core else None
    params = _load(run, found, tokenizer)
    train_paths, val_path = run_data(config)

    values: dict[str, Any] = {"step": found.step}
    values["val_bpb"] = text_bpb(run, tokenizer, val_path)(params)
    values["train_bpb"] = text_bpb(run, tokenizer, train_paths[0])(params)
    if e.trigram_tokens:
        values |= _trigrams(run, tokenizer, train_paths, val_path)
    if score_core:
        values |= score_core(params)
    values["samples"] = make_samples(run, tokenizer)(params)
    for name, value in values.items():
        if isinstance(value, float):
            log(f"base_eval: {name} {value:.4f}")
    for sample in values["samples"]:
        log(f"  {sample['prompt']!r} -> {sample['text']!r}")
    values |= {"eval_secs": time.monotonic() - began, "settings": settings}
    _write(run, out, values)


def run_chat_eval(config: Recipe) -> None:
    """Score the model of eval.chat_stage at every task of eval.chat_tasks, and ChatCORE."""
    name = config.eval.chat_stage
    if name not in ORDER:
        raise UserError(f"config.eval.chat_stage got {name!r}, expected one of {', '.join(ORDER)}")
    if not has_stage(config, name):
        log(f"chat_eval: this recipe has no stage {name}")
        return
    run = start(config)
    config = run.config
    specs = _of_different_names(config.eval.chat_tasks)
    found = last_checkpoint(run, name)
    keys = {k: v for k, v in recipe.flat_json(config, "eval.chat_").items() if k[10:] != "tasks"}
    made_of = {"persona": config.data.persona, "task_dir": config.data.task_dir}
    settings = {"checkpoint": found.checksum, **made_of, **keys}
    out = run.dir / "eval" / f"{name}_chat.json"
    values = {"step": found.step, "tasks": {}, "eval_secs": 0.0, "settings": settings}
    if _is_done(out, settings):
        values = read_json(out, "delete it")
    wanted = [spec for spec in specs if spec not in values["tasks"]]
    if not wanted:
        log(f"chat_eval: {out} is there, of {name}, step {found.step}")
        if values != (asked := _with_means(values, specs)):
            _write(run, out, asked)
        return
    tasks = {spec: _with_verdict(config, spec) for spec in wanted}  # all, before the first runs
    tokenizer = run_tokenizer(config)
    params = _load(run, found, tokenizer)
    for spec, task in tasks.items():
        values["tasks"][spec] = score = _chat_score(run, tokenizer, params, spec, task)
        values["eval_secs"] += score["seconds"]
        # After each task: a long evaluation can be interrupted.
        _write(run, out, _with_means(values, specs))
    log(chat.table({_metric(spec): _as_score(values["tasks"][spec]) for spec in specs}))


def _of_different_names(specs: Sequence[str]) -> Sequence[str]:
    """`specs`, of which there are some and no two report their score under the same name."""
    if not specs:
        raise UserError("config.eval.chat_tasks got no task, expected some, as in 'gsm8k test'")
    of_name: dict[str, str] = {}
    for spec in specs:
        name = _metric(spec)
        if name in of_name:
            raise UserError(
                f"config.eval.chat_tasks got {of_name[name]!r} and {spec!r}, expected one of them: "
                f"both are reported as {name}"
            )
        of_name[name] = spec
    return specs


def _with_verdict(config: Recipe, spec: str) -> Task:
    task = open_task(spec, task_dir=config.data.task_dir, persona=config.data.persona)
    if task.kind not in ("categorical", "generative"):
        raise UserError(
            f"config.eval.chat_tasks got {spec!r}, which has no right answers; leave it out"
        )
    return task


def _with_means(values: dict[str, Any], specs: Sequence[str]) -> dict[str, Any]:
    """A result with the named scores of `specs`, as far as they are there, and their means."""
    tasks = values["tasks"]
    named = {_metric(spec): tasks[spec]["accuracy"] for spec in specs if spec in tasks}
    means = chat.chatcore({name: named[name] for name in chat.CHANCE if name in named})
    kept = {key: values[key] for key in ("step", "tasks", "eval_secs", "settings")}
    return kept | named | {"chatcore_missing": means.pop("missing"), **means}


def _chat_score(
    run: Run, tokenizer: bpe.Tokenizer, params: dict, spec: str, task: Task
) -> dict[str, Any]:
    e = run.config.eval
    log(f"chat_eval: {spec}, {min(e.chat_problems or len(task), len(task)):,} problems")
    if spec.split()[0] == "humaneval":
        for protection in protections():  # those who run programs should know
            state = "enforced" if protection.enforced else "NOT ENFORCED"
            log(f"  sandbox: {protection.name} {state} ({protection.how})")
    with progress_bar(spec) as progress:
        if task.kind == "categorical":
            score = chat.categorical(
                run.model,
                run.mesh,
                params,
                tokenizer,
                task,
                batch_rows=e.device_batch_size * num_row_shards(run.mesh),
                max_problems=e.chat_problems,
                progress=progress,
            )
        else:
            problems = range(min(e.chat_problems or len(task), len(task)))
            longest = max(len(render_for_completion(tokenizer, task[i])) for i in problems)
            engine = make_engine(
                run, tokenizer, slots=e.chat_slots, max_len=longest + e.chat_max_new_tokens
            )
            engine.load(params)
            score = chat.generative(
                engine,
                tokenizer,
                task,
                max_new_tokens=e.chat_max_new_tokens,
                num_samples=e.chat_samples,
                temperature=e.chat_temperature,
                top_k=e.chat_top_k,
                seed=run.config.run.seed,
                max_problems=e.chat_problems,
                progress=progress,
            )
    log(f"chat_eval: {spec} {score.accuracy:.2%} ({score.seconds:.1f}s)")
    return score.to_json()


def _metric(spec: str) -> str:
    """The name of a task's score: the task's, unless another split than test was asked."""
    name, _, split = spec.strip().partition(" ")
    return name if split.lstrip().startswith("test") else spec


def _as_score(saved: dict[str, Any]) -> chat.Score:
    return chat.Score(**{k: v for k, v in saved.items() if k != "accuracy"})


def _is_done(out: Path, settings: dict[str, Any]) -> bool:
    return out.exists() and read_json(out, "delete it").get("settings") == settings


def _write(run: Run, out: Path, values: dict[str, Any]) -> None:
    """Write a result; one of another checkpoint or other settings is kept in replaced/."""
    if not run.is_main:
        return
    if out.exists() and not _is_done(out, values["settings"]):
        aside = out.parent / "replaced" / f"{out.stem}-{out.stat().st_mtime_ns}.json"
        log(f"{out} is of another checkpoint or other settings: moved to {aside}")
        aside.parent.mkdir(exist_ok=True)
        out.rename(aside)
    write_json(out, values)


def _load(run: Run, found: Parent, tokenizer: bpe.Tokenizer) -> dict[str, jax.Array]:
    """The parameters of a checkpoint, which must be of this recipe and tokenizer."""
    host = read_host(found.folder, found.step)
    same_run(run.config, tokenizer, host, found.folder.parent, found.name)
    shardings = param_shardings(run.mesh, param_shapes(run.model))
    return restore_params(found.folder, found.step, shardings)


def make_engine(run: Run, tokenizer: bpe.Tokenizer, *, slots: int, max_len: int) -> Engine:
    """The engine for chat: it stops where the assistant ends, and calls the calculator."""
    return Engine(
        run.model,
        run.mesh,
        slots=slots,
        max_len=max_len,
        stop_ids=(tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id),
        tool=calculator_tool(tokenizer),
    )


def make_core(
    run: Run, tokenizer: bpe.Tokenizer, per_task: int
) -> Callable[[dict], dict[str, Any]]:
    """params -> CORE and the score of each of its tasks; the data is found now, not later."""
    e, model = run.config.eval, run.model
    bundle = hub.eval_bundle(e.core_dir)

    def evaluate(params: dict) -> dict[str, Any]:
        with progress_bar("CORE") as progress:
            result = core.evaluate(
                model,
                run.mesh,
                params,
                tokenizer,
                bundle,
                max_per_task=per_task,
                device_batch_tokens=e.device_batch_size * model.seq_len,
                tile_tokens=run.config.model.loss_tile_tokens,
                progress=progress,
            )
        if result["missing"] or result["partial"]:
            log(f"not CORE: missing {result['missing']}, incomplete {result['partial']}")
        names = [name for name in ("core", "core_partial") if name in result]
        return {name: result[name] for name in names} | {"core_tasks": result}

    return evaluate


def text_bpb(run: Run, tokenizer: bpe.Tokenizer, path: Path) -> Callable[[dict], float]:
    """params -> bits per byte over the first eval.val_tokens of the shard at `path`."""
    e, model = run.config.eval, run.model
    rows = e.device_batch_size * num_row_shards(run.mesh)
    batches = eval_batches(
        path,
        tokenizer,
        seq_len=model.seq_len,
        batch_rows=rows,
        num_batches=max(1, e.val_tokens // (rows * model.seq_len)),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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


def make_samples(run: Run, tokenizer: bpe.Tokenizer) -> Callable[[dict], list[dict[str, str]]]:
    """params -> the recipe's prompts with their greedy continuations."""
    e = run.config.eval
    ids = [tokenizer.encode(prompt, bos=True) for prompt in e.prompts]
    longest = max(map(len, ids)) + e.sample_tokens
    requests = [Request(prompt, e.sample_tokens) for prompt in ids]
    engine = Engine(
        run.model, run.mesh, slots=len(ids), max_len=longest, stop_ids=(tokenizer.bos_id,)
    )

    def samples(params: dict) -> list[dict[str, str]]:
        engine.load(params)
        texts = [chat.answer_text(tokenizer, answer) for answer in engine.generate(requests)]
        engine.unload()
        return [{"prompt": p, "text": t} for p, t in zip(e.prompts, texts, strict=True)]

    return samples


def _trigrams(
    run: Run, tokenizer: bpe.Tokenizer, train_paths: list[Path], val_path: Path
) -> dict[str, float]:
    """Bits per byte on the validation rows of trigram models of the same training text."""
    e, model = run.config.eval, run.model

    def rows(paths: list[Path], tokens: int, packing: str) -> list[np.ndarray]:
        batches = eval_batches(
            paths,
            tokenizer,
            packing=packing,
            seq_len=model.seq_len,
            batch_rows=e.device_batch_size,
            num_batches=max(1, tokens // (e.device_batch_size * model.seq_len)),
        )
        return [np.concatenate([b["inputs"], b["targets"][:, -1:]], axis=1) for b in batches]

    # Trained on the rows the model trains on, scored on the rows it is scored on.
    train = rows(train_paths, e.trigram_tokens, run.config.data.packing)
    val = rows([val_path], e.val_tokens, "best_fit")
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    pieces = [p if n else b"" for p, n in zip(pieces, tokenizer.token_bytes(), strict=True)]
    token_bytes = tokenizer.token_bytes()
    return {
        "trigram_val_bpb": ngram.trigram_bpb(
            train, val, token_bytes=token_bytes, vocab_size=tokenizer.vocab_size
        ),
        "byte_trigram_val_bpb": ngram.byte_trigram_bpb(train, val, pieces=pieces),
    }


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that draws a bar on a terminal, and nothing elsewhere."""
    with tqdm(desc=what, leave=False, disable=None if jax.process_index() == 0 else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
