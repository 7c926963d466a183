"""Parity of what depth decides: classic_scaling.json and modern_scaling.json of a folder.

Every row of sizes is our recipe at that depth, vocabulary and ratio, resolved as a run would; every
row of a schedule is our schedule at that step. All relative to 1e-9, counts too.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_jax import recipe
from nanochat_jax.config import Recipe, load
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import adam_groups
from nanochat_jax.parity.case import RECIPES
from nanochat_jax.parity.reference import Comparison, Reference, collect, dotted

TOLERANCE = 1e-9
KEYS = {"depth": "model.depth", "vocab": "tokenizer.vocab_size", "ratio": "base.tokens_per_param"}
SIZES = {"classic": "models", "modern": "scaling"}
SCHEDULE_ROWS = r"(schedules?_(\d+)_iterations\.)rows"

Values = dict[str, Any]  # {column: number} of one row


def compare_scaling(folder: Path, reference: Reference, generation: str) -> Iterable[Comparison]:
    file = reference.file
    yield from collect(file, SIZES[generation], _compare_sizes(reference, generation))
    yield from collect(file, "schedules", _compare_schedules(reference, generation))


def _columns(
    reference: Reference, prefix: str, rows: Iterable[tuple[str, Values, Values]]
) -> Iterable[Comparison]:
    """A comparison for each column of a table, given (name, ours, theirs) of its rows."""
    ours, theirs = defaultdict(dict), defaultdict(dict)  # {column: {name of the row: number}}
    for name, *sides in rows:
        for columns, row in zip((ours, theirs), sides, strict=True):
            for column, value in row.items():
                columns[column][name] = value
    for column in theirs | ours:
        values = ours[column], theirs[column]
        yield reference.compare(prefix + column, *values, TOLERANCE, relative=True)


def _compare_sizes(reference: Reference, generation: str) -> Iterable[Comparison]:
    note = str(reference.take("note")) if "note" in reference else ""
    stated = re.search(r"seq_len (\d+)", note)
    rows = []
    for given in reference.take(SIZES[generation]):
        row = dotted(given)
        for column in list(row):  # the ratio may be part of a column's name
            if match := re.fullmatch(r"(num_iterations)_ratio(\d+)", column):
                row |= {match[1]: row.pop(column), "ratio": float(match[2])}
        keys = {key: row.pop(column) for column, key in KEYS.items() if column in row}
        keys |= {"model.seq_len": stated[1]} if stated else {}
        config = load(RECIPES[generation], {key: str(value) for key, value in keys.items()})
        recipe.resolve(config, platform="cpu", num_devices=1)
        where = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in keys.items())
        rows.append((where, _sizes(config, generation), row))
    yield from _columns(reference, f"{SIZES[generation]}: ", rows)


def _sizes(config: Recipe, generation: str) -> Values:
    c, o = recipe.gpt_config(config), recipe.optim_config(config, "cpu")
    counts = param_counts(c)
    sizes = {
        "n_embd": c.model_dim,
        "n_head": c.num_heads,
        "flops_per_token": train_flops_per_token(c),
        "num_iterations": config.base.num_steps,
    }
    if generation == "classic":
        return sizes | {"head_dim": c.head_dim, "params": counts["total"]}
    embed_lr = adam_groups(o, c.model_dim)["embed"].lr
    return sizes | {
        **{f"params.{group}": count for group, count in counts.items()},
        "target_tokens": recipe.horizon_tokens(config, config.model.depth),
        "total_batch_size": config.base.total_batch_tokens,
        "lr_scale": o.lr_scale,
        "dmodel_lr_scale": embed_lr / (o.embed_lr * o.lr_scale),
        "weight_decay": recipe.weight_decay(config),
    }


def _compare_schedules(reference: Reference, generation: str) -> Iterable[Comparison]:
    tables = reference.matching(SCHEDULE_ROWS)
    if not tables:
        raise KeyError("schedules are missing")
    for match in tables:
        functions = _schedules(reference, match[1], int(match[2]), generation)
        rows = []
        for theirs in map(dict, reference.take(match[0])):
            step = theirs.pop("it")
            ours = {column: float(function(step)) for column, function in functions.items()}
            rows.append((f"it {step}", ours, theirs))
        yield from _columns(reference, match[1], rows)


def _schedules(
    reference: Reference, prefix: str, num_steps: int, generation: str
) -> dict[str, Callable[[int], Any]]:
    c: Recipe = load(RECIPES[generation])
    lr = partial(schedules.lr_multiplier, num_steps=num_steps)
    momentum = partial(
        schedules.muon_momentum,
        num_steps=num_steps,
        warmdown_frac=c.base.warmdown_frac,
        start=c.optim.momentum_start,
        peak=c.optim.momentum,
        end=c.optim.momentum_end,
        warmup_steps=c.optim.momentum_warmup_steps,
    )

    def given_lr(name: str, warmup_steps: int):
        warmdown, final = (reference.take(name + k) for k in ("warmdown_ratio", "final_lr_frac"))
        return partial(lr, warmup_steps=warmup_steps, warmdown_frac=warmdown, final_frac=final)

    if generation == "modern":
        return {
            "lr_multiplier": given_lr(prefix, reference.take(f"{prefix}warmup_steps")),
            "muon_momentum": momentum,
            "weight_decay_multiplier": partial(schedules.cosine_to_zero, num_steps=num_steps),
        }

    def classic_lr(name: str):
        warmup_frac = reference.take(f"{prefix}{name}.warmup_ratio")
        return given_lr(f"{prefix}{name}.", round(warmup_frac * num_steps))

    return {
        "lr_multiplier": classic_lr("base"),
        "lr_multiplier_warm": classic_lr("warm"),
        "muon_momentum": momentum,
        # Stages after pretraining are the same schedule with other numbers (optim/schedules.py).
        "mid_lr_multiplier_at_progress": partial(
            lr, warmup_steps=0, warmdown_frac=0.2, final_frac=0.0
        ),
        "sft_rl_lr_multiplier": partial(lr, warmup_steps=0, warmdown_frac=1.0, final_frac=0.0),
    }
