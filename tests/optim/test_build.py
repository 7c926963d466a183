"""Who is optimised how: every parameter has a group, and AdamW is the textbook's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.optim.build import OptimConfig, adam_groups, build_optimizer, label, warm_start

CLASSIC = OptimConfig("classic", 0.3, 0.004, matrix_lr=0.02, scalar_lr=0.5, smear_lr=0.2)
MODERN = replace(CLASSIC, recipe="modern", unembed_lr=0.008)
SHAPE = {"vocab_size": 64, "model_dim": 24, "num_heads": 2, "num_kv_heads": 1, "seq_len": 8}
SCHEDULES = {
    "lr_multiplier": lambda step: jnp.array([1.0, 0.5, 0.25])[step],
    "momentum": lambda step: 0.95,
    "weight_decay": lambda step: 0.0,
}


@pytest.mark.parametrize("extras", [False, True], ids=["classic", "modern"])
def test_every_parameter_has_a_group_of_its_generation(extras):
    shapes = param_shapes(GPTConfig(num_layers=3, extras=extras, **SHAPE))
    labels = {path: label(path) for path in shapes}
    groups = adam_groups(MODERN if extras else CLASSIC, SHAPE["model_dim"])
    assert set(labels.values()) == {"muon", *groups}
    muon = {path for path, name in labels.items() if name == "muon"}
    assert muon == {path for path in shapes if path.startswith("blocks.")}
    assert all(shapes[path].ndim == 2 for path in muon)
    if extras:
        assert labels["blocks.0.attn.ve_gate.kernel"] == "muon"
        assert labels["smear_gate.kernel"] == labels["backout_lambda"] == "smear"


@pytest.mark.parametrize("path", ["bias", "wte2.table", "head.kernel", "x.blocks.0", "x0_lambdas"])
def test_a_parameter_without_a_group_or_settings_is_an_error(path):
    with pytest.raises(ValueError, match="x0" if path == "x0_lambdas" else path):
        build_optimizer(["wte.table", path], 24, CLASSIC, **SCHEDULES)


def test_learning_rates_scale_with_width_and_batch():
    """Tables and head with dim^-0.5; everything with the batch but smear."""

    def rates(dim: int, scale: float) -> dict[str, float]:
        groups = adam_groups(replace(MODERN, lr_scale=scale), dim)
        return {name: group.lr for name, group in groups.items()}

    base = rates(768, 1.0)
    tables = {"embed": 0.3, "unembed": 0.008, "value_embeds": 0.15}
    assert base == tables | {"resid": 0.005, "x0": 0.5, "smear": 0.2}
    for name, lr in base.items():
        by_dim, by_batch = 2 if name in tables else 1, 1 if name == "smear" else 3
        assert rates(192, 1.0)[name] == pytest.approx(lr * by_dim)
        assert rates(192, 3.0)[name] == pytest.approx(lr * by_dim * by_batch)


def draw(rng, shapes) -> dict[str, np.ndarray]:
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def plain_adamw(p, grads, lrs, b1, b2, decay, eps=1e-10):
    """Decay first, decoupled; then the step with both moments corrected."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        p = p * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize("recipe", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_three_steps_equal_plain_adamw(recipe):
    config = GPTConfig(num_layers=1, extras=recipe.recipe == "modern", **SHAPE)
    rng = np.random.default_rng(0)
    shapes = {path: s.shape for path, s in param_shapes(config).items() if label(path) != "muon"}

    start, *grads = (draw(rng, shapes) for _ in range(4))
    tx = build_optimizer(shapes, config.model_dim, recipe, **SCHEDULES)

    @jax.jit
    def step(params, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    for g in grads:
        params, state = step(params, state, g)
    groups = adam_groups(recipe, config.model_dim)
    for path, p in start.items():
        group = groups[label(path)]
        lrs = [group.lr * multiplier for multiplier in (1.0, 0.5, 0.25)]
        own = [g[path] for g in grads]
        expected = plain_adamw(p, own, lrs, group.b1, group.b2, group.weight_decay)
        np.testing.assert_allclose(params[path], expected, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("recipe", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_a_warm_start_keeps_moments_and_restarts_schedules(recipe):
    """A step after it is the step that would have come, at the new schedules' first values."""
    config = GPTConfig(num_layers=1, extras=recipe.recipe == "modern", **SHAPE)
    rng = np.random.default_rng(0)
    shapes = {path: s.shape for path, s in param_shapes(config).items()}
    params, *grads = (draw(rng, shapes) for _ in range(5))

    def optimizer(lrs, momenta, decays):
        steps = {"lr_multiplier": lrs, "momentum": momenta, "weight_decay": decays}
        schedules = {name: partial(jnp.take, jnp.array(values)) for name, values in steps.items()}
        return build_optimizer(shapes, config.model_dim, recipe, **schedules)

    # One schedule all the way, and the same values cut in two at the warm start.
    lrs, momenta, decays = [1.0, 0.5, 0.9, 0.3], [0.85, 0.9, 0.95, 0.8], [0.1, 0.3, 0.2, 0.0]
    whole = optimizer(lrs, momenta, decays)
    first = optimizer(lrs[:2], momenta[:2], decays[:2])
    second = optimizer(lrs[2:], momenta[2:], decays[2:])

    def updates(update_step, state, grads):
        made = []
        with jax.numpy_dtype_promotion("standard"):
            for g in grads:
                update, state = update_step(g, state, params)
                made.append(update)
        return made, state

    start = whole.init(params)
    whole, first, second = (jax.jit(tx.update) for tx in (whole, first, second))
    expected, _ = updates(whole, start, grads)
    _, state = updates(first, start, grads[:2])
    warm, _ = updates(second, warm_start(state), grads[2:])
    for step in (0, 1):
        for path, update in warm[step].items():
            np.testing.assert_allclose(update, expected[2 + step][path], rtol=1e-6, err_msg=path)
    cold, _ = updates(second, start, grads[2:])
    assert all(not np.allclose(cold[0][path], update) for path, update in warm[0].items())
