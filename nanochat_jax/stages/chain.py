"""START HERE: the stages, each a short story told in the order it happens.

  text.py    run_data -> run_tokenizer -> run_tok_eval
  here             run_base -> run_mid -> run_sft -> run_rl
  evals.py    run_base_eval, run_chat_eval
  report.py        reads what they all leave

Each takes the whole recipe and hands its parts on as plain arguments. What a stage leaves lies in
$NANOCHAT_BASE_DIR/runs/<config.run.name>/. train.py does what all training stages share.
"""

import random
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import recipe
from nanochat_jax.common import UserError, locked, log
from nanochat_jax.config import Recipe
from nanochat_jax.data import conversations as conv
from nanochat_jax.data.pipeline import train_batches
from nanochat_jax.eval.chat import generative
from nanochat_jax.hardware import cpu_cores
from nanochat_jax.launch.runtime import require_memory
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import num_row_shards
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import build_optimizer, warm_start
from nanochat_jax.rl.rollout import practise
from nanochat_jax.stages.evals import make_core, make_engine, make_samples, text_bpb, validation_bpb
from nanochat_jax.stages.same import Parent
from nanochat_jax.stages.text import run_data, run_tokenizer
from nanochat_jax.stages.train import (
    Job,
    Run,
    before,
    chat_optimizer,
    finished,
    has_stage,
    rows_of,
    schedule,
    start,
    train_once,
)
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.registry import file_stamps, mixture, open_task
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_for_completion
from nanochat_jax.train.checkpoint import Checkpoints, restore_params
from nanochat_jax.train.loop import Evaluation
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState, abstract_state, create_state


def run_base(config: Recipe) -> int:
    """Pretrain the base model; returns the exit status."""
    return train_once(start(config), "base", _base)


def _base(run: Run) -> Job:
    config, model = run.config, run.model
    b, d = config.base, config.data
    lr_multiplier = schedule(b, b.num_steps, b.warmup_steps)
    tx = _optimizer(config, model, lr_multiplier)
    # Before the download that would be for nothing.
    require_memory(abstract_state(model, tx, run.mesh), run.mesh)
    tokenizer = run_tokenizer(config)
    train_paths, val_path = run_data(config)
    rows, rows_at_once = recipe.rows_per_step(config, num_row_shards(run.mesh))
    batches = train_batches(
        train_paths,
        tokenizer,
        seq_len=model.seq_len,
        batch_rows=rows,
        packing=d.packing,
        buffer_docs=d.buffer_docs,
        num_lanes=d.num_lanes,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=d.prefetch_batches,
    )
    bpb, samples = text_bpb(run, tokenizer, val_path), make_samples(run, tokenizer)
    evaluations = [
        Evaluation("bpb", b.eval_every, lambda params: {"val_bpb": bpb(params)}),
        Evaluation("samples", b.sample_every, lambda params: {"samples": samples(params)}),
    ]
    if config.eval.core and b.core_every:
        core = make_core(run, tokenizer, config.eval.core_loop_per_task)
        evaluations.append(Evaluation("core", b.core_every, core))
    return Job(
        name="base",
        tokenizer=tokenizer,
        num_steps=b.num_steps,
        rows=rows,
        rows_at_once=rows_at_once,
        widest=model.seq_len,
        tx=tx,
        lr_multiplier=lr_multiplier,
        batches=batches,
        next_batch=lambda weights: next(batches),
        begin=lambda target: create_state(model, tx, run.mesh, config.run.seed),
        evaluations=evaluations,
    )


def run_mid(config: Recipe) -> int:
    """Teach the base model conversations and tools; returns the exit status."""
    return _run_chat_stage(config, "mid")


def run_sft(config: Recipe) -> int:
    """Fine-tune on what the assistant says; returns the exit status."""
    return _run_chat_stage(config, "sft")


def _run_chat_stage(config: Recipe, name: str) -> int:
    if not has_stage(config, name):
        log(f"{name}: this recipe has no such stage (config.{name}.mixture is empty)")
        return 0
    return train_once(start(config), name, partial(_chat, name))


