"""Parity of the optimizer: who is in which group, the steps from given gradients, a short training.

The steps use build_optimizer with the reference's learning rates and schedules; the training is
the loop's own jitted step, with one row at a time so that accumulation is part of it.
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.interop.upstream import our_path
from nanochat_jax.optim.build import ADAM_EPS, OptimConfig, adam_groups, build_optimizer, label
from nanochat_jax.optim.muon import POLAR_EXPRESS, VARIANCE_DECAY
from nanochat_jax.parity.case import Case
from nanochat_jax.parity.reference import close_row, exact_row
from nanochat_jax.parity.rows import Row
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.step import make_train_step

STEP_TOLERANCE = 2e-5
TRAJECTORY_TOLERANCE = 1e-4
LR_TOLERANCE = 1e-9  # relative; both are computed in float64
# Decay is applied where update and weight have the same sign. Where the update is all but 0 its
# sign is that of a rounding error, and the weight may differ by the decay: lr * wd * |p|.
MAX_COIN_TOSSES = 3  # elements a step


def optim_config(case: Case) -> OptimConfig:
    """The recipe's optimizer with the learning rates of the reference."""
    o, settings = case.recipe.optim, case.settings
    scalar_lr = settings.take("optimizer.scalar_lr") if "optimizer.scalar_lr" in settings else None
    return OptimConfig(
        recipe=o.recipe,
        embed_lr=settings.take("optimizer.embedding_lr"),
        unembed_lr=settings.take("optimizer.unembedding_lr"),
        matrix_lr=settings.take("optimizer.matrix_lr"),
        scalar_lr=o.scalar_lr if scalar_lr is None else scalar_lr,
        smear_lr=o.smear_lr,
    )


def compare_groups(case: Case) -> Iterable[Row]:
    settings, groups = case.settings, adam_groups(optim_config(case), case.config.model_dim)
    if "optimizer.adam_betas" in settings:  # classic: one setting for all
        ours = {
            "adam_betas": [[g.b1, g.b2] for g in groups.values()],
            "adam_eps": [ADAM_EPS] * len(groups),
            "weight_decay": [g.weight_decay for g in groups.values()],
        }
        for key, values in ours.items():
            reference = settings.take(f"optimizer.{key}")
            what = f"optimizer.{key}"
            yield exact_row(settings.file, what, values, [reference] * len(groups))
    if "param_groups" not in settings:
        return
    reference = settings.take("param_groups")
    yield _members_row(case, reference)
    ours, theirs, lrs, their_lrs = {}, {}, {}, {}
    for index, group in enumerate(reference):
        name = label(our_path(group["params"][0])[0])
        where = f"group {index} ({name})"
        if name == "muon":
            settings_of = {"kind": "muon", "ns_steps": len(POLAR_EXPRESS), "beta2": VARIANCE_DECAY}
            lrs[where] = settings.take("optimizer.matrix_lr")
        else:
            g = groups[name]
            settings_of = {"kind": "adamw", "betas": [g.b1, g.b2], "eps": ADAM_EPS}
            settings_of["weight_decay"] = g.weight_decay
            lrs[where] = g.lr
        ours |= {f"{where} {key}": value for key, value in settings_of.items()}
        given = {k: v for k, v in group.items() if k not in ("params", "lr_after_dim_scaling")}
        theirs |= {f"{where} {key}": value for key, value in given.items()}
        their_lrs[where] = group["lr_after_dim_scaling"]
    yield exact_row(settings.file, "param_groups settings", ours, theirs)
    yield close_row(settings.file, "param_groups lr", lrs, their_lrs, LR_TOLERANCE, relative=True)


def _members_row(case: Case, reference: list[dict]) -> Row:
    """Who is together with whom: AdamW by our labels, Muon by label and shape, as we stack them."""
    ours: dict[tuple, set] = {}
    for path, value in case.params.items():
        name = label(path)
        shape = value.shape if name == "muon" else None
        ours.setdefault((name, shape), set()).add(path)
    our_groups = sorted(sorted(members) for members in ours.values())
    theirs = sorted(sorted(our_path(name)[0] for name in g["params"]) for g in reference)
    row = exact_row(case.settings.file, "param_groups members", our_groups, theirs)
    return row._replace(compared=sum(len(members) for members in theirs))


