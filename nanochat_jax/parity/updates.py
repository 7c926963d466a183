"""Parity of the optimizer: its groups, steps from given gradients, a short training.

The steps use build_optimizer with the reference's learning rates and schedules. The training is
the loop's own jitted step, with one row at a time so that accumulation is part of it.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.interop.upstream import our_path
from nanochat_jax.optim.build import (
    ADAM_EPS,
    AdamGroup,
    OptimConfig,
    adam_groups,
    build_optimizer,
    label,
)
from nanochat_jax.optim.muon import POLAR_EXPRESS, VARIANCE_DECAY
from nanochat_jax.parity.case import Case
from nanochat_jax.parity.reference import Reference, Row
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.step import make_train_step

STEP_TOLERANCE = 2e-5
TRAJECTORY_TOLERANCE = 1e-4
LR_TOLERANCE = 1e-9  # relative; both are computed in float64
# Decay is applied where update and weight have the same sign. Where the update is all but 0 its
# sign is that of a rounding error, and the weight may differ by the decay: lr * wd * |p|.
MAX_ROUNDED_SIGNS = 3  # elements a step


def optim_config(case: Case) -> OptimConfig:
    """The recipe's optimizer with the learning rates of the reference."""
    o, settings = case.recipe.optim, case.settings
    return OptimConfig(
        recipe=o.recipe,
        embed_lr=settings["optimizer.embedding_lr"],
        unembed_lr=settings["optimizer.unembedding_lr"],
        matrix_lr=settings["optimizer.matrix_lr"],
        scalar_lr=settings.get("optimizer.scalar_lr", o.scalar_lr),
        smear_lr=o.smear_lr,
    )


def compare_groups(case: Case) -> Iterable[Row]:
    settings, o = case.settings, optim_config(case)
    groups = adam_groups(o, case.config.model_dim)
    if "optimizer.adam_betas" in settings:  # classic: one setting for all
        for key, ours in (
            ("optimizer.adam_betas", [[g.b1, g.b2] for g in groups.values()]),
            ("optimizer.adam_eps", [ADAM_EPS] * len(groups)),
            ("optimizer.weight_decay", [g.weight_decay for g in groups.values()]),
        ):
            yield settings.compare(key, ours, [settings[key]] * len(groups))
    if "param_groups" not in settings:
        return
    members, lrs, others = [], ({}, {}), ({}, {})  # of ours and of theirs
    for index, group in enumerate(settings["param_groups"]):
        theirs = dict(group)
        members.append(sorted(our_path(name)[0] for name in theirs.pop("params")))
        name = label(members[-1][0])
        for side, values in enumerate((_group_settings(o, groups.get(name)), theirs)):
            lrs[side][f"group {index} ({name})"] = values.pop("lr_after_dim_scaling")
            others[side].update({f"group {index} ({name}) {k}": v for k, v in values.items()})
    # AdamW's groups are our labels; Muon's have one shape each, as we stack them.
    together: dict[tuple, list[str]] = {}
    for path, value in sorted(case.params.items()):
        shape = value.shape if label(path) == "muon" else None
        together.setdefault((label(path), shape), []).append(path)
    row = settings.compare("param_groups members", sorted(together.values()), sorted(members))
    yield row._replace(compared=sum(map(len, members)))
    yield settings.compare("param_groups settings", *others)
    yield settings.compare("param_groups lr", *lrs, LR_TOLERANCE, relative=True)


def _group_settings(o: OptimConfig, adam: AdamGroup | None) -> dict[str, Any]:
    """In the reference's words; `adam` is None for a group of Muon's."""
    if not adam:
        settings = {"kind": "muon", "ns_steps": len(POLAR_EXPRESS), "beta2": VARIANCE_DECAY}
        return settings | {"lr_after_dim_scaling": o.matrix_lr}
    settings = {"kind": "adamw", "betas": [adam.b1, adam.b2], "eps": ADAM_EPS}
    return settings | {"weight_decay": adam.weight_decay, "lr_after_dim_scaling": adam.lr}


