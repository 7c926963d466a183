"""What must be as it was when a run is continued, or a stage starts from another.

A checkpoint is only continued under the recipe, tokenizer and starting point it was made with, and
a complete stage only counts if it was made from what is there now. Every refusal is a UserError
that says what differs.
"""

from pathlib import Path
from typing import Any

from nanochat_jax import recipe
from nanochat_jax.common import UserError, read_json
from nanochat_jax.config import Recipe, flatten
from nanochat_jax.inference.checkpoint import STAGES, StageCheckpoint, newest
from nanochat_jax.stages.run import Run, before
from nanochat_jax.tasks.registry import file_stamps
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.train.checkpoint import list_steps

# What may differ when a run is continued: it decides where and how often, never what is learned.
MAY_CHANGE = (
    "run.tracker",
    "run.compile_cache",
    "run.profile",
    "mesh.",
    "data.local_dir",
    "data.task_dir",
    "data.persona",  # what was rendered with it is compared instead
    "data.prefetch_batches",
    "model.attention",
    "model.remat",
    "model.loss_tile_tokens",
    "base.sample_every",
    "base.core_every",
    "rl.slots",
    "rl.val_task",
    "rl.eval_questions",
    "rl.eval_samples",
    *(f"{s}.device_batch_size" for s in STAGES),
    *(f"{s}.eval_every" for s in STAGES),
    *(f"{s}.save_every" for s in STAGES),
    *(f"{s}.keep_checkpoints" for s in STAGES),
)


def same_recipe(config: Recipe, saved: dict[str, Any], folder: Path, name: str) -> None:
    """What stage `name` learned from: later stages and evaluations may say what they like."""
    later = (*STAGES[STAGES.index(name) + 1 :], "eval", "serve")

    def relevant(flat: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in flat.items() if k.split(".")[0] not in later}

    was = {f"{s}.{k}": v for s, keys in saved.items() for k, v in keys.items()}
    now = flatten(config)
    recipe.refuse_changes(relevant(was), relevant(now), MAY_CHANGE, f"the run in {folder}")


def same_run(
    config: Recipe, tokenizer: Tokenizer, host: dict[str, Any], folder: Path, name: str
) -> None:
    """A checkpoint can be continued: same recipe, same tokenizer."""
    same_recipe(config, host["config"], folder, name)
    if host["tokenizer_sha256"] != tokenizer.sha256():
        raise UserError(
            f"the checkpoint in {folder} was trained with another tokenizer (SHA-256 "
            f"{host['tokenizer_sha256'][:12]}..., now {tokenizer.sha256()[:12]}...); put that one "
            "back, or choose another --config.run.name"
        )


def same_parent(saved: str | None, parent: StageCheckpoint | None, folder: Path) -> None:
    if parent and saved != parent.checksum:
        raise UserError(
            f"{folder} started from another checkpoint of {parent.stage} than the one there now; "
            f"delete {folder} to train it again"
        )


def same_result(run: Run, name: str) -> bool:
    """Whether stage `name` is complete; UserError if it was made from anything but what is there
    now."""
    folder = run.dir / name
    if not (folder / "result.json").exists():
        return False
    cure = f"delete {folder} to start over"
    same_recipe(run.config, read_json(folder / "config.json", cure), folder, name)
    earlier = before(run.config, name)
    if earlier and list_steps(run.dir / earlier / "checkpoints"):  # may be deleted to save space
        result = read_json(folder / "result.json", cure)
        same_parent(result.get("parent"), newest(run.dir, earlier), folder)
    rendered = folder / "train_conversations" / "conversations.json"
    if name in ("mid", "sft") and rendered.exists():
        was = read_json(rendered, f"delete {rendered.parent}")["fingerprint"]
        files = file_stamps(run.config[name].mixture, run.config.data.persona)
        if (was["files"], was["task_dir"]) != (files, run.config.data.task_dir):
            raise UserError(
                f"{folder} was made from other files (of config.{name}.mixture, config.data."
                f"persona or config.data.task_dir) than those there now; delete {folder} to train "
                "it again"
            )
    return True
