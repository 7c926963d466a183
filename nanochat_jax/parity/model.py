"""Parity of a model and its training: classic.npz/.json or modern.npz/.json of a folder.

Sizes and learning rates come from the json; what a generation fixes (rotary base, extras, betas)
comes from the recipe that people train with, so that the recipe itself is compared too. Numbers of
steps and lengths are whatever the files hold.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.config import CONFIGS, load
from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Request
from nanochat_jax.interop.upstream import our_path, params_from_upstream
from nanochat_jax.model import accounting
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum, token_nll
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim import build
from nanochat_jax.optim.muon import POLAR_EXPRESS, VARIANCE_DECAY
from nanochat_jax.parity.reference import Reference, Row, collect, dotted
from nanochat_jax.rl.policy import policy_loss
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState
from nanochat_jax.train.step import make_train_step

TOLERANCE = 1e-5  # logits, losses, gradients: float32, no more than rounding apart
STEP_TOLERANCE = 2e-5
TRAJECTORY_TOLERANCE = 1e-4
LR_TOLERANCE = 1e-9  # relative; both are computed in float64
# Decay is applied where update and weight have the same sign. Where the update is all but 0 its
# sign is that of a rounding error, and the weight may differ by the decay: lr * wd * |p|.
MAX_ROUNDED_SIGNS = 3  # elements a step
RECIPES = {"classic": CONFIGS / "d20.py", "modern": CONFIGS / "gpt2.py"}
KEYS = {  # the reference's word: ours
    "config.sequence_len": "model.seq_len",
    "config.vocab_size": "tokenizer.vocab_size",
    "config.n_layer": "model.depth",
    "config.n_head": "model.num_heads",
    "config.n_kv_head": "model.num_kv_heads",
    "config.n_embd": "model.model_dim",
    "config.window_pattern": "model.window_pattern",
    "optimizer.embedding_lr": "optim.embed_lr",
    "optimizer.unembedding_lr": "optim.unembed_lr",
    "optimizer.matrix_lr": "optim.matrix_lr",
    "optimizer.scalar_lr": "optim.scalar_lr",
}


@dataclass(frozen=True)
class Case:
    """arrays and settings: the two files of a model."""

    arrays: Reference
    settings: Reference
    config: GPTConfig
    optim: build.OptimConfig
    params: dict[str, jax.Array]
    mesh: Mesh

    @property
    def batch(self) -> dict[str, jax.Array]:
        keys = {"inputs": "idx", "targets": "targets"}
        return {ours: jnp.asarray(self.arrays[key], jnp.int32) for ours, key in keys.items()}

    @property
    def tile(self) -> int:
        """Time steps of a loss tile, so that there are several and the last one is not full."""
        return next((n for n in (7, 5, 3) if self.arrays["idx"].shape[1] % n), 7)

    def compare_shapes(self, what: str) -> Row:
        ours = {path: leaf.shape for path, leaf in param_shapes(self.config).items()}
        return self.arrays.compare(what, ours, {path: v.shape for path, v in self.params.items()})

    def optimizer(self, *schedules: list[float]) -> optax.GradientTransformation:
        """Ours, with values for every step: of the LR's multiplier, momentum and weight decay."""
        names = ("lr_multiplier", "momentum", "weight_decay")
        values = [jnp.asarray(schedule, jnp.float32).__getitem__ for schedule in schedules]
        of_step = dict(zip(names, values, strict=True))
        return build.build_optimizer(self.params, self.config.model_dim, self.optim, **of_step)


def read_case(arrays: Reference, settings: Reference, generation: str) -> Case:
    given = {ours: str(settings[key]).upper() for key, ours in KEYS.items() if key in settings}
    config = load(RECIPES[generation], {"model.compute_dtype": "float32"} | given)
    o = config.optim
    params = params_from_upstream(arrays["state"])
    return Case(
        arrays=arrays,
        settings=settings,
        config=recipe.gpt_config(config),
        optim=recipe.optim_config(config, "cpu", embed_lr=o.embed_lr, unembed_lr=o.unembed_lr),
        params={path: jnp.asarray(value, jnp.float32) for path, value in params.items()},
        mesh=make_mesh(devices=jax.devices()[:1]),
    )


def compare_model(folder: Path, arrays: Reference, settings: Reference) -> Iterable[Row]:
    case = read_case(arrays, settings, Path(arrays.file).stem)
    row = case.compare_shapes("state/* (names, shapes)")
    yield row
    if not row.ok:
        return
    for compare in (compare_losses, compare_greedy, compare_counts):
        yield from collect(arrays.file, compare.__name__, compare(case))
    for compare in (compare_steps, compare_trajectory, compare_groups):
        yield from collect(arrays.file, compare.__name__, compare(case))