def compare_steps(case: Case) -> Iterable[Row]:
    """One row a step: the weights after it, from the state and the gradients given."""
    settings, o = case.settings, optim_config(case)
    multipliers = settings["optimizer.lr_multiplier"]
    decays = settings.get("optimizer.weight_decay_per_step", [0.0] * len(multipliers))
    is_classic = "optimizer.muon_momentum" in settings
    momentum = settings["optimizer.muon_momentum" if is_classic else "optimizer.momentum"]
    tx = _optimizer(case, multipliers, momentum, decays)

    @jax.jit
    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    for step, (multiplier, weight_decay) in enumerate(zip(multipliers, decays, strict=True)):
        lr_decay = o.matrix_lr * multiplier * weight_decay
        decay = {path: _decay(path, value, lr_decay) for path, value in params.items()}
        grads = case.arrays_of_params(f"opt/grad{step}")
        theirs = case.arrays_of_params(f"opt/param{step + 1}")
        params, opt_state = update(grads, opt_state, params)
        what = f"opt/param{step + 1}/*"
        row, params = compare_step(case.arrays, what, params, theirs, decay)
        yield row


def _optimizer(
    case: Case, lr_multiplier: list[float], momentum: list[float], weight_decay: list[float]
) -> optax.GradientTransformation:
    """Ours, with the reference's learning rates and a value of each schedule for every step."""
    if not len(lr_multiplier) == len(momentum) == len(weight_decay):
        raise ValueError("the optimizer's settings are of different numbers of steps")
    return build_optimizer(
        case.params,
        case.config.model_dim,
        optim_config(case),
        lr_multiplier=jnp.asarray(lr_multiplier, jnp.float32).__getitem__,
        momentum=jnp.asarray(momentum, jnp.float32).__getitem__,
        weight_decay=jnp.asarray(weight_decay, jnp.float32).__getitem__,
    )


def _decay(path: str, value: jax.Array, lr_decay: float) -> np.ndarray | float:
    """How much cautious decay changes each element where it is applied; 0 for AdamW's."""
    if label(path) != "muon":
        return 0.0
    return lr_decay * max(1.0, value.shape[1] / value.shape[0]) ** 0.5 * np.abs(np.asarray(value))


def compare_step(
    file: Reference, what: str, ours: dict, theirs: dict, decay: dict
) -> tuple[Row, dict[str, jax.Array]]:
    """The row, and the weights to go on from: ours, or the reference's where a rounding error
    decided the sign."""
    settled, num_rounded = dict(ours), 0
    for path, value in theirs.items():
        difference = np.abs(np.asarray(ours[path]) - value)
        off_by_decay = np.abs(difference - decay[path]) <= STEP_TOLERANCE
        rounded = (difference > STEP_TOLERANCE) & off_by_decay
        num_rounded += int(np.sum(rounded))
        settled[path] = jnp.asarray(np.where(rounded, value, ours[path]))
    if num_rounded > MAX_ROUNDED_SIGNS:
        settled = ours
    row = file.compare(what, settled, theirs, STEP_TOLERANCE)
    if num_rounded and row.ok:
        note = f"{num_rounded} of at most {MAX_ROUNDED_SIGNS} signs come from rounding"
        row = row._replace(note=note)
    return row, settled


def compare_trajectory(case: Case) -> Iterable[Row]:
    """Training on the one batch, loss before each update. Its settings stand in a note."""
    note, theirs = str(case.settings["optimizer.note"]), case.arrays["trajectory_loss"]
    stated = dict(re.findall(r"\b(multiplier|momentum|weight decay) (\d+(?:\.\d+)?)", note))
    decay = stated.get("weight decay", case.settings["optimizer.weight_decay"])
    if not {"multiplier", "momentum"} <= stated.keys():
        raise ValueError(f"optimizer.note lacks the trajectory's multiplier or momentum: {note!r}")
    constants = (stated["multiplier"], stated["momentum"], decay)
    tx = _optimizer(case, *([float(value)] * len(theirs) for value in constants))
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), case.params, tx.init(case.params), key)
    owners = Owners(case.config, case.mesh)
    state = owners.to_owned(state)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=case.tile)
    losses = []
    with jax.set_mesh(case.mesh):
        for _ in theirs:
            state, metrics = step(state, case.batch)
            losses.append(float(metrics["loss"]))
    yield case.arrays.compare("trajectory_loss", np.array(losses), theirs, TRAJECTORY_TOLERANCE)
