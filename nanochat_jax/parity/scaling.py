"""Parity of what depth decides: classic_scaling.json and modern_scaling.json of a folder.

Every row of sizes is our recipe at that depth, vocabulary and ratio, resolved as a run would; every
row of a schedule is our schedule at that step. All relative to 1e-9, counts too.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat_jax import recipe
from nanochat_jax.config import load
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import adam_groups
from nanochat_jax.parity.model import RECIPES
from nanochat_jax.parity.reference import ABSENT, Reference, Row, collect, dotted

TOLERANCE = 1e-9
KEYS = {"depth": "model.depth", "vocab": "tokenizer.vocab_size", "ratio": "base.tokens_per_param"}
SIZES = {"classic": "models", "modern": "scaling"}


def compare_scaling(folder: Path, reference: Reference) -> Iterable[Row]:
    generation = reference.file.partition("_")[0]
    sizes, names = SIZES[generation], dict.fromkeys(key.partition(".")[0] for key in reference)
    yield from collect(reference.file, sizes, _compare_sizes(reference, sizes, generation))
    for name in [name for name in names if name.startswith("schedule")] or ["schedules"]:
        yield from collect(reference.file, name, _compare_schedule(reference, name, generation))


def _compare_table(
    reference: Reference, prefix: str, rows: list[dict], compute: Callable[[dict], dict]
) -> Iterable[Row]:
    """A comparison for each column of `rows`; `compute` takes what is given out of a row and
    returns our values."""
    ours, theirs = [compute(row) for row in rows], rows
    for column in dict.fromkeys(column for row in rows for column in row):
        got, expected = ([row.get(column, ABSENT) for row in side] for side in (ours, theirs))
        yield reference.compare(prefix + column, got, expected, TOLERANCE, relative=True)


def _compare_sizes(reference: Reference, sizes: str, generation: str) -> Iterable[Row]:
    stated = re.search(r"seq_len (\d+)", str(reference.get("note")))

    def compute(row: dict[str, Any]) -> dict[str, Any]:
        for column in list(row):  # the ratio may be part of a column's name
            if match := re.fullmatch(r"(num_iterations)_ratio(\d+)", column):
                row |= {match[1]: row.pop(column), "ratio": float(match[2])}
        keys = {key: str(row.pop(column)) for column, key in KEYS.items() if column in row}
        config = load(RECIPES[generation], keys | ({"model.seq_len": stated[1]} if stated else {}))
        recipe.resolve(config, platform="cpu", num_devices=1)
        c, o = recipe.gpt_config(config), recipe.optim_config(config, "cpu")
        counts = param_counts(c)
        return {
            "n_embd": c.model_dim,
            "n_head": c.num_heads,
            "head_dim": c.head_dim,
            "params": counts["total"],
            **{f"params.{group}": count for group, count in counts.items()},
            "flops_per_token": train_flops_per_token(c),
            "num_iterations": config.base.num_steps,
            "target_tokens": recipe.horizon_tokens(config, config.model.depth),
            "total_batch_size": config.base.total_batch_tokens,
            "lr_scale": o.lr_scale,
            "dmodel_lr_scale": adam_groups(o, c.model_dim)["embed"].lr / (o.embed_lr * o.lr_scale),
            "weight_decay": recipe.weight_decay(config),
        }

    yield from _compare_table(reference, f"{sizes}: ", list(map(dotted, reference[sizes])), compute)


def _compare_schedule(reference: Reference, name: str, generation: str) -> Iterable[Row]:
    """The table `name`, like schedules_1000_iterations: settings, and rows of chosen steps."""
    table = Reference(reference.file, reference[name])
    num_steps, c = int(re.findall(r"\d+", name)[0]), load(RECIPES[generation])
    o = c.optim
    course = {"start": o.momentum_start, "peak": o.momentum, "end": o.momentum_end}
    course |= {"warmup_steps": o.momentum_warmup_steps, "warmdown_frac": c.base.warmdown_frac}

    def compute(row: dict[str, Any]) -> dict[str, Any]:
        step = row.pop("it")

        def lr(warmup_steps: int, warmdown_frac: float, final_frac: float):
            given: dict[str, Any] = {"num_steps": num_steps, "warmup_steps": warmup_steps}
            given |= {"warmdown_frac": warmdown_frac, "final_frac": final_frac}
            return schedules.lr_multiplier(step, **given)

        def stated(of: str):
            warmup_steps = round(table[f"{of}.warmup_ratio"] * num_steps)
            return lr(warmup_steps, table[f"{of}.warmdown_ratio"], table[f"{of}.final_lr_frac"])

        ours = {"muon_momentum": schedules.muon_momentum(step, num_steps=num_steps, **course)}
        if generation == "modern":
            settings = (table[key] for key in ("warmup_steps", "warmdown_ratio", "final_lr_frac"))
            decay = schedules.cosine_to_zero(step, num_steps=num_steps)
            return ours | {"lr_multiplier": lr(*settings), "weight_decay_multiplier": decay}
        ours |= {"lr_multiplier": stated("base"), "lr_multiplier_warm": stated("warm")}
        # Stages after pretraining are the same schedule with other numbers (optim/schedules.py).
        later = {"mid_lr_multiplier_at_progress": lr(0, 0.2, 0.0)}
        return ours | later | {"sft_rl_lr_multiplier": lr(0, 1.0, 0.0)}

    yield from _compare_table(table, f"{name}.", list(map(dict, table["rows"])), compute)
    yield from table.unread()
