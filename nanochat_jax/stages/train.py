"""How every stage trains: prepare, continue or begin, fit, and say what happened.

A stage describes itself as a Job; `train_once` does the rest, the same for all of them. A stage
that is complete says so and returns; one that was interrupted continues; one whose recipe or
starting point changed says what differs and refuses (same.py). One that runs out of memory
continues from its last checkpoint in a smaller layout (train/layout.py).
"""

import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax import hardware, recipe
from nanochat_jax.common import EXIT_RESUME_ME, UserError, log, read_json, run_dir, write_json
from nanochat_jax.config import Recipe
from nanochat_jax.data.pipeline import merge_states
from nanochat_jax.launch import cluster
from nanochat_jax.launch.provenance import RunInfo, only_one
from nanochat_jax.launch.runtime import (
    outside_the_step,
    return_freed_memory,
    start_runtime,
    step_for_widths,
)
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh, num_row_shards
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import build_optimizer
from nanochat_jax.stages.same import (
    ORDER,
    Parent,
    same_files,
    same_parent,
    same_recipe,
    same_run,
)
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.train.checkpoint import (
    Checkpoints,
    damage,
    list_steps,
    read_data_states,
    read_host,
)
from nanochat_jax.train.layout import (
    Layout,
    LayoutRecord,
    OutOfMemory,
    candidates,
    note_too_large,
)
from nanochat_jax.train.loop import Evaluation, LoopState, fit
from nanochat_jax.train.metrics import Console, MetricsLog, format_secs
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState, abstract_state
from nanochat_jax.train.step import make_train_step, put_batch
from nanochat_jax.train.watch import Trace, parse_steps

LAYOUT = "layout.json"
SCRIPTS = {"base": "train.py", "mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py"}


@dataclass
class Run:
    """What every stage on devices starts from."""

    config: Recipe  # resolved
    mesh: Mesh
    model: GPTConfig
    dir: Path
    is_main: bool


def start(config: Recipe) -> Run:
    """Devices, mesh and the resolved recipe; prints what was derived and how."""
    m = config.mesh
    parse_steps(config.run.profile)  # a mistake in it is told now
    launch = cluster.find(
        os.environ,
        launcher=m.launcher,
        coordinator=m.coordinator,
        num_processes=m.num_processes,
        process_id=m.process_id,
        local_device_ids=m.local_device_ids,
    )
    start_runtime(compile_cache=config.run.compile_cache, launch=launch)
    for key, value, formula in recipe.resolve(
        config, platform=jax.default_backend(), num_devices=jax.device_count()
    ):
        log(f"  {key} = {value:,}  ({formula})" if isinstance(value, int) else f"  {key} = {value}")
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    if num_row_shards(mesh) % jax.process_count():
        raise UserError(
            f"config.mesh got data x fsdp = {num_row_shards(mesh)} row shards for "
            f"{jax.process_count()} processes, expected a multiple; lower config.mesh.tensor"
        )
    model = check_attention(recipe.gpt_config(config), config.model.attention)
    return Run(config, mesh, model, run_dir(config.run.name), jax.process_index() == 0)


@dataclass
class Job:
    """What makes a stage's training its own."""

    name: str  # of the stage: its folder, and its section of the recipe
    tokenizer: Tokenizer
    num_steps: int
    rows: int  # a step
    rows_at_once: int  # on a device, at most
    widest: int  # tokens of the longest row
    tx: Any
    lr_multiplier: Callable[[int], Any]
    batches: Any  # has get_state, set_state and close
    next_batch: Callable[[Callable[[], dict]], dict[str, Any]]  # given weights(), as in fit()
    begin: Callable[[TrainState], TrainState]  # the abstract state -> the state to start from
    evaluations: list[Evaluation] = field(default_factory=list)
    weights: bool = False  # batches bring weights for their tokens
    parent: Parent | None = None


def train_once(run: Run, name: str, make_job: Callable[[Run], Job]) -> int:
    """Train stage `name` unless it is complete; returns the exit status."""
    stage = run.dir / name
    with only_one(stage) if run.is_main else nullcontext():
        if (stage / "result.json").exists():
            saved = read_json(stage / "config.json", f"delete {stage} to start over")
            same_recipe(run.config, saved, stage, name)
            result = read_json(stage / "result.json", f"delete {stage} to start over")
            earlier = before(run, name)
            folder = run.dir / (earlier or name) / "checkpoints"
            steps = list_steps(folder)
            if earlier and steps:  # deleted to save space, it cannot be another one
                same_parent(result.get("parent"), Parent(earlier, folder, steps[-1]), stage)
            if name in ("mid", "sft"):
                same_files(run.config, stage, name)
            log(f"{name}: complete, {stage / 'result.json'} is there")
            return 0
        if run.model.fp8_layers:
            hardware.check_fp8(jax.local_devices()[0], run.model.compute_dtype)
        return _train_in_memory(run, stage, make_job, RunInfo(stage, run.is_main))


