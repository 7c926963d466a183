"""START HERE: how a stage trains, from its recipe to a finished checkpoint.

  scripts/train.py, mid_train.py, chat_sft.py, chat_rl.py
    train_stage     is it complete? else train it, in a smaller layout if memory runs out
      Stage         what is its own: base.py, chat.py (mid and SFT), rl.py
      _train        continue or begin, compile, fit() (train/loop.py), say what happened

text.py makes data and tokenizer, evals.py evaluates, report/ reads what all of them leave.
"""

from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import hardware, plan, recipe
from nanochat_jax.common import EXIT_RESUME_ME, UserError, log, write_json
from nanochat_jax.config import Recipe
from nanochat_jax.data.pipeline import merge_states
from nanochat_jax.inference.checkpoint import StageCheckpoint
from nanochat_jax.launch.provenance import RunInfo, only_one
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.model.gpt import param_shapes
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import build_optimizer, warm_start
from nanochat_jax.stages.run import Run, has_stage, start
from nanochat_jax.stages.same import same_parent, same_result, same_run
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.train.checkpoint import Checkpoints, read_data_states, read_host, restore_params
from nanochat_jax.train.layout import LayoutRecord, candidates, note_too_large
from nanochat_jax.train.loop import LoopState, Trainee, fit
from nanochat_jax.train.memory import OutOfMemory, outside_the_step, return_freed_memory
from nanochat_jax.train.metrics import Console, MetricsLog, format_secs
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState, abstract_state
from nanochat_jax.train.step import step_for_widths
from nanochat_jax.train.watch import Watch, parse_steps

LAYOUT = "layout.json"


class Stage(Trainee):
    """A stage that trains: Base, Mid, SFT, RL. Their __init__(run) sets what is declared here and
    calls use_rows and use_optimizer."""

    name: str  # its folder, and its section of the recipe
    tokenizer: Tokenizer
    widest: int  # tokens of the longest row
    parent: StageCheckpoint | None = None

    def __init__(self, run: Run):
        self.run, self.section = run, run.config[self.name]
        self.owners, self.save_every = Owners(run.model, run.mesh), self.section.save_every

    def use_rows(self, rows: int) -> None:
        """rows: of a step, on all devices."""
        self.rows, shards = rows, self.run.row_shards
        if rows % shards:
            raise UserError(f"{self.name}: got {rows} rows a step, expected a multiple of {shards}")

    def use_optimizer(self, num_steps: int) -> None:
        self.num_steps = num_steps
        config, model = self.run.config, self.run.model
        self.tx, self.lr_multiplier = optimizer(config, model, self.name, num_steps)

    def init(self, target: TrainState) -> TrainState:
        """The first state: the parent's parameters, and its optimizer's moments if wanted."""
        run, parent, owners = self.run, self.parent, self.owners
        assert parent
        log(f"{self.name}: starting from {parent}")
        key = jax.random.key_data(jax.random.key(run.config.run.seed))
        step, key = jax.device_put((jnp.int32(0), key), NamedSharding(run.mesh, P()))
        on_disk = owners.on_disk(target)
        if self.section.get("warm_start"):
            saved = Checkpoints(parent.folder, keep=10**9).restore(on_disk, parent.step)
            saved = owners.to_owned(saved)
            return saved._replace(step=step, opt_state=warm_start(saved.opt_state), key=key)
        shardings = {path: leaf.sharding for path, leaf in on_disk.params.items()}
        params = owners.to_owned(restore_params(parent.folder, parent.step, shardings))
        places = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
        with jax.set_mesh(run.mesh):
            opt_state = jax.jit(self.tx.init, out_shardings=places)(params)
        return TrainState(step, params, opt_state, key)


