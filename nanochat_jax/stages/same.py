"""What must be as it was: a checkpoint is only continued under the recipe, tokenizer and starting
point it was made with, and a complete stage only counts if it was made from what is there now."""

from pathlib import Path
from typing import Any

from nanochat_jax import recipe
from nanochat_jax.common import UserError, read_json
from nanochat_jax.config import Recipe
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
    *(
        f"{stage}.{key}"
        for stage in STAGES
        for key in ("device_batch_size", "eval_every", "save_every", "keep_checkpoints")
    ),
)


def same_recipe(config: Recipe, saved: dict[str, Any], folder: Path, name: str) -> None:
    """What stage `name` learned from: later stages and evaluations may say what they like."""
    later = (*STAGES[STAGES.index(name) + 1 :], "eval", "serve")
    was, now = (
        {f"{s}.{k}": v for s, keys in sections.items() if s not in later for k, v in keys.items()}
        for sections in (saved, config.to_dict())
    )
    recipe.refuse_changes(was, now, MAY_CHANGE, f"the run in {folder}")


def same_run(
    config: Recipe, tokenizer: Tokenizer, host: dict[str, Any], folder: Path, name: str
) -> None:
    """A checkpoint can be continued: same recipe, same tokenizer."""
    same_recipe(config, host["config"], folder, name)
    was, now = host["tokenizer_sha256"], tokenizer.sha256()
    if was != now:
        other = f"another tokenizer (SHA-256 {was[:12]}..., now {now[:12]}...)"
        cure = "put that one back, or choose another --config.run.name"
        raise UserError(f"the checkpoint in {folder} was trained with {other}; {cure}")


def same_parent(saved: str | None, parent: StageCheckpoint | None, folder: Path) -> None:
    if parent and saved != parent.checksum:
        what = f"started from another checkpoint of {parent.stage} than the one there now"
        raise UserError(f"{folder} {what}; delete {folder} to train it again")


def same_result(run: Run, name: str) -> bool:
    """Whether stage `name` is complete."""
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
            keys = f"config.{name}.mixture, config.data.persona or config.data.task_dir"
            what = f"was made from other files (of {keys}) than those there now"
            raise UserError(f"{folder} {what}; delete {folder} to train it again")
    return True