def _train_in_memory(run: Run, stage: Path, make_job: Callable[[Run], Job], info: RunInfo) -> int:
    """_train, again and in a smaller layout for as long as it runs out of memory."""
    while True:
        with outside_the_step(stage.name):
            job = make_job(run)
            try:
                with closing(job.batches):
                    return _train(run, stage, job, info)
            except OutOfMemory as error:
                layout, said = note_too_large(stage / LAYOUT), str(error)
        log(f"{stage.name}: out of memory with {layout} ({said}); continuing in a smaller layout")
        if jax.process_count() > 1:  # the others wait for this one in the middle of the step
            log(f"{stage.name}: ends, so that all start anew; the same command continues")
            return EXIT_RESUME_ME
        del job
        return_freed_memory()


def _train(run: Run, stage: Path, job: Job, info: RunInfo) -> int:
    config, mesh, model, name = run.config, run.mesh, run.model, job.name
    section = config[name]
    target, owners = abstract_state(model, job.tx, mesh), Owners(model, mesh)
    checkpoints = Checkpoints(stage / "checkpoints", section.keep_checkpoints)
    found, loop_state = checkpoints.latest_intact(), LoopState()
    if found is not None:
        host = read_host(checkpoints.directory, found)
        same_run(config, job.tokenizer, host, stage, name)
        same_parent(host.get("parent"), job.parent, stage)
        job.batches.set_state(merge_states(read_data_states(checkpoints.directory, found)))
        loop_state = LoopState(**host["loop"])
        log(f"{name}: continuing from the checkpoint at step {found}")
    elif job.parent:
        host = read_host(job.parent.folder, job.parent.step)
        same_run(config, job.tokenizer, host, job.parent.folder.parent, job.parent.name)
    if hasattr(job.batches, "start_prefetch"):
        job.batches.start_prefetch()  # the first batches are made while the step is compiled
    make_step = partial(_step_in, run=run, job=job)
    record = layout_record(run, stage, job)
    train_step = step_for_widths(
        make_step, record, target, job.rows, job.widest, mesh, weights=job.weights
    )
    if found is None:
        state = job.begin(target)
    else:
        state = owners.to_owned(checkpoints.restore(owners.on_disk(target), found))

    if run.is_main:
        write_json(stage / "config.json", config.to_dict())
    flops = train_flops_per_token(model)
    tokens_per_step = job.rows * job.widest
    device = mesh.devices.flat[0]
    peak, peak_source = hardware.compute_ceiling(device.platform, device.device_kind, mesh.size)
    if model.fp8_layers:
        peak_source += f", while fp8 multiplies in {', '.join(model.fp8_layers)}"
    info.values |= {
        "params": param_counts(model),
        "flops_per_token": flops,
        "tokens_per_step": tokens_per_step,
        "num_steps": job.num_steps,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
        "parent": job.parent and f"{job.parent.name}, step {job.parent.step}",
        "layout": str(record.taken),
    }
    info.update()
    step_flops = flops * tokens_per_step
    log(f"{name}: a step is {step_flops / 1e12:,.1f} TFLOP; MFU is against {peak_source}")
    if peak:
        at_best = job.num_steps * step_flops / peak
        log(f"{name}: {peak / 1e12:,.2f} TFLOP/s, so all steps take {format_secs(at_best)} at best")
    metrics = MetricsLog(
        stage / "metrics.jsonl", int(state.step), config.run.tracker, config.run.name, run.is_main
    )
    console = Console(job.num_steps, int(state.step), flops, peak)
    steps, coming = parse_steps(config.run.profile), range(int(state.step), job.num_steps)
    trace = Trace(steps, stage / "profile", coming, console.line)
    parent = job.parent.checksum if job.parent else None
    host_info = {"config": config.to_dict(), "tokenizer_sha256": job.tokenizer.sha256()}
    with closing(metrics), closing(console):
        result = fit(
            state=state,
            owners=owners,
            loop_state=loop_state,
            train_step=train_step,
            batches=job.batches,
            next_batch=job.next_batch,
            put=partial(put_batch, mesh=mesh),
            num_steps=job.num_steps,
            lr_multiplier=job.lr_multiplier,
            evaluations=job.evaluations,
            save_every=section.save_every,
            checkpoints=checkpoints,
            on_save=info.update,
            host_info=host_info | {"parent": parent},
            metrics=metrics,
            console=console,
            trace=trace,
        )
    if hasattr(job.batches, "counts"):
        info.values["documents"] = counts = job.batches.counts()
        log(f"{name}: read so far: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    info.update()
    if not result.finished:
        log(f"{name}: stopped at step {result.step}, saved; run the same command to continue")
        return EXIT_RESUME_ME
    if run.is_main:
        done = {"step": result.step, "elapsed_secs": loop_state.elapsed_secs, "parent": parent}
        write_json(stage / "result.json", done)
    return 0


def _step_in(layout: Layout, run: Run, job: Job):
    """The training step of a job in one of its layouts."""
    return make_train_step(
        replace(run.model, remat=layout.remat),
        job.tx,
        run.mesh,
        device_batch_size=layout.rows,
        tile_tokens=run.config.model.loss_tile_tokens,
        grad_clip=run.config.optim.grad_clip if job.name == "base" else 0.0,
    )


def layout_record(run: Run, stage: Path, job: Job) -> LayoutRecord:
    """What stage `job.name` may take and has taken, under the limits of its recipe and mesh."""
    share = job.rows // num_row_shards(run.mesh)
    layouts = candidates(share, job.rows_at_once, job.widest, run.config.model.remat)
    device = run.mesh.devices.flat[0].device_kind
    tile = run.config.model.loss_tile_tokens
    made_for = {"mesh": dict(run.mesh.shape), "device": device, "width": job.widest, "tile": tile}
    made_for["attention"] = run.model.attention_backend
    return LayoutRecord(stage / LAYOUT, made_for, layouts)


def schedule(section: Recipe, num_steps: int, warmup_steps: int = 0) -> Callable[[int], Any]:
    """The learning-rate multiplier of a stage, a function of the step."""
    return partial(
        schedules.lr_multiplier,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        warmdown_frac=section.warmdown_frac,
        final_frac=section.final_lr_frac,
    )


def chat_optimizer(run: Run, name: str, num_steps: int, lr_multiplier):
    """The optimizer of a stage after pretraining."""
    section, o = run.config[name], run.config.optim
    momentum = section.momentum
    return build_optimizer(
        param_shapes(run.model),
        run.model.model_dim,
        recipe.optim_config(
            run.config,
            jax.default_backend(),
            embed_lr=section.embed_lr,
            unembed_lr=section.unembed_lr,
            lr_frac=section.lr_frac,
            scalar_frac=section.scalar_frac,
        ),
        lr_multiplier=lr_multiplier,
        momentum=partial(
            schedules.muon_momentum,
            num_steps=num_steps,
            warmdown_frac=0.0,
            start=o.momentum_start,
            peak=momentum,
            end=momentum,
            warmup_steps=section.momentum_warmup_steps,
        ),
        weight_decay=lambda step: section.weight_decay,
    )


def rows_of(run: Run, name: str, rows: int) -> tuple[int, int]:
    """(rows of a step, the most a device works on at once) of a stage after pretraining; 0:
    base's."""
    config, shards = run.config, num_row_shards(run.mesh)
    rows = rows or recipe.rows_per_step(config, shards)[0]
    return rows, recipe.rows_at_once(name, rows, shards, config[name].device_batch_size)


def has_stage(config: Recipe, name: str) -> bool:
    """Whether the recipe has this stage at all."""
    tasks = {"base": True, "mid": config.mid.mixture, "sft": config.sft.mixture}
    return bool(tasks.get(name, config.rl.task))


def before(run: Run, name: str) -> str | None:
    """The stage that `name` starts from: the nearest earlier one that the recipe has."""
    earlier = [s for s in ORDER[: ORDER.index(name)] if has_stage(run.config, s)]
    return earlier[-1] if earlier else None


def finished(run: Run, name: str, asked_by: str) -> Parent:
    """The last checkpoint of a stage that must be complete by now."""
    if not (run.dir / name / "result.json").exists():
        raise UserError(
            f"{asked_by} starts from stage {name}, which is not complete in {run.dir / name}; run "
            f"scripts/{SCRIPTS[name]} with this recipe first"
        )
    return last_checkpoint(run, name)


def last_checkpoint(run: Run, name: str) -> Parent:
    folder = run.dir / name / "checkpoints"
    steps = list_steps(folder)
    if not steps:
        raise UserError(
            f"no checkpoint in {folder}; run scripts/{SCRIPTS[name]} with this recipe first"
        )
    if lines := damage(folder, steps[-1]):
        done = run.dir / name / "result.json"
        raise UserError(f"{lines[0]}; delete {done} and run scripts/{SCRIPTS[name]} again")
    return Parent(name, folder, steps[-1])