def optimizer(config: Recipe, model, name: str, num_steps: int):
    """(transform, learning-rate multiplier) of a stage: base warms up, moves Muon's momentum and
    lets its decay fall to 0; the later stages have rates of their own."""
    o, s, is_base = config.optim, config[name], name == "base"
    of_muon = o if is_base else s
    if o.recipe == "classic" and of_muon.weight_decay:
        got = f"config.{'optim' if is_base else name}.weight_decay got {of_muon.weight_decay}"
        raise UserError(
            f"{got}, expected 0 (classic Muon has no decay) or config.optim.recipe=modern"
        )
    lr_multiplier = partial(
        schedules.lr_multiplier,
        num_steps=num_steps,
        warmup_steps=s.warmup_steps if is_base else 0,
        warmdown_frac=s.warmdown_frac,
        final_frac=s.final_lr_frac,
    )
    momentum = partial(
        schedules.muon_momentum,
        num_steps=num_steps,
        warmdown_frac=s.warmdown_frac if is_base else 0.0,
        start=o.momentum_start,
        peak=of_muon.momentum,
        end=o.momentum_end if is_base else s.momentum,
        warmup_steps=of_muon.momentum_warmup_steps,
    )
    own = () if is_base else ("embed_lr", "unembed_lr", "lr_frac", "scalar_frac")
    rates = recipe.optim_config(config, jax.default_backend(), **{key: s[key] for key in own})
    decay = recipe.weight_decay(config) if is_base else s.weight_decay

    def weight_decay(step):
        return decay * schedules.cosine_to_zero(step, num_steps=num_steps) if is_base else decay

    courses = {"lr_multiplier": lr_multiplier, "momentum": momentum, "weight_decay": weight_decay}
    return build_optimizer(param_shapes(model), model.model_dim, rates, **courses), lr_multiplier


def train_stage(config: Recipe, kind: type[Stage]) -> int:
    """Train a stage unless it is complete or the recipe has none; returns the exit status."""
    name = kind.name
    if not has_stage(config, name):
        return 0
    run = start(config)
    folder = run.dir / name
    with only_one(folder) if run.is_main else nullcontext():
        if same_result(run, name):
            log(f"{name}: complete, {folder / 'result.json'} is there")
            return 0
        if run.model.fp8_layers:
            hardware.check_fp8(jax.local_devices()[0], run.model.compute_dtype)
        info = RunInfo(folder, run.is_main)
        while True:
            with outside_the_step(name):
                stage = kind(run)
                try:
                    with closing(stage.batches):
                        return _train(run, stage, info)
                except OutOfMemory as error:
                    status = ran_out(name, folder, error, jax.process_count())
            if status is not None:
                return status
            del stage
            return_freed_memory()


def ran_out(name: str, folder: Path, error: OutOfMemory, num_processes: int) -> int | None:
    """Note that the layout taken is too large; the exit status, unless this process can go on: one
    of several cannot, because the others wait for it in the middle of the step."""
    layout = note_too_large(folder / LAYOUT)
    log(f"{name}: out of memory with {layout} ({error}); the next start takes a smaller one")
    return None if num_processes == 1 else EXIT_RESUME_ME


