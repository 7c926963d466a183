"""A run: its recipe, devices, model and folder; which stages it has and what they start from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.common import UserError, atomic_write, log, run_dir
from nanochat_jax.config import Recipe, flatten
from nanochat_jax.inference.checkpoint import SCRIPTS, STAGES, StageCheckpoint, find_stage
from nanochat_jax.launch import cluster
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh, num_row_shards
from nanochat_jax.train.watch import parse_steps

# The key without which a recipe has no such stage; all have base.
TASKS = {"mid": "mid.mixture", "sft": "sft.mixture", "rl": "rl.task"}
DERIVED = "derived.txt"


@dataclass
class Run:
    """What every stage on devices starts from."""

    config: Recipe  # resolved
    mesh: Mesh
    model: GPTConfig
    dir: Path
    derived: str  # what was derived from the recipe and how, as lines

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0

    @property
    def row_shards(self) -> int:
        return num_row_shards(self.mesh)

    @property
    def process(self) -> dict[str, Any]:
        return {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def keep_derived(self) -> None:
        """Once a stage is begun or an evaluation done: later ones need not print it again."""
        if self.is_main:
            atomic_write(self.dir / DERIVED, self.derived)


def start(config: Recipe) -> Run:
    """Devices, mesh and the resolved recipe; says what was derived and how, once in a run."""
    m = config.mesh
    parse_steps(config.run.profile)  # a mistake in it is told now
    started = {k: v for k, v in m.to_dict().items() if k not in ("data", "fsdp", "tensor")}
    launch = cluster.find(os.environ, **started)
    lines = [start_runtime(compile_cache=config.run.compile_cache, launch=launch)]
    platform, num_devices = jax.default_backend(), jax.device_count()
    derived = recipe.resolve(config, platform=platform, num_devices=num_devices)
    lines += [f"  {d.key} = {d.text}  ({d.formula})" for d in derived]
    try:
        mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
        if (shards := num_row_shards(mesh)) % (processes := jax.process_count()):
            got = f"config.mesh got data x fsdp = {shards} row shards for {processes} processes"
            raise UserError(f"{got}, expected a multiple; lower config.mesh.tensor")
        model, line = check_attention(recipe.gpt_config(config), config.model.attention)
    except UserError:
        log("\n".join(lines))  # what the error is about
        raise
    folder, text = run_dir(config.run.name), "\n".join([*lines, line])
    if (folder / DERIVED).exists() and (folder / DERIVED).read_text() == text:
        log(f"{lines[0]}; derived numbers and attention as before: {folder / DERIVED}")
    else:
        log(text)
    return Run(config, mesh, model, folder, text)


def has_stage(config: Recipe, name: str) -> bool:
    """Whether the recipe has this stage at all; says so if not."""
    if name not in stages_of(config):
        log(f"{name}: this recipe has no such stage (config.{TASKS[name]} is empty)")
    return name in stages_of(config)


def stages_of(config: Recipe) -> list[str]:
    keys = flatten(config)
    return [stage for stage in STAGES if stage not in TASKS or keys[TASKS[stage]]]


def before(config: Recipe, name: str) -> str | None:
    """The stage that `name` starts from: the nearest earlier one that the recipe has."""
    earlier = [stage for stage in STAGES[: STAGES.index(name)] if stage in stages_of(config)]
    return earlier[-1] if earlier else None


def finished_parent(run: Run, name: str) -> StageCheckpoint:
    """The last checkpoint of the stage that `name` starts from, which must be complete."""
    earlier = before(run.config, name)
    assert earlier
    if not ((folder := run.dir / earlier) / "result.json").exists():
        what = f"{name} starts from stage {earlier}, which is not complete in {folder}"
        raise UserError(f"{what}; run scripts/{SCRIPTS[earlier]} with this recipe first")
    return find_stage(run.dir, earlier)
