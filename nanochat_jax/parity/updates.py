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
from nanochat_jax.parity.reference import Row
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.step import make_train_step

STEP_TOLERANCE = 2e-5
TRAJECTORY_TOLERANCE = 1e-4
LR_TOLERANCE = 1e-9  # relative; both are computed in float64
# Decay is applied where update and weight have the same sign. Where the update is all but 0 its
# sign is that of a rounding error, and the weight may differ by the decay: lr * wd * |p|.
MAX_ROUNDED_SIGNS = 3  # elements a step


def compare_groups(case: Case) -> Iterable[Row]:
    settings, o = case.settings, case.optim
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
        members.append(sorted(our_path(name) for name in theirs.pop("params")))
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
    settings = case.settings
    multipliers = settings["optimizer.lr_multiplier"]
    prefix = "muon_" if "optimizer.muon_momentum" in settings else ""
    momentum = settings[f"optimizer.{prefix}momentum"]
    decays = settings.get("optimizer.weight_decay_per_step", [0.0] * len(multipliers))
    tx = _optimizer(case, multipliers, momentum, decays)

    @jax.jit
    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    for step, (lr, _, decay) in enumerate(zip(multipliers, momentum, decays, strict=True)):
        before, grads = params, case.arrays_of_params(f"opt/grad{step}")
        params, opt_state = update(grads, opt_state, params)
        theirs = case.arrays_of_params(f"opt/param{step + 1}")
        lr_decay = case.optim.matrix_lr * lr * decay
        params, note = settle_signs(before, params, theirs, lr_decay)
        row = case.arrays.compare(f"opt/param{step + 1}/*", params, theirs, STEP_TOLERANCE)
        yield row._replace(note=note) if row.ok else row


def _optimizer(
    case: Case, lr_multiplier: list[float], momentum: list[float], weight_decay: list[float]
) -> optax.GradientTransformation:
    """Ours, with a value of each schedule for every step."""
    return build_optimizer(
        case.params,
        case.config.model_dim,
        case.optim,
        lr_multiplier=jnp.asarray(lr_multiplier, jnp.float32).__getitem__,
        momentum=jnp.asarray(momentum, jnp.float32).__getitem__,
        weight_decay=jnp.asarray(weight_decay, jnp.float32).__getitem__,
    )


def settle_signs(before: dict, ours: dict, theirs: dict, lr_decay: float) -> tuple[dict, str]:
    """Our weights after a step, and a note: the reference's where a rounding error decided the
    sign, for then weights of Muon differ by lr_decay * |weight before|, scaled as the update is."""
    settled, num_rounded = dict(ours), 0
    for path, value in theirs.items():
        if label(path) == "muon":
            rows, columns = value.shape
            decay = lr_decay * max(1.0, columns / rows) ** 0.5 * np.abs(np.asarray(before[path]))
            difference = np.abs(np.asarray(ours[path]) - value)
            off_by_decay = np.abs(difference - decay) <= STEP_TOLERANCE
            rounded = (difference > STEP_TOLERANCE) & off_by_decay
            num_rounded += int(np.sum(rounded))
            settled[path] = jnp.asarray(np.where(rounded, value, ours[path]))
    if num_rounded > MAX_ROUNDED_SIGNS:
        return ours, ""
    note = f"{num_rounded} of at most {MAX_ROUNDED_SIGNS} signs come from rounding"
    return settled, note if num_rounded else ""


def compare_trajectory(case: Case) -> Iterable[Row]:
    """Training on the one batch, loss before each update. Its settings stand in a note."""
    note, theirs = str(case.settings["optimizer.note"]), case.arrays["trajectory_loss"]
    stated = {"weight decay": case.settings["optimizer.weight_decay"]}
    stated |= re.findall(r"\b(multiplier|momentum|weight decay) (\d+(?:\.\d+)?)", note)
    constants = (stated["multiplier"], stated["momentum"], stated["weight decay"])
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
