"""The optimizer: each parameter gets a label by its path, each label a transform.

All matrices of the blocks, gates too, go to Muon, the rest to AdamW. The learning rates of
embedding, value embeddings and head go with model_dim^-0.5 (muP).
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.optim.muon import MuonState, Schedule, muon

LABELS = (
    (r"^blocks\.", "muon"),
    (r"^wte\.", "embed"),
    (r"^lm_head\.", "unembed"),
    (r"^value_embeds\.", "value_embeds"),
    (r"^resid_lambdas$", "resid"),
    (r"^x0_lambdas$", "x0"),
    (r"^(smear_gate\.kernel|smear_lambda|backout_lambda)$", "smear"),
)
ADAM_EPS = 1e-10


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates before any scaling; every field is explained in configs/default.py."""

    recipe: str
    embed_lr: float
    unembed_lr: float
    matrix_lr: float
    scalar_lr: float
    smear_lr: float
    lr_scale: float = 1.0  # for the batch size: multiplies every LR but smear_lr
    ns_dtype: str = "float32"


class AdamGroup(NamedTuple):
    """AdamW settings of one label."""

    lr: float  # before the schedule
    b1: float
    b2: float
    weight_decay: float


def label(path: str) -> str:
    for pattern, name in LABELS:
        if re.search(pattern, path):
            return name
    raise ValueError(f"no optimizer group for parameter {path!r}; add one to optim/build.py")


def adam_groups(o: OptimConfig, model_dim: int) -> dict[str, AdamGroup]:
    by_dim = (model_dim / 768) ** -0.5
    embed, unembed = o.embed_lr * o.lr_scale * by_dim, o.unembed_lr * o.lr_scale * by_dim
    if o.recipe == "classic":
        rates = {"embed": embed, "unembed": unembed}
        return {name: AdamGroup(lr, 0.8, 0.95, 0.0) for name, lr in rates.items()}
    assert o.recipe == "modern", o.recipe
    scalar = o.scalar_lr * o.lr_scale
    return {
        "embed": AdamGroup(embed, 0.8, 0.995, 0.001),
        "unembed": AdamGroup(unembed, 0.8, 0.96, 0.01),
        "value_embeds": AdamGroup(embed * 0.5, 0.8, 0.995, 0.01),
        "resid": AdamGroup(scalar * 0.01, 0.8, 0.95, 0.05),
        "x0": AdamGroup(scalar, 0.96, 0.95, 0.0),
        "smear": AdamGroup(o.smear_lr, 0.8, 0.95, 0.0),
    }


def build_optimizer(
    paths, model_dim: int, o: OptimConfig, **schedules: Schedule
) -> optax.GradientTransformation:
    """The transform for parameters at `paths`, or for stacks of them, whose names get the same
    labels. schedules: lr_multiplier, momentum and weight_decay, functions of the step."""
    groups = adam_groups(o, model_dim)
    if unknown := {*map(label, paths)} - {*groups, "muon"}:
        raise ValueError(f"optim.recipe={o.recipe} has no settings for {sorted(unknown)}")

    def scheduled(lr: float) -> Schedule:
        return lambda step: lr * schedules["lr_multiplier"](step)

    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adamw(scheduled(g.lr), g.b1, g.b2, ADAM_EPS, weight_decay=g.weight_decay)
        for name, g in groups.items()
    }
    courses = scheduled(o.matrix_lr * o.lr_scale), schedules["momentum"], schedules["weight_decay"]
    transforms["muon"] = muon(*courses, modern=o.recipe == "modern", dtype=o.ns_dtype)
    return optax.multi_transform(transforms, lambda params: {name: label(name) for name in params})


def warm_start(opt_state):
    """An optimizer state for the next stage: schedules start over; moments stay, and with them
    Adam's own count, which corrects their bias towards zero."""

    def counts(node) -> bool:
        return isinstance(node, MuonState | optax.ScaleByScheduleState)

    def restart(node):
        return node._replace(count=jnp.zeros_like(node.count)) if counts(node) else node

    return jax.tree.map(restart, opt_state, is_leaf=counts)
