"""Parity of a model's numbers: classic.npz/.json or modern.npz/.json of a folder.

Logits, losses and gradients (the definition and the tiled form that training uses), policy
gradient, bits per byte, greedy tokens, counts. Optimizer and training steps are in updates.py.
Sizes, seeds, numbers of steps and lengths are whatever the files hold.
"""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.model import accounting
from nanochat_jax.model.gpt import bind
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum, token_nll
from nanochat_jax.parity.case import Case, read_case
from nanochat_jax.parity.reference import Reference, Row, collect, miss
from nanochat_jax.parity.updates import compare_groups, compare_steps, compare_trajectory
from nanochat_jax.rl.policy import policy_loss

TOLERANCE = 1e-5  # logits, losses, gradients: float32, no more than rounding apart
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What the files of a generation must hold beside what every model has.
EXPECTED = {
    "classic": "bpb flops_per_token greedy_tokens num_params optimizer.adam_betas rl_loss",
    "modern": "flops_per_token greedy_long_tokens greedy_tokens matmul_params param_counts.total "
    "param_groups window_sizes",
}


def compare_model(
    folder: Path, arrays: Reference, settings: Reference, generation: str
) -> Iterable[Row]:
    case = read_case(arrays, settings, generation)
    row = case.compare_shapes("state/* (names, shapes)")
    yield row
    if not row.ok:
        return
    for what, compare in (
        ("losses", compare_losses),
        ("bpb", compare_bpb),
        ("greedy tokens", compare_greedy),
        ("counts", compare_counts),
        ("optimizer groups", compare_groups),
        ("optimizer steps", compare_steps),
        ("trajectory", compare_trajectory),
    ):
        yield from collect(arrays.file, what, compare(case))
    for key in EXPECTED[generation].split():
        if key not in arrays and key not in settings:
            yield miss(arrays.file, key, "missing")


def compare_losses(case: Case) -> Iterable[Row]:
    """Logits and losses, by their definition and tiled, and gradients: of the mean loss, again by
    its definition and tiled, and of the policy gradient's loss.

    All losses are functions of the last hidden state; one compiled pullback takes the gradient from
    there to the parameters.
    """
    arrays, batch, tile, V = case.arrays, case.batch, case.tile, case.config.vocab_size
    targets, head = batch["targets"], case.params["lm_head.kernel"]
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
    yield arrays.compare("logits", logits, arrays["logits"], TOLERANCE)
    ours = cross_entropy_naive(hidden, head, targets, V)
    yield arrays.compare("loss_none", ours, theirs, TOLERANCE)
    ours = token_nll(hidden, head, targets, V, tile)
    yield arrays.compare("loss_none, tiled", ours, theirs, TOLERANCE)
    losses = [("loss_mean", "grad", "", naive), ("loss_mean", "grad", ", tiled", tiled)]
    losses += [("rl_loss", "rl_grad", "", policy)] if "rl_loss" in arrays else []
    for key, prefix, form, loss_fn in losses:
        loss, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(hidden, head)
        grads = pull_back(case.params, d_hidden) | {"lm_head.kernel": d_head}
        theirs = case.arrays_of_params(prefix)
        yield arrays.compare(key + form, loss, arrays[key], TOLERANCE)
        yield arrays.compare(f"{prefix}/*{form}", grads, theirs, TOLERANCE)


def compare_bpb(case: Case) -> Iterable[Row]:
    if "bpb" in case.arrays:
        bpb = make_bpb(case.config, case.mesh, case.arrays["token_bytes"], case.tile)
        ours = bpb(case.params, [case.batch])
        yield case.arrays.compare("bpb", ours, case.arrays["bpb"], TOLERANCE)


def compare_greedy(case: Case) -> Iterable[Row]:
    for key in case.arrays:
        name, _, kind = key.rpartition("_")
        if name.startswith("greedy") and kind == "tokens":
            prompt, theirs = case.arrays[f"{name}_prompt"].tolist(), case.arrays[key].tolist()
            max_len = len(prompt) + len(theirs)
            engine = Engine(case.config, case.mesh, slots=1, max_len=max_len, stop_ids=())
            engine.load(case.params)
            (ours,) = engine.generate([Request(prompt, len(theirs))])
            yield case.arrays.compare(key, ours.tokens, theirs)


def compare_counts(case: Case) -> Iterable[Row]:
    """Closed forms of the accounting, and the number of weights there are."""
    c = case.config
    counts = accounting.param_counts(c)
    ours = {
        "num_params": counts["total"],
        "param_counts": counts,
        "flops_per_token": accounting.train_flops_per_token(c),
        "matmul_params": accounting.matmul_params(c),
        "window_sizes": list(c.windows),
    }
    for name, size in KV_BYTES.items():
        ours[f"kv_bytes_per_token_{name}"] = accounting.kv_bytes_per_token(c, size)
    for reference in (case.arrays, case.settings):
        for key in reference:
            name, _, length = key.rpartition("_")
            if name == "decode_flops_at":
                ours[key] = accounting.decode_flops(c, int(length))
        for key in filter(reference.__contains__, ours):
            theirs = reference[key]
            theirs = theirs.tolist() if isinstance(theirs, np.ndarray) else theirs
            yield reference.compare(key, ours[key], theirs)
    weights = sum(value.size for value in case.params.values())
    yield case.arrays.compare("state/* (number of weights)", counts["total"], weights)
