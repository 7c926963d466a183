"""Parity of what depth decides: classic_scaling.json and modern_scaling.json of a folder.

Every row of sizes is our recipe at that depth, vocabulary and ratio, resolved as a run would; every
row of a schedule is our schedule at that step. All relative to 1e-9, counts too.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_jax import recipe
from nanochat_jax.common import UserError
from nanochat_jax.config import load
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import adam_groups
from nanochat_jax.parity.case import RECIPES
from nanochat_jax.parity.reference import Reference, close_row, dotted, guarded, read_settings
from nanochat_jax.parity.rows import Row, not_comparable

TOLERANCE = 1e-9
SIZES = {"classic": "models", "modern": "scaling"}
# Stages after pretraining are the same schedule with other numbers (optim/schedules.py).
MID_WARMDOWN, SFT_RL_WARMDOWN = 0.2, 1.0
FRACTIONS = ("warmup_ratio", "warmdown_ratio", "final_lr_frac")
SCHEDULE_ROWS = r"(schedules?_(\d+)_iterations\.)rows"


def compare_scaling(folder: Path, generation: str) -> list[Row]:
    """Rows for everything in the file; a broken or missing file is a row that misses."""
    file = f"{generation}_scaling.json"
    try:
        reference = read_settings(Path(folder) / file)
    except UserError as error:
        return [not_comparable(file, "all", str(error))]
    rows = guarded(file, SIZES[generation], lambda: _compare_sizes(reference, generation))
    rows += guarded(file, "schedules", lambda: _compare_schedules(reference, generation))
    return rows + reference.leftovers()


def _compare_sizes(reference: Reference, generation: str) -> Iterable[Row]:
    note = str(reference.take("note")) if "note" in reference else ""
    stated = re.search(r"seq_len (\d+)", note)
    numbers = {"classic": _classic_numbers, "modern": _modern_numbers}[generation]
    ours, theirs = defaultdict(dict), defaultdict(dict)  # {column: {which row: number}}
    for given in reference.take(SIZES[generation]):
        row, ratio = _without_ratio(dotted(given))
        keys = {"model.depth": row.pop("depth"), "tokenizer.vocab_size": row.pop("vocab")}
        keys |= {"base.tokens_per_param": ratio} if ratio else {}
        keys |= {"model.seq_len": stated[1]} if stated else {}
        config = load(RECIPES[generation], {key: str(value) for key, value in keys.items()})
        recipe.resolve(config, platform="cpu", num_devices=1)
        where = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in keys.items())
        for key, value in numbers(config).items():
            ours[key][where] = value
        for key, value in row.items():
            theirs[key][where] = value
    for key in theirs | ours:
        yield _column_row(reference.file, f"{SIZES[generation]}: {key}", ours, theirs, key)


def _without_ratio(row: dict) -> tuple[dict, float | None]:
    """The row, and its data:parameter ratio: a column of its own or part of a column's name."""
    ratios = [row.pop("ratio")] if "ratio" in row else []
    for key in list(row):
        if match := re.fullmatch(r"num_iterations_ratio(\d+)", key):
            ratios.append(float(match[1]))
            row["num_iterations"] = row.pop(key)
    if len(ratios) > 1:
        raise ValueError(f"got the ratios {ratios} in one row, expected at most one")
    return row, ratios[0] if ratios else None


def _column_row(file: str, what: str, ours: dict, theirs: dict, key: str) -> Row:
    if key not in ours or key not in theirs:
        return not_comparable(file, what, "" if key in theirs else "missing")
    return close_row(file, what, ours[key], theirs[key], TOLERANCE, relative=True)


def _classic_numbers(config: Any) -> dict[str, Any]:
    c = recipe.gpt_config(config)
    return {
        "n_embd": c.model_dim,
        "n_head": c.num_heads,
        "head_dim": c.head_dim,
        "params": param_counts(c)["total"],
        "flops_per_token": train_flops_per_token(c),
        "num_iterations": config.base.num_steps,
    }


def _modern_numbers(config: Any) -> dict[str, Any]:
    c, o = recipe.gpt_config(config), recipe.optim_config(config, "cpu")
    embed_lr = adam_groups(o, c.model_dim)["embed"].lr
    return {
        **{f"params.{group}": count for group, count in param_counts(c).items()},
        "n_embd": c.model_dim,
        "n_head": c.num_heads,
        "flops_per_token": train_flops_per_token(c),
        "target_tokens": recipe.horizon_tokens(config, config.model.depth),
        "total_batch_size": config.base.total_batch_tokens,
        "lr_scale": o.lr_scale,
        "dmodel_lr_scale": embed_lr / (o.embed_lr * o.lr_scale),
        "weight_decay": recipe.weight_decay(config),
        "num_iterations": config.base.num_steps,
    }


def _compare_schedules(reference: Reference, generation: str) -> Iterable[Row]:
    tables = reference.matching(SCHEDULE_ROWS)
    if not tables:
        raise KeyError("schedules are missing")
    for match in tables:
        prefix, num_steps = match[1], int(match[2])
        if generation == "classic":
            columns = _classic_schedules(reference, prefix, num_steps)
        else:
            columns = _modern_schedules(reference, prefix, num_steps)
        ours, theirs = defaultdict(dict), defaultdict(dict)
        for given in reference.take(match[0]):
            row = dict(given)
            step = row.pop("it")
            for key, schedule in columns.items():
                ours[key][f"it {step}"] = float(schedule(step))
            for key, value in row.items():
                theirs[key][f"it {step}"] = value
        for key in theirs | ours:
            yield _column_row(reference.file, prefix + key, ours, theirs, key)


def _classic_schedules(reference: Reference, prefix: str, num_steps: int) -> dict:
    def lr(name: str):
        given = {key: reference.take(f"{prefix}{name}.{key}") for key in FRACTIONS}
        return partial(
            schedules.lr_multiplier,
            num_steps=num_steps,
            warmup_steps=round(given["warmup_ratio"] * num_steps),
            warmdown_frac=given["warmdown_ratio"],
            final_frac=given["final_lr_frac"],
        )

    def later_stage(warmdown_frac: float):
        return partial(
            schedules.lr_multiplier,
            num_steps=num_steps,
            warmup_steps=0,
            warmdown_frac=warmdown_frac,
            final_frac=0.0,
        )

    return {
        "lr_multiplier": lr("base"),
        "lr_multiplier_warm": lr("warm"),
        "muon_momentum": _momentum("classic", num_steps),
        "mid_lr_multiplier_at_progress": later_stage(MID_WARMDOWN),
        "sft_rl_lr_multiplier": later_stage(SFT_RL_WARMDOWN),
    }


def _modern_schedules(reference: Reference, prefix: str, num_steps: int) -> dict:
    return {
        "lr_multiplier": partial(
            schedules.lr_multiplier,
            num_steps=num_steps,
            warmup_steps=reference.take(prefix + "warmup_steps"),
            warmdown_frac=reference.take(prefix + "warmdown_ratio"),
            final_frac=reference.take(prefix + "final_lr_frac"),
        ),
        "muon_momentum": _momentum("modern", num_steps),
        "weight_decay_multiplier": partial(schedules.cosine_to_zero, num_steps=num_steps),
    }


def _momentum(generation: str, num_steps: int):
    config: Any = load(RECIPES[generation])
    return partial(
        schedules.muon_momentum,
        num_steps=num_steps,
        warmdown_frac=config.base.warmdown_frac,
        start=config.optim.momentum_start,
        peak=config.optim.momentum,
        end=config.optim.momentum_end,
        warmup_steps=config.optim.momentum_warmup_steps,
    )