def _chat(name: str, run: Run) -> Job:
    """Mid-training and SFT: they differ in their sections only."""
    section = run.config[name]
    parent = finished(run, before(run, name) or "base", name)
    tokenizer = run_tokenizer(run.config)
    rows, rows_at_once = rows_of(run, name, section.batch_rows)
    batches = chat_batches(run, tokenizer, name, section.mixture, section.packing, rows, "train")
    num_steps = min(section.num_steps or len(batches), len(batches))
    log(f"{name}: {len(batches):,} batches of {rows:,} rows, {num_steps:,} steps")
    lr_multiplier = schedule(section, num_steps)
    tx = chat_optimizer(run, name, num_steps, lr_multiplier)
    evaluations = []
    if section.val_mixture:
        bpb = validation_bpb(run, tokenizer, _val_batches(run, tokenizer, name))
        evaluations = [
            Evaluation("bpb", section.eval_every, lambda params: {"val_bpb": bpb(params)})
        ]
    return Job(
        name=name,
        tokenizer=tokenizer,
        num_steps=num_steps,
        rows=rows,
        rows_at_once=rows_at_once,
        widest=max(batches.width(number) for number in range(num_steps)),
        tx=tx,
        lr_multiplier=lr_multiplier,
        batches=batches,
        next_batch=lambda weights: next(batches),
        begin=partial(_begin_from, run, name, parent, tx),
        evaluations=evaluations,
        parent=parent,
    )


def chat_batches(
    run: Run, tokenizer: bpe.Tokenizer, name: str, specs, packing: str, rows: int, split: str
) -> conv.ChatBatches:
    """The batches of a mixture of conversations, rendered once and kept in the stage's folder."""
    config, model = run.config, run.model
    section, folder = config[name], run.dir / name / f"{split}_conversations"
    made_of = {
        "mixture": list(specs),
        "files": file_stamps(specs, config.data.persona),
        "task_dir": config.data.task_dir,
        "tokenizer": tokenizer.sha256(),
        "max_tokens": model.seq_len + 1,
        "train_on": section.train_on,
    }

    def make() -> conv.Rendered:
        mixed = mixture(specs, task_dir=config.data.task_dir, persona=config.data.persona)
        log(f"{name}: rendering {len(mixed):,} conversations to {split} on")
        for spec, count in mixed.counts().items():
            log(f"  {count:>9,} {spec}")
        return conv.render(
            mixed,
            mixed.name,
            tokenizer,
            max_tokens=model.seq_len + 1,
            train_on=section.train_on,
            workers=cpu_cores(),
        )

    with locked(folder / "conversations.json"):
        rendered = conv.load_or_render(folder, made_of, make)
    counts = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in rendered.counts.items())
    log(f"{name}: to {split} on: {counts}")
    return conv.ChatBatches(
        rendered,
        pad_id=tokenizer.bos_id,
        seq_len=model.seq_len,
        packing=packing,
        batch_rows=rows,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=config.data.prefetch_batches,
    )