def compare_losses(case: Case) -> Iterable[Row]:
    """Logits, losses and gradients; the mean loss by its definition and tiled.

    All losses are functions of the last hidden state; one compiled pullback takes the gradient from
    there to the parameters.
    """
    arrays, batch, tile, V = case.arrays, case.batch, case.tile, case.config.vocab_size
    targets, head, same = batch["targets"], case.params["lm_head.kernel"], TOLERANCE
    num_targets = jnp.sum(targets >= 0).astype(jnp.float32)

    @jax.jit
    def hidden_of(params):
        return bind(case.config, params).hidden(batch["inputs"])

    @jax.jit
    def pull_back(params, d_hidden):
        return jax.vjp(hidden_of, params)[1](d_hidden)[0]

    def naive(hidden, head):
        return jnp.sum(cross_entropy_naive(hidden, head, targets, V)) / num_targets

    def tiled(hidden, head):
        weights = jnp.broadcast_to(1 / num_targets, targets.shape)
        return cross_entropy_sum(hidden, head, targets, weights, V, tile)

    def policy(hidden, head):
        advantages = jnp.asarray(arrays["advantages"], jnp.float32)
        return policy_loss(hidden, head, targets, advantages, V, tile)

    hidden, theirs = hidden_of(case.params), arrays["loss_none"].reshape(targets.shape)
    logits = bind(case.config, case.params).logits(hidden)
    yield arrays.compare("logits", logits, arrays["logits"], same)
    naive_nll = cross_entropy_naive(hidden, head, targets, V)
    tiled_nll = token_nll(hidden, head, targets, V, tile)
    yield arrays.compare("loss_none", naive_nll, theirs, same)
    yield arrays.compare("loss_none, tiled", tiled_nll, theirs, same)
    losses = [("loss_mean", "grad", "", naive), ("loss_mean", "grad", ", tiled", tiled)]
    classic = case.optim.recipe == "classic"
    losses += [("rl_loss", "rl_grad", "", policy)] if classic else []
    for key, prefix, form, loss_fn in losses:
        loss, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(hidden, head)
        grads = pull_back(case.params, d_hidden) | {"lm_head.kernel": d_head}
        theirs = params_from_upstream(arrays[prefix])
        yield arrays.compare(key + form, loss, arrays[key], same)
        yield arrays.compare(f"{prefix}/*{form}", grads, theirs, same)
    if classic:
        bpb = make_bpb(case.config, case.mesh, arrays["token_bytes"], tile)
        yield arrays.compare("bpb", bpb(case.params, [batch]), arrays["bpb"], same)


def compare_greedy(case: Case) -> Iterable[Row]:
    for key in [key for key in case.arrays if re.fullmatch("greedy.*_tokens", key)]:
        theirs, prompt = (case.arrays[k].tolist() for k in (key, key.replace("tokens", "prompt")))
        max_len = len(prompt) + len(theirs)
        engine = Engine(case.config, case.mesh, slots=1, max_len=max_len, stop_ids=())
        engine.load(case.params)
        (ours,) = engine.generate([Request(prompt, len(theirs))])
        yield case.arrays.compare(key, ours.tokens, theirs)


def compare_counts(case: Case) -> Iterable[Row]:
    """Those closed forms of the accounting that the files have, and the number of weights."""
    c = case.config
    counts = accounting.param_counts(c)
    closed_forms = {
        "num_params": lambda: counts["total"],
        "param_counts": lambda: counts,
        "flops_per_token": lambda: accounting.train_flops_per_token(c),
        "matmul_params": lambda: accounting.matmul_params(c),
        "window_sizes": lambda: list(c.windows),
        "kv_bytes_per_token_fp32": lambda: accounting.kv_bytes_per_token(c, 4),
        "decode_flops_at_(.*)": lambda length: accounting.decode_flops(c, int(length)),
    }
    for reference in (case.arrays, case.settings):
        for key in dict.fromkeys(key.partition(".")[0] for key in reference):
            for pattern, compute in closed_forms.items():
                if match := re.fullmatch(pattern, key):
                    theirs = np.asarray(reference[key]).tolist()
                    yield reference.compare(key, compute(*match.groups()), theirs)
    weights = sum(value.size for value in case.params.values())
    yield case.arrays.compare("state/* (number of weights)", counts["total"], weights)