def compare_steps(case: Case) -> Iterable[Row]:
    """One row a step: the weights after it, from the state and the gradients given."""
    settings, arrays = case.settings, case.arrays
    momentum = "momentum" if "optimizer.momentum" in settings else "muon_momentum"
    schedules = {
        "lr_multiplier": settings.take("optimizer.lr_multiplier"),
        "momentum": settings.take(f"optimizer.{momentum}"),
        "weight_decay": [0.0] * len(settings.take("optimizer.lr_multiplier")),
    }
    if "optimizer.weight_decay_per_step" in settings:
        schedules["weight_decay"] = settings.take("optimizer.weight_decay_per_step")
    tables = {name: jnp.asarray(values, jnp.float32) for name, values in schedules.items()}
    o = optim_config(case)
    tx = build_optimizer(
        case.params,
        case.config.model_dim,
        o,
        **{name: lambda step, table=table: table[step] for name, table in tables.items()},
    )

    @jax.jit
    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    num_steps = max((int(m[1]) for m in arrays.matching(r"opt/param(\d+)/.*")), default=0)
    if not num_steps:
        raise KeyError("opt/param* is missing")
    if lengths := {k: len(v) for k, v in schedules.items() if len(v) != num_steps}:
        raise ValueError(f"{num_steps} steps, but settings for {lengths}")
    for step in range(num_steps):
        grads = case.take_params(f"opt/grad{step}/")
        reference = case.take_params(f"opt/param{step + 1}/")
        lr = o.matrix_lr * schedules["lr_multiplier"][step]
        decay = {p: _decay(p, v, lr * schedules["weight_decay"][step]) for p, v in params.items()}
        params, opt_state = update(grads, opt_state, params)
        what = f"opt/param{step + 1}/*"
        row, params = compare_step(arrays.file, what, params, reference, decay)
        yield row


def _decay(path: str, value: jax.Array, lr_wd: float) -> np.ndarray | float:
    """How much cautious decay changes each element where it is applied; 0 for AdamW's."""
    if label(path) != "muon":
        return 0.0
    size = max(1.0, value.shape[1] / value.shape[0]) ** 0.5
    return lr_wd * size * np.abs(np.asarray(value))


def compare_step(
    file: str, what: str, ours: dict, reference: dict, decay: dict
) -> tuple[Row, dict[str, jax.Array]]:
    """The row, and the weights to go on from: ours, but the reference's where a coin was tossed."""
    settled, coins = {}, 0
    for path, value in reference.items():
        if path not in ours or ours[path].shape != value.shape:
            continue  # close_row says so
        difference = np.abs(np.asarray(ours[path]) - value)
        off_by_decay = np.abs(difference - decay[path]) <= STEP_TOLERANCE
        coin = (difference > STEP_TOLERANCE) & off_by_decay
        coins += int(np.sum(coin))
        settled[path] = np.where(coin, value, ours[path])
    if coins > MAX_COIN_TOSSES:
        settled = {}
    row = close_row(file, what, ours | settled, reference, STEP_TOLERANCE)
    if coins and row.ok:
        row = row._replace(note=f"{coins} of at most {MAX_COIN_TOSSES} signs tossed by rounding")
    return row, ours | {path: jnp.asarray(v) for path, v in settled.items()}


def compare_trajectory(case: Case) -> Iterable[Row]:
    """Training on the one batch, loss before each update. Its settings are given in prose."""
    settings = case.settings
    note = str(settings.take("optimizer.note"))
    default_decay = settings.take("optimizer.weight_decay")

    def stated(name: str, otherwise: float | None = None) -> float:
        match = re.search(rf"trajectory:.*?\b{name} ([0-9]+(?:\.[0-9]+)?)", note)
        if not match and otherwise is None:
            raise ValueError(f"optimizer.note does not say the trajectory's {name}: {note!r}")
        return float(match[1]) if match else float(otherwise or 0.0)

    constants = {
        "lr_multiplier": stated("multiplier"),
        "momentum": stated("momentum"),
        "weight_decay": stated("weight decay", default_decay),
    }
    tx = build_optimizer(
        case.params,
        case.config.model_dim,
        optim_config(case),
        **{name: lambda step, value=value: jnp.float32(value) for name, value in constants.items()},
    )
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), case.params, tx.init(case.params), key)
    owners = Owners(case.config, case.mesh)
    state = owners.to_owned(state)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=case.tile)
    batch = {"inputs": case.ids, "targets": case.targets}
    reference = case.arrays.take("trajectory_loss")
    losses = []
    with jax.set_mesh(case.mesh):
        for _ in range(len(reference)):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    yield close_row(
        case.arrays.file, "trajectory_loss", np.array(losses), reference, TRAJECTORY_TOLERANCE
    )
