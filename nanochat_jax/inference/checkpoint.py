"""From a run's stage to its model, ready to be evaluated or talked to.

find_stage    the newest checkpoint of a stage
open_stage    its parameters on a mesh, and the tokenizer they were trained with
open_model    both, for chat and server, which start from a recipe alone
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.common import UserError, log, run_dir, sha256_file
from nanochat_jax.config import Recipe
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.tools import make_tools, output_ids
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.train import checkpoint as saved

# The stages that train, in the order they happen, and their scripts.
SCRIPTS = {"base": "train.py", "mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py"}
STAGES = tuple(SCRIPTS)
# Keys of config.model that may differ from the checkpoint's: they say how to compute, not what.
MAY_DIFFER = ("compute_dtype", "attention", "remat", "fp8_layers", "loss_tile_tokens")


class StageCheckpoint(NamedTuple):
    """A checkpoint of a stage; `host` holds config and tokenizer hash of its training."""

    stage: str
    folder: Path  # of all checkpoints of the stage
    step: int

    @property
    def host(self) -> dict[str, Any]:
        return saved.read_host(self.folder, self.step)

    @property
    def checksum(self) -> str:
        return sha256_file(saved.step_dir(self.folder, self.step) / saved.CHECKSUMS)

    def __str__(self) -> str:
        return f"{self.stage}, step {self.step}"


class Opened(NamedTuple):
    checkpoint: StageCheckpoint
    model: GPTConfig
    mesh: Mesh
    params: dict[str, jax.Array]
    tokenizer: Tokenizer


def newest(run: Path, stage: str | None = None) -> StageCheckpoint:
    """The newest checkpoint of `stage` in a run's folder, by default of the latest that has one."""
    if stage not in (None, *STAGES):
        raise UserError(f"got stage {stage!r}, expected {', '.join(STAGES)}")
    trained = _trained(run)
    if stage not in (None, *trained) or not trained:
        has = f"checkpoints of {', '.join(trained)}" if trained else "no checkpoint"
        others = ", ".join(path.name for path in sorted(run.parent.glob("*")) if _trained(path))
        raise UserError(
            f"{run} has {has}, expected of {stage or 'any stage'}; run "
            f"scripts/{SCRIPTS[stage or 'base']} with this recipe first, or name another run "
            f"({others or 'there is none'}) with --config=FILE or --config.run.name=NAME"
        )
    stage = stage or list(trained)[-1]
    return StageCheckpoint(stage, run / stage / "checkpoints", trained[stage][-1])


def _trained(run: Path) -> dict[str, list[int]]:
    """The steps that were saved of each stage that has any."""
    steps = {name: saved.list_steps(run / name / "checkpoints") for name in STAGES}
    return {name: found for name, found in steps.items() if found}


def find_stage(run: Path, stage: str | None = None) -> StageCheckpoint:
    """The newest checkpoint of `stage`, its files as their checksums say."""
    found = newest(run, stage)
    if lines := saved.damage(found.folder, found.step):
        done = found.folder.parent / "result.json"
        raise UserError(f"{lines[0]}; delete {done} and run scripts/{SCRIPTS[found.stage]} again")
    return found


def open_stage(found: StageCheckpoint, model: GPTConfig, mesh: Mesh) -> Opened:
    """Load what `found` holds; `model` is the one it was trained as (compare found.host first)."""
    tokenizer = Tokenizer.load(found.folder.parents[1] / "tokenizer")
    was, now = found.host["tokenizer_sha256"], tokenizer.sha256()
    if was != now:
        raise UserError(
            f"the model in {found.folder} was trained with another tokenizer (SHA-256 "
            f"{was[:12]}..., now {now[:12]}...); put that one back"
        )
    shardings = param_shardings(mesh, param_shapes(model))
    params = saved.restore_params(found.folder, found.step, shardings)
    return Opened(found, model, mesh, params, tokenizer)


def open_model(config: Recipe, stage: str | None = None) -> Opened:
    """The model of a recipe's run, one copy of it on config.mesh.tensor devices; logs which."""
    found = find_stage(run_dir(config.run.name), stage)
    log(f"model: {config.run.name}, stage {found.stage}, step {found.step}")
    log(start_runtime(compile_cache=config.run.compile_cache))
    recipe.resolve(config, platform=jax.default_backend(), num_devices=jax.device_count())
    was, now = found.host["config"], recipe.flat_json(config, "model.")
    trained = {f"model.{key}": value for key, value in was["model"].items()}
    trained["tokenizer.vocab_size"] = was["tokenizer"]["vocab_size"]
    now["tokenizer.vocab_size"] = config.tokenizer.vocab_size
    may_change = tuple(f"model.{key}" for key in MAY_DIFFER)
    recipe.refuse_changes(trained, now, may_change, f"the model in {found.folder}")
    model, line = check_attention(recipe.gpt_config(config), config.model.attention)
    log(line)
    tensor = config.mesh.tensor
    mesh = make_mesh(data=1, tensor=tensor, devices=jax.devices()[:tensor])
    return open_stage(found, model, mesh)


def make_engine(
    model: GPTConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    *,
    base: bool = False,
    tools: Sequence[str] = ("calculator",),
    **sizes: Any,
) -> Engine:
    """An engine without parameters; one of a base model continues text and calls no tool.

    tools: the first is that of requests that name none. sizes: slots, max_len and burst as in
    Engine.
    """
    if base:
        return Engine(model, mesh, stop_ids=[tokenizer.bos_id], **sizes)
    return Engine(
        model,
        mesh,
        stop_ids=[tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id],
        never_ids=output_ids(tokenizer),
        tools=make_tools(tools, tokenizer),
        tool=next(iter(tools), "none"),
        **sizes,
    )
