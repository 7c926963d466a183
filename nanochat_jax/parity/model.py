"""Parity of a model's numbers: classic.npz/.json or modern.npz/.json of a folder.

Logits, losses and gradients (the definition and the tiled form that training uses), policy
gradient, bits per byte, greedy tokens, counts; optimizer and training steps are in updates.py.
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
from nanochat_jax.parity.reference import Comparison, Reference, collect, miss
from nanochat_jax.parity.updates import compare_groups, compare_steps, compare_trajectory
from nanochat_jax.rl.policy import policy_loss

TOLERANCE = 1e-5  # logits, losses, gradients: float32, no more than rounding apart
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What the two files of a generation must hold beside what every model has.
EXPECTED = {
    "classic": (
        {"rl_loss", "bpb", "greedy_tokens", "num_params", "flops_per_token"},
        {"optimizer.adam_betas"},
    ),
    "modern": (
        {"greedy_tokens", "greedy_long_tokens", "window_sizes"},
        {"param_groups", "param_counts.total", "flops_per_token", "matmul_params"},
    ),
}


def compare_model(
    folder: Path, arrays: Reference, settings: Reference, generation: str
) -> Iterable[Comparison]:
    case = read_case(arrays, settings, generation)
    row = case.compare_shapes("state/* (names, shapes)")
    yield row
    if not row.ok:
        return
    ids, targets = (jnp.asarray(arrays.take(key), jnp.int32) for key in ("idx", "targets"))
    batch = {"inputs": ids, "targets": targets}
    # Time steps of a loss tile: several tiles, and a last one that is not full.
    tile = next((n for n in (7, 5, 3) if ids.shape[1] % n), 7)
    for what, rows in (
        ("forward", compare_forward(case, batch, tile)),
        ("gradients", compare_gradients(case, batch, tile)),
        ("bpb", compare_bpb(case, batch, tile)),
        ("greedy tokens", compare_greedy(case)),
        ("counts", compare_counts(case)),
        ("optimizer groups", compare_groups(case)),
        ("optimizer steps", compare_steps(case)),
        ("trajectory", compare_trajectory(case, batch, tile)),
    ):
        yield from collect(arrays.file, what, rows)
    for reference, expected in zip((arrays, settings), EXPECTED[generation], strict=True):
        missing = sorted(key for key in expected if key not in reference)
        yield from (miss(reference.file, key, "missing") for key in missing)


def compare_forward(case: Case, batch: dict, tile: int) -> Iterable[Comparison]:
    @jax.jit
    def forward(params):
        model = bind(case.config, params)
        loss_of = (model.hidden(batch["inputs"]), params["lm_head.kernel"], batch["targets"])
        naive = cross_entropy_naive(*loss_of, case.config.vocab_size)
        return model(batch["inputs"]), naive, token_nll(*loss_of, case.config.vocab_size, tile)

    logits, naive, tiled = forward(case.params)
    yield case.arrays.compare("logits", logits, case.arrays.take("logits"), TOLERANCE)
    theirs = case.arrays.take("loss_none").reshape(batch["targets"].shape)
    yield case.arrays.compare("loss_none", naive, theirs, TOLERANCE)
    yield case.arrays.compare("loss_none, tiled", tiled, theirs, TOLERANCE)


def compare_gradients(case: Case, batch: dict, tile: int) -> Iterable[Comparison]:
    """Of the mean loss, by its definition and tiled, and of the policy gradient's loss.

    All three meet the model at its last hidden state; one compiled pullback takes them from there.
    """
    arrays, targets, V = case.arrays, batch["targets"], case.config.vocab_size
    num_targets = jnp.sum(targets >= 0).astype(jnp.float32)

    def naive(hidden, head):
        return jnp.sum(cross_entropy_naive(hidden, head, targets, V)) / num_targets

    def tiled(hidden, head):
        weights = jnp.broadcast_to(1 / num_targets, targets.shape)
        return cross_entropy_sum(hidden, head, targets, weights, V, tile)

    def policy(hidden, head):
        advantages = jnp.asarray(arrays.take("advantages"), jnp.float32)
        return policy_loss(hidden, head, targets, advantages, V, tile)

    def hidden_of(params):
        return bind(case.config, params).hidden(batch["inputs"])

    @jax.jit
    def pull_back(params, d_hidden):
        return jax.vjp(hidden_of, params)[1](d_hidden)[0]

    hidden, head = jax.jit(hidden_of)(case.params), case.params["lm_head.kernel"]
    losses = [("loss_mean", "grad/", "", naive), ("loss_mean", "grad/", ", tiled", tiled)]
    losses += [("rl_loss", "rl_grad/", "", policy)] if "rl_loss" in arrays else []
    for key, prefix, form, loss_fn in losses:
        loss, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(hidden, head)
        grads = pull_back(case.params, d_hidden) | {"lm_head.kernel": d_head}
        yield arrays.compare(key + form, loss, arrays.take(key), TOLERANCE)
        yield arrays.compare(f"{prefix}*{form}", grads, case.take_params(prefix), TOLERANCE)


def compare_bpb(case: Case, batch: dict, tile: int) -> Iterable[Comparison]:
    if "bpb" in case.arrays:
        bpb = make_bpb(case.config, case.mesh, case.arrays.take("token_bytes"), tile)
        ours = bpb(case.params, [batch])
        yield case.arrays.compare("bpb", ours, case.arrays.take("bpb"), TOLERANCE)


def compare_greedy(case: Case) -> Iterable[Comparison]:
    for match in case.arrays.matching(r"(greedy\w*)_tokens"):
        prompt = case.arrays.take(f"{match[1]}_prompt").tolist()
        theirs = case.arrays.take(match[0]).tolist()
        max_len = len(prompt) + len(theirs)
        engine = Engine(case.config, case.mesh, slots=1, max_len=max_len, stop_ids=())
        engine.load(case.params)
        (ours,) = engine.generate([Request(prompt, len(theirs))])
        yield case.arrays.compare(match[0], ours.tokens, theirs)


def compare_counts(case: Case) -> Iterable[Comparison]:
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
        for key in reference:
            if key in ours:
                yield reference.compare(key, ours[key], np.asarray(reference.take(key)).tolist())
        if reference.matching(r"param_counts\..*"):
            yield reference.compare("param_counts", counts, reference.under("param_counts."))
    weights = sum(value.size for value in case.params.values())
    yield case.arrays.compare("state/* (number of weights)", counts["total"], weights)
