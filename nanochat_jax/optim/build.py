"""The optimizer: every parameter gets a label by its path, every label a transform.

  muon          all matrices of the blocks, gates too
  embed         token embedding             AdamW
  unembed       head                        AdamW
  value_embeds  resid  x0  smear            AdamW, modern extras

A parameter that no label fits is an error. The learning rates of embedding, value embeddings and
head go with model_dim^-0.5 (muP); a recipe's batch scaling multiplies all of them but smear's.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class AdamGroup:
    """AdamW settings of one label: lr before the schedule, betas, decoupled weight decay."""

    lr: float
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
        return {
            "embed": AdamGroup(embed, 0.8, 0.95, 0.0),
            "unembed": AdamGroup(unembed, 0.8, 0.95, 0.0),
        }
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
    paths,
    model_dim: int,
    o: OptimConfig,
    *,
    lr_multiplier: Schedule,
    momentum: Schedule,
    weight_decay: Schedule,
) -> optax.GradientTransformation:
    """The transform for parameters at `paths` or stacks of them (whose names get the same labels).

    The three schedules are functions of the step.
    """
    groups = adam_groups(o, model_dim)
    unknown = {label(path) for path in paths} - set(groups) - {"muon"}
    if unknown:
        raise ValueError(
            f"optim.recipe={o.recipe} has no settings for the groups {sorted(unknown)}"
        )

    def scheduled(lr: float) -> Schedule:
        return lambda step: lr * lr_multiplier(step)

    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adamw(
            scheduled(g.lr), b1=g.b1, b2=g.b2, eps=ADAM_EPS, weight_decay=g.weight_decay
        )
        for name, g in groups.items()
    }
    transforms["muon"] = muon(
        scheduled(o.matrix_lr * o.lr_scale),
        momentum,
        weight_decay,
        modern=o.recipe == "modern",
        dtype=o.ns_dtype,
    )
    return optax.multi_transform(transforms, lambda params: {name: label(name) for name in params})


def warm_start(opt_state):
    """An optimizer state for the next stage: its moments stay, its schedules start over.

    Adam's own count stays too, for its moments are no longer biased towards zero.
    """

    def is_counted(node) -> bool:
        return isinstance(node, MuonState | optax.ScaleByScheduleState)

    def restart(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_counted(node) else node

    return jax.tree.map(restart, opt_state, is_leaf=is_counted)
