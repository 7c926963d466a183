"""Parity of a model's numbers: classic.npz/.json or modern.npz/.json of a folder.

Logits, losses and gradients (the definition and the tiled form that training uses), policy
gradient, bits per byte, greedy tokens, counts; optimizer and training steps are in updates.py.
Sizes, seeds, numbers of steps and lengths are whatever the files hold. A key that nothing here
takes out is a row that misses.
"""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.model import accounting
from nanochat_jax.model.gpt import bind, param_shapes
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum, token_nll
from nanochat_jax.parity.case import Case, exact_arithmetic, read_case
from nanochat_jax.parity.reference import close_row, exact_row, guarded
from nanochat_jax.parity.rows import Row, not_comparable
from nanochat_jax.parity.updates import compare_groups, compare_steps, compare_trajectory
from nanochat_jax.rl.policy import policy_loss

TOLERANCE = 1e-5  # logits, losses, gradients: float32, no more than rounding apart
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# What a generation's npz and json must hold; more of what we know is compared where it is there.
EXPECTED = {
    "classic": (
        {"logits", "loss_mean", "loss_none", "rl_loss", "bpb", "greedy_tokens", "trajectory_loss"}
        | {"num_params", "flops_per_token"},
        {"optimizer.adam_betas", "optimizer.adam_eps", "optimizer.weight_decay"},
    ),
    "modern": (
        {"logits", "loss_mean", "loss_none", "greedy_tokens", "greedy_long_tokens"}
        | {"window_sizes", "trajectory_loss"},
        {"param_groups", "param_counts.total", "flops_per_token", "matmul_params"},
    ),
}


def compare_model(folder: Path, generation: str) -> list[Row]:
    """Rows for everything in the two files; a broken or missing file is a row that misses."""
    npz = f"{generation}.npz"
    with exact_arithmetic():
        try:
            case = read_case(Path(folder), generation)
        except (UserError, LookupError, TypeError, ValueError, AssertionError) as error:
            return [not_comparable(npz, "all", str(error.args[0] if error.args else error))]
        shapes = {path: leaf.shape for path, leaf in param_shapes(case.config).items()}
        reference = {path: value.shape for path, value in case.params.items()}
        rows = [exact_row(npz, "state/* (names, shapes)", shapes, reference)]
        if not rows[0].ok:
            return rows
        for what, compare in (
            ("forward", compare_forward),
            ("gradients", compare_gradients),
            ("bpb", compare_bpb),
            ("greedy tokens", compare_greedy),
            ("counts", compare_counts),
            ("optimizer groups", compare_groups),
            ("optimizer steps", compare_steps),
            ("trajectory", compare_trajectory),
        ):
            rows += guarded(npz, what, lambda compare=compare: compare(case))
    for reference, expected in zip((case.arrays, case.settings), EXPECTED[generation], strict=True):
        missing = sorted(expected - set(reference.keys()))
        rows += [not_comparable(reference.file, key, "missing") for key in missing]
        rows += reference.leftovers()
    return rows


def compare_forward(case: Case) -> Iterable[Row]:
    @jax.jit
    def forward(params):
        model, head = bind(case.config, params), params["lm_head.kernel"]
        hidden, V = model.hidden(case.ids), case.config.vocab_size
        naive = cross_entropy_naive(hidden, head, case.targets, V)
        return model(case.ids), naive, token_nll(hidden, head, case.targets, V, case.tile)

    logits, naive, tiled = forward(case.params)
    arrays, file = case.arrays, case.arrays.file
    yield close_row(file, "logits", logits, arrays.take("logits"), TOLERANCE)
    reference = arrays.take("loss_none").reshape(case.targets.shape)
    yield close_row(file, "loss_none", naive, reference, TOLERANCE)
    yield close_row(file, "loss_none, tiled", tiled, reference, TOLERANCE)