def _val_batches(run: Run, tokenizer: bpe.Tokenizer, name: str) -> list[dict[str, Any]]:
    """The first eval.val_tokens of a stage's validation mixture."""
    e, section = run.config.eval, run.config[name]
    rows = e.device_batch_size * num_row_shards(run.mesh)
    # One shape: where training has one conversation a row, validation packs them.
    packing = "stream" if section.packing == "stream" else "best_fit"
    batches = chat_batches(run, tokenizer, name, section.val_mixture, packing, rows, "validate")
    wanted = max(1, e.val_tokens // (rows * run.model.seq_len))
    return [batches[number] for number in range(min(wanted, len(batches)))]


def run_rl(config: Recipe) -> int:
    """Practise on questions whose answers can be graded; returns the exit status."""
    if not has_stage(config, "rl"):
        log("rl: this recipe has no such stage (config.rl.task is empty)")
        return 0
    return train_once(start(config), "rl", _rl)


class Practice:
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

    def close(self) -> None:
        """Nothing is held open."""


def _rl(run: Run) -> Job:
    config, r = run.config, run.config.rl
    parent = finished(run, before(run, "rl") or "base", "rl")
    tokenizer = run_tokenizer(config)
    task, val_task = (_graded_task(config, spec) for spec in (r.task, r.val_task))
    recipe.check_rl(config)
    all_steps = max(1, len(task) // r.questions_per_step)
    num_steps = min(r.num_steps or all_steps, all_steps)
    practice = Practice(len(task), r.questions_per_step, r.seed)
    longest = _longest_prompt(tokenizer, task, practice.order[: num_steps * r.questions_per_step])
    asked = range(min(r.eval_questions or len(val_task), len(val_task)))
    longest_val = _longest_prompt(tokenizer, val_task, asked)
    engine = make_engine(
        run, tokenizer, slots=r.slots, max_len=max(longest, longest_val) + r.max_new_tokens
    )
    rows, rows_at_once = rows_of(run, "rl", r.questions_per_step * r.samples)
    sampling = {
        "max_new_tokens": r.max_new_tokens,
        "temperature": r.temperature,
        "top_k": r.top_k,
    }

    def next_batch(weights) -> dict[str, Any]:
        engine.load(weights())
        seed = (r.seed, practice.step)
        batch = practise(
            engine,
            tokenizer,
            task,
            next(practice),
            samples=r.samples,
            pass_rows=r.pass_rows,
            seed=seed,
            **sampling,
        )
        engine.unload()
        ours = len(batch["inputs"]) // jax.process_count()
        ours = slice(jax.process_index() * ours, (jax.process_index() + 1) * ours)
        return {k: v[ours] if k not in ("epoch", "metrics") else v for k, v in batch.items()}

    def evaluate(params) -> dict[str, Any]:
        engine.load(params)
        score = generative(
            engine,
            tokenizer,
            val_task,
            num_samples=r.eval_samples,
            seed=r.seed,
            max_problems=r.eval_questions,
            **sampling,
        )
        engine.unload()
        return {f"pass@{k + 1}": value for k, value in enumerate(score.pass_at_k)}

    lr_multiplier = schedule(r, num_steps)
    tx = chat_optimizer(run, "rl", num_steps, lr_multiplier)
    return Job(
        name="rl",
        tokenizer=tokenizer,
        num_steps=num_steps,
        rows=rows,
        rows_at_once=rows_at_once,
        widest=conv.bucket(longest + r.max_new_tokens - 1, engine.max_len),
        tx=tx,
        lr_multiplier=lr_multiplier,
        batches=practice,
        next_batch=next_batch,
        begin=partial(_begin_from, run, "rl", parent, tx),
        evaluations=[Evaluation("pass_at_k", r.eval_every, evaluate, at_start=True)],
        weights=True,
        parent=parent,
    )


def _graded_task(config: Recipe, spec: str) -> Task:
    task = open_task(spec, task_dir=config.data.task_dir, persona=config.data.persona)
    if task.kind != "generative":
        raise UserError(
            f"config.rl got the task {spec!r}, which is {task.kind}, expected a generative one: "
            "its answers must be graded"
        )
    return task


def _longest_prompt(tokenizer: bpe.Tokenizer, task: Task, questions) -> int:
    return max(len(render_for_completion(tokenizer, task[question])) for question in questions)


def _begin_from(run: Run, name: str, parent: Parent, tx, target: TrainState) -> TrainState:
    """A stage's first state: the parent's parameters, and its optimizer's moments if wanted."""
    log(f"{name}: starting from {parent.name}, step {parent.step}")
    everywhere = NamedSharding(run.mesh, P())
    key = jax.device_put(jax.random.key_data(jax.random.key(run.config.run.seed)), everywhere)
    step = jax.device_put(jax.numpy.int32(0), everywhere)
    owners = Owners(run.model, run.mesh)
    on_disk = owners.on_disk(target)
    if name != "rl" and run.config[name].warm_start:
        saved = Checkpoints(parent.folder, keep=10**9).restore(on_disk, parent.step)
        saved = owners.to_owned(saved)
        return saved._replace(step=step, opt_state=warm_start(saved.opt_state), key=key)
    shardings = {path: leaf.sharding for path, leaf in on_disk.params.items()}
    params = owners.to_owned(restore_params(parent.folder, parent.step, shardings))
    places = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
    with jax.set_mesh(run.mesh):
        opt_state = jax.jit(tx.init, out_shardings=places)(params)
    return TrainState(step, params, opt_state, key)


def _optimizer(config: Recipe, model: GPTConfig, lr_multiplier):
    b, o = config.base, config.optim
    decay = recipe.weight_decay(config)
    return build_optimizer(
        param_shapes(model),
        model.model_dim,
        recipe.optim_config(config, jax.default_backend()),
        lr_multiplier=lr_multiplier,
        momentum=partial(
            schedules.muon_momentum,
            num_steps=b.num_steps,
            warmdown_frac=b.warmdown_frac,
            start=o.momentum_start,
            peak=o.momentum,
            end=o.momentum_end,
            warmup_steps=o.momentum_warmup_steps,
        ),
        weight_decay=lambda step: decay * schedules.cosine_to_zero(step, num_steps=b.num_steps),
    )