def _train(run: Run, stage: Stage, info: RunInfo) -> int:
    config, name, owners, parent = run.config, stage.name, stage.owners, stage.parent
    folder, target = run.dir / name, abstract_state(stage.owners, stage.tx)
    parent_sum = parent.checksum if parent else None
    host_info = {"config": config.to_dict(), "tokenizer_sha256": stage.tokenizer.sha256()}
    host_info, keep = host_info | {"parent": parent_sum}, stage.section.keep_checkpoints
    checkpoints = Checkpoints(folder / "checkpoints", keep, host_info, on_save=info.update)
    found, loop_state = checkpoints.latest_intact(), LoopState()
    if found is not None:
        host = read_host(checkpoints.directory, found)
        same_run(config, stage.tokenizer, host, folder, name)
        same_parent(host.get("parent"), parent, folder)
        stage.batches.set_state(merge_states(read_data_states(checkpoints.directory, found)))
        loop_state = LoopState(**host["loop"])
        log(f"{name}: continuing from the checkpoint at step {found}")
    elif parent:
        same_run(config, stage.tokenizer, parent.host, parent.folder.parent, parent.stage)
    stage.batches.start_prefetch()  # the first batches are made while the step is compiled
    record = layout_record(stage)
    options = {"tile_tokens": config.model.loss_tile_tokens}
    options["grad_clip"] = config.optim.grad_clip if name == "base" else 0.0
    shape = {"rows": stage.rows, "widest": stage.widest, "has_token_weights": stage.on_policy}
    train_step = step_for_widths(owners, stage.tx, record, target, **shape, **options)
    if found is None:
        state = stage.init(target)
    else:
        state = owners.to_owned(checkpoints.restore(owners.on_disk(target), found))

    if run.is_main:
        write_json(folder / "config.json", config.to_dict())
    run.keep_derived()
    # The rate of on-policy steps says nothing of later ones: it counts the time of sampling.
    later_tokens = 0.0 if stage.on_policy else plan.later_tokens(config, name)
    info.values["later_tokens"] = later_tokens
    flops, peak = _tell_cost(stage, info, record)
    first, steps = int(state.step), parse_steps(config.run.profile)
    tracker = config.run.tracker, config.run.name
    metrics = MetricsLog(folder / "metrics.jsonl", first, *tracker, run.is_main)
    console = Console(stage.num_steps, first, flops, peak, later_tokens)
    watch = Watch(steps, folder / "profile", range(first, stage.num_steps), console.line)
    with closing(metrics), closing(console):
        step, finished = fit(
            stage, state, loop_state, train_step, owners, checkpoints, metrics, console, watch
        )
    if counts := stage.batches.counts():
        info.values["documents"] = counts
        log(f"{name}: read so far: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    info.update()
    if not finished:
        log(f"{name}: stopped at step {step}, saved; run the same command to continue")
        return EXIT_RESUME_ME
    if run.is_main:
        done = {"step": step, "elapsed_secs": loop_state.elapsed_secs, "parent": parent_sum}
        write_json(folder / "result.json", done)
    return 0


def layout_record(stage: Stage) -> LayoutRecord:
    """What a stage may take and has taken, under the limits of its recipe and mesh."""
    run, most_rows = stage.run, stage.section.device_batch_size
    share, remat = stage.rows // run.row_shards, run.config.model.remat
    layouts = candidates(share, most_rows, stage.widest, remat)
    made_for = {
        "mesh": dict(run.mesh.shape),
        "device": run.mesh.devices.flat[0].device_kind,
        "width": stage.widest,
        "tile": run.config.model.loss_tile_tokens,
        "attention": run.model.attention_backend,
    }
    return LayoutRecord(run.dir / stage.name / LAYOUT, made_for, layouts)


def _tell_cost(stage: Stage, info: RunInfo, record: LayoutRecord) -> tuple[float, float | None]:
    """(FLOPs of a token, peak FLOP/s of the devices); says and notes what the stage will cost."""
    run, name = stage.run, stage.name
    flops, tokens = train_flops_per_token(run.model), stage.rows * stage.widest
    device, steps = run.mesh.devices.flat[0], stage.num_steps
    peak, source = hardware.compute_ceiling(device.platform, device.device_kind, run.mesh.size)
    if run.model.fp8_layers:
        source += f", while fp8 multiplies in {', '.join(run.model.fp8_layers)}"
    info.values |= {"params": param_counts(run.model), "flops_per_token": flops}
    info.values |= {"tokens_per_step": tokens, "num_steps": steps}
    info.values |= {"peak_flops": peak, "peak_flops_source": source}
    info.values |= {"parent": stage.parent and str(stage.parent), "layout": str(record.taken)}
    info.update()
    line = f"{name}: {steps:,} steps of {flops * tokens / 1e12:,.3g} TFLOP"
    if peak:
        at_best = format_secs(steps * flops * tokens / peak)
        line += f", {at_best} at {peak / 1e12:,.2f} TFLOP/s"
    log(f"{line}; MFU is against {source}")
    return flops, peak
