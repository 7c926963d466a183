"""The model against a plain float64 one in NumPy, and the properties that any GPT has."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, bind, init_params, param_shapes
from nanochat_jax.model.loss import cross_entropy_sum
from tests.model.programs import equations

CLASSIC = GPTConfig(
    vocab_size=60, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, seq_len=16
)
MODERN = replace(
    CLASSIC, num_layers=3, seq_len=512, window_pattern="SL", extras=True, qk_scale=1.2,
    rope_base=100_000.0, embed_init_std=0.8, fc_init_scale=0.4,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])


def tiny_ids(config: GPTConfig, rows: int, seq_len: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(config.vocab_size, size=(rows, seq_len)).astype(np.int32)


def plain_logits(c: GPTConfig, params: dict, ids: np.ndarray, window_of=None) -> np.ndarray:
    """One row of ids -> logits [T, V], position by position and head by head."""
    p = {path: np.asarray(value, np.float64) for path, value in params.items()}
    T, H = len(ids), c.head_dim

    def norm(x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.finfo(np.float32).eps)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def turn(x):  # [T, H], by minus the angle
        angle = np.arange(T)[:, None] * c.rope_base ** (-np.arange(0, H, 2) / H)
        a, b = x[:, : H // 2], x[:, H // 2 :]
        turned = [a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)]
        return norm(np.concatenate(turned, -1)) * c.qk_scale

    x = norm(p["wte.table"][ids])
    if c.extras:
        gate = sigmoid(x[:, :24] @ p["smear_gate.kernel"]) * p["smear_lambda"]
        x = np.concatenate([x[:1], x[1:] + gate[1:] * x[:-1]])
    x0 = mid = x
    for layer in range(c.num_layers):
        block = {k: p[f"blocks.{layer}.{k}.kernel"] for k in ("attn.c_q", "attn.c_k", "attn.c_v")}
        if c.extras:
            x = p["resid_lambdas"][layer] * x + p["x0_lambdas"][layer] * x0
        h = norm(x)
        q, k, v = (h @ block[f"attn.c_{name}"] for name in "qkv")
        if c.extras and layer % 2 == (c.num_layers - 1) % 2:
            gates = 3 * sigmoid(h[:, :12] @ p[f"blocks.{layer}.attn.ve_gate.kernel"])
            v = v + np.repeat(gates, H, 1) * p[f"value_embeds.{layer}.table"][ids]
        heads = []
        window = (window_of or (lambda i: c.windows[i]))(layer)
        for n in range(c.num_heads):
            kv = slice((n // (c.num_heads // c.num_kv_heads)) * H, None)
            queries, keys = turn(q[:, n * H :][:, :H]), turn(k[:, kv][:, :H])
            values = v[:, kv][:, :H]
            head = np.zeros((T, H))
            for t in range(T):
                seen = slice(max(0, t - window), t + 1)
                weights = np.exp(keys[seen] @ queries[t] / np.sqrt(H))
                head[t] = weights / weights.sum() @ values[seen]
            heads.append(head)
        x = x + np.concatenate(heads, -1) @ p[f"blocks.{layer}.attn.c_proj.kernel"]
        hidden = np.maximum(norm(x) @ p[f"blocks.{layer}.mlp.c_fc.kernel"], 0) ** 2
        x = x + hidden @ p[f"blocks.{layer}.mlp.c_proj.kernel"]
        mid = x if layer == c.num_layers // 2 else mid
    if c.extras:
        x = x - p["backout_lambda"] * mid
    logits = norm(x) @ p["lm_head.kernel"]
    return 15 * np.tanh(logits[:, : c.vocab_size] / 15)


@partial(jax.jit, static_argnums=0)
def logits(config, params, ids):
    return bind(config, params)(ids)


initialise = jax.jit(init_params, static_argnums=0)


@pytest.mark.parametrize(
    "config, seq_len",
    [
        (CLASSIC, 16),
        (replace(CLASSIC, num_layers=1, num_kv_heads=4, vocab_size=64), 9),
        (MODERN, 140),
        (replace(MODERN, num_layers=4, num_kv_heads=1, window_pattern="SSL"), 135),
    ],
    ids=["classic", "classic, no GQA, no padding", "modern", "modern, one KV head, even depth"],
)
def test_equals_the_plain_model(config, seq_len, random_params):
    params, ids = random_params(config), tiny_ids(config, 2, seq_len)
    ours = logits(config, params, ids)
    assert ours.dtype == np.float32
    for row in range(2):
        np.testing.assert_allclose(ours[row], plain_logits(config, params, ids[row]), atol=2e-5)


def test_classic_sees_everything_even_beyond_its_training_length(random_params):
    params, ids = random_params(CLASSIC), tiny_ids(CLASSIC, 1, 3 * CLASSIC.seq_len)
    expected = plain_logits(CLASSIC, params, ids[0], window_of=lambda layer: 10**6)
    np.testing.assert_allclose(logits(CLASSIC, params, ids)[0], expected, atol=2e-5)


@BOTH
def test_no_position_sees_a_later_one(config, random_params):
    params, ids, changed_at = random_params(config), tiny_ids(config, 1, 12), 7
    changed = ids.copy()
    changed[0, changed_at] = (ids[0, changed_at] + 1) % config.vocab_size
    before, after = logits(config, params, np.concatenate([ids, changed]))
    np.testing.assert_array_equal(before[:changed_at], after[:changed_at])
    assert np.all(np.any(before[changed_at:] != after[changed_at:], axis=-1))


def test_windows_and_value_embeddings_of_each_layer():
    def windows(pattern, layers, seq_len):
        shape = {"window_pattern": pattern, "num_layers": layers, "seq_len": seq_len}
        return replace(MODERN, **shape).windows

    assert windows("SSSL", 6, 2_048) == (512, 512, 512, 2_048, 512, 2_048)
    assert windows("L", 2, 2_048) == (2_048, 2_048)
    assert windows("S", 3, 1_000) == (256, 256, 1_000)  # 250, up to a multiple of 128
    assert windows("SL", 2, 64) == (128, 64)  # shorter than the shortest window
    with_value_embeds = {
        depth: [i for i in range(depth) if replace(MODERN, num_layers=depth).has_value_embed(i)]
        for depth in (1, 2, 5)
    }
    assert with_value_embeds == {1: [0], 2: [1], 5: [0, 2, 4]}
    assert not any(CLASSIC.has_value_embed(layer) for layer in range(2))


def mean_loss(config, ids):
    def loss(params):
        hidden = bind(config, params).hidden(ids[:, :-1])
        weights = jnp.full(ids[:, 1:].shape, 1 / ids[:, 1:].size, jnp.float32)
        head = params["lm_head.kernel"]
        return cross_entropy_sum(hidden, head, ids[:, 1:], weights, config.vocab_size, 5)

    return loss


def test_recomputing_activations_changes_no_gradient(random_params):
    config = replace(MODERN, num_layers=1)
    params, ids = random_params(config), tiny_ids(config, 2, 10)
    kept, *recomputed = (
        jax.jit(jax.value_and_grad(mean_loss(replace(config, remat=remat), ids)))(params)
        for remat in ("none", "names", "full")
    )
    for other in recomputed:
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "scores", "gates"), [(CLASSIC, 1, 0), (MODERN, 1, 0.5)], ids=["classic", "modern"]
)
def test_what_each_remat_computes_twice(config, scores, gates):
    """names: the scores of the attention, and value embeddings' gates (on every other layer). full:
    all of a block's matmuls but its last, whose result the backward pass does not read."""
    config = replace(config, num_layers=2)
    ids = jax.ShapeDtypeStruct((2, 10), jnp.int32)

    def dots(remat: str) -> int:
        def total(params, ids):
            return bind(replace(config, remat=remat), params).hidden(ids).sum()

        traced = jax.make_jaxpr(jax.grad(total))(param_shapes(config), ids)
        return sum(e.primitive.name == "dot_general" for e, _ in equations(traced.jaxpr))

    none, names, full = (dots(remat) for remat in ("none", "names", "full"))
    assert (names - none) / 2 == scores + gates
    assert (full - none) / 2 == 2 + 6 - 1 + gates  # attention, the block's six, the last not