def compare_gradients(case: Case) -> Iterable[Row]:
    """Of the mean loss, by its definition and tiled, and of the policy gradient's loss.

    All three meet the model at its last hidden state; one compiled pullback takes them from there.
    """
    targets, arrays, V = case.targets, case.arrays, case.config.vocab_size
    num_targets = jnp.sum(targets >= 0).astype(jnp.float32)

    def naive(hidden, head):
        return jnp.sum(cross_entropy_naive(hidden, head, targets, V)) / num_targets

    def tiled(hidden, head):
        weights = jnp.broadcast_to(1 / num_targets, targets.shape)
        return cross_entropy_sum(hidden, head, targets, weights, V, case.tile)

    mean, grads = arrays.take("loss_mean"), case.take_params("grad/")
    losses = [("loss_mean", mean, "grad/*", grads, naive)]
    losses += [("loss_mean, tiled", mean, "grad/*, tiled", grads, tiled)]
    if "rl_loss" in arrays:
        advantages = jnp.asarray(arrays.take("advantages"), jnp.float32)

        def policy(hidden, head):
            return policy_loss(hidden, head, targets, advantages, V, case.tile)

        rl_grads = case.take_params("rl_grad/")
        losses += [("rl_loss", arrays.take("rl_loss"), "rl_grad/*", rl_grads, policy)]

    def hidden_of(params):
        return bind(case.config, params).hidden(case.ids)

    @jax.jit
    def pull_back(params, d_hidden):
        return jax.vjp(hidden_of, params)[1](d_hidden)[0]

    hidden, head = jax.jit(hidden_of)(case.params), case.params["lm_head.kernel"]
    for what, reference, what_grads, reference_grads, loss_fn in losses:
        loss, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(hidden, head)
        ours = pull_back(case.params, d_hidden) | {"lm_head.kernel": d_head}
        yield close_row(arrays.file, what, loss, reference, TOLERANCE)
        yield close_row(arrays.file, what_grads, ours, reference_grads, TOLERANCE)


def compare_bpb(case: Case) -> Iterable[Row]:
    if "bpb" not in case.arrays:
        return
    bpb = make_bpb(case.config, case.mesh, case.arrays.take("token_bytes"), case.tile)
    ours = bpb(case.params, [{"inputs": case.ids, "targets": case.targets}])
    yield close_row(case.arrays.file, "bpb", ours, case.arrays.take("bpb"), TOLERANCE)


def compare_greedy(case: Case) -> Iterable[Row]:
    for match in case.arrays.matching(r"(greedy\w*)_tokens"):
        prompt = case.arrays.take(f"{match[1]}_prompt").tolist()
        reference = case.arrays.take(match[0]).tolist()
        max_len = len(prompt) + len(reference)
        engine = Engine(case.config, case.mesh, slots=1, max_len=max_len, stop_ids=())
        engine.load(case.params)
        (ours,) = engine.generate([Request(prompt, len(reference))])
        yield exact_row(case.arrays.file, match[0], ours.tokens, reference)


def compare_counts(case: Case) -> Iterable[Row]:
    """Closed forms of the accounting, and the number of weights there are."""
    c = case.config
    counts = accounting.param_counts(c)
    ours = {
        "num_params": counts["total"],
        "flops_per_token": accounting.train_flops_per_token(c),
        "matmul_params": accounting.matmul_params(c),
        "window_sizes": list(c.windows),
    }
    for reference in (case.arrays, case.settings):
        for match in reference.matching(r"decode_flops_at_(\d+)"):
            ours[match[0]] = accounting.decode_flops(c, int(match[1]))
        for match in reference.matching(rf"kv_bytes_per_token_({'|'.join(KV_BYTES)})"):
            ours[match[0]] = accounting.kv_bytes_per_token(c, KV_BYTES[match[1]])
        for key in reference.keys():
            if key in ours:
                value = np.asarray(reference.take(key)).tolist()
                yield exact_row(reference.file, key, ours[key], value)
        if reference.matching(r"param_counts\..*"):
            value = reference.under("param_counts.")
            yield exact_row(reference.file, "param_counts", counts, value)
    weights = sum(value.size for value in case.params.values())
    yield exact_row(case.arrays.file, "state/* (number of weights)", counts["total"], weights)
