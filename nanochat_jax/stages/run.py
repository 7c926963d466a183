"""A run: its recipe, devices, model and folder; which stages it has and what they start from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.common import UserError, atomic_write, log, run_dir
from nanochat_jax.config import Recipe
from nanochat_jax.inference.checkpoint import StageCheckpoint, find_stage
from nanochat_jax.launch import cluster
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh, num_row_shards
from nanochat_jax.train.watch import parse_steps

# Stages that train, in order: the key without which a recipe does not have it, and the script.
TASKS = {"base": "base.num_steps", "mid": "mid.mixture", "sft": "sft.mixture", "rl": "rl.task"}
SCRIPTS = {"base": "train.py", "mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py"}
ORDER = tuple(TASKS)


@dataclass
class Run:
    """What every stage on devices starts from."""

    config: Recipe  # resolved
    mesh: Mesh
    model: GPTConfig
    dir: Path

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0

    @property
    def row_shards(self) -> int:
        return num_row_shards(self.mesh)

    @property
    def process(self) -> dict[str, Any]:
        return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def start(config: Recipe) -> Run:
    """Devices, mesh and the resolved recipe; says what was derived and how, once in a run."""
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
    lines = [start_runtime(compile_cache=config.run.compile_cache, launch=launch)]
    platform, num_devices = jax.default_backend(), jax.device_count()
    for key, value, formula in recipe.resolve(config, platform=platform, num_devices=num_devices):
        lines.append(f"  {key} = {value:,}" if isinstance(value, int) else f"  {key} = {value}")
        lines[-1] += f"  ({formula})"
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    run = Run(config, mesh, recipe.gpt_config(config), run_dir(config.run.name))
    if run.row_shards % jax.process_count():
        raise UserError(
            f"config.mesh got data x fsdp = {run.row_shards} row shards for "
            f"{jax.process_count()} processes, expected a multiple; lower config.mesh.tensor"
        )
    run.model, line = check_attention(run.model, config.model.attention)
    _tell_once(run, "\n".join([*lines, line]))
    return run


def _tell_once(run: Run, text: str) -> None:
    """Print what was derived, unless an earlier stage of the run has said the same."""
    told = run.dir / "derived.txt"
    if told.exists() and told.read_text() == text:
        log(f"{text.splitlines()[0]}; derived numbers and attention as before: {told}")
    else:
        log(text)
        if run.is_main:
            atomic_write(told, text)


def has_stage(config: Recipe, name: str) -> bool:
    """Whether the recipe has this stage at all; says so if not."""
    if not _names_tasks(config, name):
        log(f"{name}: this recipe has no such stage (config.{TASKS[name]} is empty)")
        return False
    return True


def _names_tasks(config: Recipe, name: str) -> bool:
    section, key = TASKS[name].split(".")
    return name == "base" or bool(config[section][key])


def before(config: Recipe, name: str) -> str | None:
    """The stage that `name` starts from: the nearest earlier one that the recipe has."""
    earlier = [stage for stage in ORDER[: ORDER.index(name)] if _names_tasks(config, stage)]
    return earlier[-1] if earlier else None


def finished_parent(run: Run, name: str) -> StageCheckpoint:
    """The last checkpoint of the stage that `name` starts from, which must be complete."""
    earlier = before(run.config, name)
    assert earlier
    if not (run.dir / earlier / "result.json").exists():
        raise UserError(
            f"{name} starts from stage {earlier}, which is not complete in {run.dir / earlier}; "
            f"run scripts/{SCRIPTS[earlier]} with this recipe first"
        )
    return find_stage(run.dir, earlier)