def compare_groups(case: Case) -> Iterable[Row]:
    """Members and settings of the optimizer's groups."""
    settings = case.settings
    groups = build.adam_groups(case.optim, case.config.model_dim)
    if case.optim.recipe == "classic":  # one setting for all of AdamW
        for key, ours in (
            ("optimizer.adam_betas", [[g.b1, g.b2] for g in groups.values()]),
            ("optimizer.adam_eps", [build.ADAM_EPS] * len(groups)),
            ("optimizer.weight_decay", [g.weight_decay for g in groups.values()]),
        ):
            yield settings.compare(key, ours, [settings[key]] * len(groups))
        return
    members, values, lrs = [], ({}, {}), ({}, {})  # of ours and of theirs
    for index, group in enumerate(settings["param_groups"]):
        members.append(sorted(our_path(name) for name in group["params"]))
        name = build.label(members[-1][0])
        theirs = {key: value for key, value in group.items() if key != "params"}
        for side, found in enumerate((_group_settings(case.optim, groups.get(name)), theirs)):
            lrs[side][f"group {index} ({name})"] = found.pop("lr_after_dim_scaling")
            values[side][f"group {index} ({name})"] = found
    # AdamW's groups are our labels; Muon's have one shape each, as we stack them.
    together: dict[tuple, list[str]] = {}
    for path, value in sorted(case.params.items()):
        shape = value.shape if build.label(path) == "muon" else None
        together.setdefault((build.label(path), shape), []).append(path)
    row = settings.compare("param_groups members", sorted(together.values()), sorted(members))
    yield row._replace(compared=sum(map(len, members)))
    yield settings.compare("param_groups settings", dotted(values[0]), dotted(values[1]))
    yield settings.compare("param_groups lr", lrs[0], lrs[1], LR_TOLERANCE, relative=True)


def _group_settings(o: build.OptimConfig, adam: build.AdamGroup | None) -> dict[str, Any]:
    """In the reference's words; `adam` is None for a group of Muon's."""
    if not adam:
        settings = {"kind": "muon", "ns_steps": len(POLAR_EXPRESS), "beta2": VARIANCE_DECAY}
        return settings | {"lr_after_dim_scaling": o.matrix_lr}
    settings = {"kind": "adamw", "betas": [adam.b1, adam.b2], "eps": build.ADAM_EPS}
    return settings | {"weight_decay": adam.weight_decay, "lr_after_dim_scaling": adam.lr}


def compare_steps(case: Case) -> Iterable[Row]:
    """One row a step: the weights after it, from the state and the gradients given."""
    arrays, settings = case.arrays, case.settings
    multipliers = settings["optimizer.lr_multiplier"]
    prefix = "muon_" if "optimizer.muon_momentum" in settings else ""
    momentum = settings[f"optimizer.{prefix}momentum"]
    decays = settings.get("optimizer.weight_decay_per_step", [0.0] * len(multipliers))
    tx = case.optimizer(multipliers, momentum, decays)

    @jax.jit
    def update(grads, opt_state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    for step, (lr, decay) in enumerate(zip(multipliers, decays, strict=True)):
        before, grads = params, params_from_upstream(arrays[f"opt/grad{step}"])
        params, opt_state = update(grads, opt_state, params)
        theirs = params_from_upstream(arrays[f"opt/param{step + 1}"])
        params, note = settle_signs(before, params, theirs, case.optim.matrix_lr * lr * decay)
        row = arrays.compare(f"opt/param{step + 1}/*", params, theirs, STEP_TOLERANCE)
        yield row._replace(note=note) if row.ok else row


def settle_signs(before: dict, ours: dict, theirs: dict, lr_decay: float) -> tuple[dict, str]:
    """Our weights after a step, and a note: the reference's where a rounding error decided the
    sign, for then weights of Muon differ by lr_decay * |weight before|, scaled as the update is."""
    settled, num_rounded = dict(ours), 0
    for path, value in theirs.items():
        if build.label(path) == "muon":
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
    tx = case.optimizer(*([float(value)] * len(theirs) for value in constants))
    key = jax.random.key_data(jax.random.key(0))
    owners = Owners(case.config, case.mesh)
    state = owners.to_owned(TrainState(jnp.int32(0), case.params, tx.init(case.params), key))
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=case.tile)
    losses = []
    with jax.set_mesh(case.mesh):
        for _ in theirs:
            state, metrics = step(state, case.batch)
            losses.append(float(metrics["loss"]))
    yield case.arrays.compare("trajectory_loss", np.array(losses), theirs, TRAJECTORY_TOLERANCE)
