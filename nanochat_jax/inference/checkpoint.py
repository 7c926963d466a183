"""A trained model of a run, opened to talk to: checkpoint, tokenizer, engine.

The newest checkpoint of a stage, on one copy of the model (config.mesh.tensor devices). It is used
only if its files match their checksums, the recipe's model is the one it was trained as, and the
tokenizer the one it was trained with.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.common import UserError, log, run_dir
from nanochat_jax.config import Recipe
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.tools import make_tool
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.train.checkpoint import damage, list_steps, read_host, restore_params

STAGES = ("base", "mid", "sft", "rl")  # in the order they happen
# What may differ from the recipe of the checkpoint: it says how to compute, not what.
MAY_CHANGE = (
    "model.compute_dtype",
    "model.attention",
    "model.remat",
    "model.fp8_layers",
    "model.loss_tile_tokens",
)


class Opened(NamedTuple):
    stage: str
    step: int
    config: GPTConfig
    mesh: Mesh
    params: dict[str, jax.Array]
    tokenizer: Tokenizer


def open_model(config: Recipe, stage: str | None = None) -> Opened:
    """The newest checkpoint of `stage`, by default of the latest stage that has one; says which."""
    if stage is not None and stage not in STAGES:
        raise UserError(f"got stage {stage!r}, expected one of {', '.join(STAGES)}")
    folders = {s: run_dir(config.run.name) / s / "checkpoints" for s in STAGES}
    trained = {s: steps[-1] for s, folder in folders.items() if (steps := list_steps(folder))}
    if not trained:
        raise UserError(
            f"{run_dir(config.run.name)} has no checkpoint; name the run with --config=FILE or "
            "--config.run.name=NAME, or train it first"
        )
    if stage is None:
        stage = list(trained)[-1]
    if stage not in trained:
        raise UserError(
            f"{run_dir(config.run.name)} has no checkpoint of stage {stage}, only of "
            f"{', '.join(trained)}; choose one of these or train that stage first"
        )
    step, folder = trained[stage], folders[stage]
    log(f"model: {config.run.name}, stage {stage}, step {step}")
    if lines := damage(folder, step):
        raise UserError(f"{lines[0]}; choose another --stage, or train this one again")

    start_runtime(compile_cache=config.run.compile_cache)
    recipe.resolve(config, platform=jax.default_backend(), num_devices=jax.device_count())
    host = read_host(folder, step)
    before = {f"model.{key}": value for key, value in host["config"]["model"].items()}
    before["tokenizer.vocab_size"] = host["config"]["tokenizer"]["vocab_size"]
    now = recipe.flat_json(config, "model.") | recipe.flat_json(config, "tokenizer.vocab_size")
    recipe.refuse_changes(before, now, MAY_CHANGE, f"the model in {folder}")
    tokenizer = Tokenizer.load(run_dir(config.run.name) / "tokenizer")
    if host["tokenizer_sha256"] != tokenizer.sha256():
        raise UserError(
            f"the model in {folder} was trained with another tokenizer (SHA-256 "
            f"{host['tokenizer_sha256'][:12]}..., now {tokenizer.sha256()[:12]}...); put that one "
            "back"
        )

    model, _ = check_attention(recipe.gpt_config(config), config.model.attention)
    tensor = config.mesh.tensor
    if tensor > jax.device_count():
        raise UserError(
            f"config.mesh.tensor got {tensor}, there are {jax.device_count()} devices; lower it"
        )
    mesh = make_mesh(data=1, tensor=tensor, devices=jax.devices()[:tensor])
    params = restore_params(folder, step, param_shardings(mesh, param_shapes(model)))
    return Opened(stage, step, model, mesh, params, tokenizer)


def start_engine(
    opened: Opened, *, slots: int, burst: int, tool_name: str = "calculator"
) -> Engine:
    """An engine for its context length; a chat model stops after its answer and may use a tool."""
    tokenizer = opened.tokenizer
    stop_ids, tool = {tokenizer.bos_id}, make_tool(tool_name, tokenizer)
    if opened.stage == "base":
        tool = None
    else:
        stop_ids |= {tokenizer.special_id("<|assistant_end|>")}
    engine = Engine(
        opened.config,
        opened.mesh,
        slots=slots,
        max_len=opened.config.seq_len,
        stop_ids=stop_ids,
        tool=tool,
        burst=burst,
    )
    engine.load(opened.params)
    return engine
