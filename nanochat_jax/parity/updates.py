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
from nanochat_jax.parity.reference import Comparison, Reference
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
    has_scalar_lr = "optimizer.scalar_lr" in settings
    return OptimConfig(
        recipe=o.recipe,
        embed_lr=settings.take("optimizer.embedding_lr"),
        unembed_lr=settings.take("optimizer.unembedding_lr"),
        matrix_lr=settings.take("optimizer.matrix_lr"),
        scalar_lr=settings.take("optimizer.scalar_lr") if has_scalar_lr else o.scalar_lr,
        smear_lr=o.smear_lr,
    )


def compare_groups(case: Case) -> Iterable[Comparison]:
    settings, o = case.settings, optim_config(case)
    groups = adam_groups(o, case.config.model_dim)
    if "optimizer.adam_betas" in settings:  # classic: one setting for all
        for key, ours in (
            ("adam_betas", [[g.b1, g.b2] for g in groups.values()]),
            ("adam_eps", [ADAM_EPS] * len(groups)),
            ("weight_decay", [g.weight_decay for g in groups.values()]),
        ):
            theirs = [settings.take(f"optimizer.{key}")] * len(groups)
            yield settings.compare(f"optimizer.{key}", ours, theirs)
    if "param_groups" not in settings:
        return
    members, their_settings, their_lrs, our_settings, our_lrs = [], {}, {}, {}, {}
    for index, group in enumerate(settings.take("param_groups")):
        given = dict(group)
        members.append(sorted(our_path(name)[0] for name in given.pop("params")))
        name = label(members[-1][0])
        where = f"group {index} ({name})"
        their_lrs[where] = given.pop("lr_after_dim_scaling")
        their_settings |= {f"{where} {key}": value for key, value in given.items()}
        if name == "muon":
            ours = {"kind": "muon", "ns_steps": len(POLAR_EXPRESS), "beta2": VARIANCE_DECAY}
            our_lrs[where] = o.matrix_lr
        else:
            g = groups[name]
            ours = {"kind": "adamw", "betas": [g.b1, g.b2], "eps": ADAM_EPS}
            ours["weight_decay"] = g.weight_decay
            our_lrs[where] = g.lr
        our_settings |= {f"{where} {key}": value for key, value in ours.items()}
    # Who is together with whom: AdamW by our labels, Muon by label and shape, as we stack them.
    together: dict[tuple, list[str]] = {}
    for path, value in sorted(case.params.items()):
        shape = value.shape if label(path) == "muon" else None
        together.setdefault((label(path), shape), []).append(path)
    row = settings.compare("param_groups members", sorted(together.values()), sorted(members))
    yield row._replace(compared=sum(map(len, members)))
    yield settings.compare("param_groups settings", our_settings, their_settings)
    yield settings.compare("param_groups lr", our_lrs, their_lrs, LR_TOLERANCE, relative=True)


def compare_steps(case: Case) -> Iterable[Comparison]:
    """One row a step: the weights after it, from the state and the gradients given."""
    given, o = case.settings, optim_config(case)
    multipliers = given.take("optimizer.lr_multiplier")
    momentum = "momentum" if "optimizer.momentum" in given else "muon_momentum"
    decays = [0.0] * len(multipliers)
    if "optimizer.weight_decay_per_step" in given:
        decays = given.take("optimizer.weight_decay_per_step")
    tx = _optimizer(case, multipliers, given.take(f"optimizer.{momentum}"), decays)

    @jax.jit
    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    for step, (multiplier, weight_decay) in enumerate(zip(multipliers, decays, strict=True)):
        grads = case.take_params(f"opt/grad{step}/")
        theirs = case.take_params(f"opt/param{step + 1}/")
        lr_decay = o.matrix_lr * multiplier * weight_decay
        decay = {path: _decay(path, value, lr_decay) for path, value in params.items()}
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
    schedules = {}
    for name, values in (
        ("lr_multiplier", lr_multiplier),
        ("momentum", momentum),
        ("weight_decay", weight_decay),
    ):
        table = jnp.asarray(values, jnp.float32)
        schedules[name] = lambda step, table=table: table[step]
    return build_optimizer(case.params, case.config.model_dim, optim_config(case), **schedules)


def _decay(path: str, value: jax.Array, lr_decay: float) -> np.ndarray | float:
    """How much cautious decay changes each element where it is applied; 0 for AdamW's."""
    if label(path) != "muon":
        return 0.0
    return lr_decay * max(1.0, value.shape[1] / value.shape[0]) ** 0.5 * np.abs(np.asarray(value))


def compare_step(
    file: Reference, what: str, ours: dict, theirs: dict, decay: dict
) -> tuple[Comparison, dict[str, jax.Array]]:
    """The row, and the weights to go on from: ours, but the reference's where rounding decided the
    sign."""
    settled, num_rounded = {}, 0
    for path in ours.keys() & theirs.keys():
        if ours[path].shape == theirs[path].shape:
            difference = np.abs(np.asarray(ours[path]) - theirs[path])
            off_by_decay = np.abs(difference - decay[path]) <= STEP_TOLERANCE
            rounded = (difference > STEP_TOLERANCE) & off_by_decay
            num_rounded += int(np.sum(rounded))
            settled[path] = np.where(rounded, theirs[path], ours[path])
    if num_rounded > MAX_ROUNDED_SIGNS:
        settled = {}
    row = file.compare(what, ours | settled, theirs, STEP_TOLERANCE)
    if num_rounded and row.ok:
        row = row._replace(
            note=f"{num_rounded} of at most {MAX_ROUNDED_SIGNS} signs are rounding's"
        )
    return row, ours | {path: jnp.asarray(value) for path, value in settled.items()}


def compare_trajectory(case: Case, batch: dict, tile: int) -> Iterable[Comparison]:
    """Training on the one batch, loss before each update. Its settings are given in prose."""
    note = str(case.settings.take("optimizer.note"))
    theirs = case.arrays.take("trajectory_loss")

    def stated(name: str, otherwise: float | None = None) -> list[float]:
        match = re.search(rf"trajectory:.*?\b{name} ([0-9]+(?:\.[0-9]+)?)", note)
        if not match and otherwise is None:
            raise ValueError(f"optimizer.note does not say the trajectory's {name}: {note!r}")
        return [float(match[1] if match else otherwise or 0.0)] * len(theirs)

    decay = stated("weight decay", case.settings.take("optimizer.weight_decay"))
    tx = _optimizer(case, stated("multiplier"), stated("momentum"), decay)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), case.params, tx.init(case.params), key)
    owners = Owners(case.config, case.mesh)
    state = owners.to_owned(state)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=tile)
    losses = []
    with jax.set_mesh(case.mesh):
        for _ in theirs:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    yield case.arrays.compare("trajectory_loss", np.array(losses), theirs, TRAJECTORY_TOLERANCE)