@BOTH
def test_what_each_remat_keeps_for_the_backward_pass(config):
    """By the leaves of the gradient's closure: values a token and layer, in units of model_dim."""
    config = replace(config, model_dim=512, num_heads=4, num_kv_heads=4, seq_len=64)
    ids = jax.ShapeDtypeStruct((64, 64), jnp.int32)
    per_layer = {}
    for remat in ("none", "names", "full"):
        sizes = []
        for depth in (3, 5):  # in both the middle is the input of a block
            c = replace(config, num_layers=depth, remat=remat)

            def backward(params, ids, c=c):
                return jax.vjp(lambda params: bind(c, params).hidden(ids), params)[1]

            shapes = param_shapes(c)
            kept = jax.tree.leaves(jax.eval_shape(backward, shapes, ids))
            weights = {leaf.shape for leaf in shapes.values()}
            sizes.append(sum(leaf.size for leaf in kept if leaf.shape not in weights))
        per_layer[remat] = (sizes[1] - sizes[0]) / 2 / (ids.size * config.model_dim)
    # full: what a block begins with. names: also q, k, v, attention, projection, 4 of the MLP.
    assert per_layer["full"] == pytest.approx(1, abs=0.3)
    assert per_layer["names"] == pytest.approx(10, abs=0.4)
    assert per_layer["none"] > 17


@BOTH
def test_bfloat16_loss_is_within_a_percent(config, random_params):
    params, ids = random_params(config), tiny_ids(config, 4, 33)
    exact, rounded = (
        float(jax.jit(mean_loss(replace(config, compute_dtype=dtype), ids))(params))
        for dtype in ("float32", "bfloat16")
    )
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.01)


@BOTH
def test_fresh_parameters_follow_the_documented_spread(config):
    config = replace(config, model_dim=128, vocab_size=1_024)
    params = initialise(config, jax.random.key(3))
    by_width = 128**-0.5
    spread = {"wte.table": config.embed_init_std, "lm_head.kernel": 0.001, "c_proj.kernel": 0.0}
    spread |= {"c_fc.kernel": by_width * config.fc_init_scale}  # the others: by_width
    exact = {
        "resid_lambdas": [1.15, 1.10, 1.05],
        "x0_lambdas": [0.20, 0.125, 0.05],
        "smear_lambda": [0.0],
        "backout_lambda": [0.2],
    }
    for path, value in params.items():
        if path in exact:
            np.testing.assert_allclose(value, exact[path], rtol=1e-6)
        elif "gate" in path:
            assert 0 <= value.min() < value.max() <= 0.02
        else:
            std = next((std for end, std in spread.items() if path.endswith(end)), by_width)
            assert float(value.std()) == pytest.approx(std, rel=0.05)
            assert abs(float(value.mean())) <= 4 * std / value.size**0.5
            if path.endswith(("c_q.kernel", "c_fc.kernel")):  # uniform: no outliers
                assert float(jnp.abs(value).max()) <= 3**0.5 * std * (1 + 1e-6)
