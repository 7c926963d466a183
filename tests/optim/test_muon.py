"""Muon against a plain float64 one written the way the papers do, and what makes it Muon."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.optim.muon import NEWTON_SCHULZ, POLAR_EXPRESS, muon, orthogonalise

SHAPES = {"square": (12, 12), "wide": (8, 24), "tall": (24, 8), "gate": (12, 2)}  # [in, out]
LRS, MOMENTA, DECAYS = [0.02, 0.01, 0.03], [0.85, 0.9, 0.95], [0.3, 0.2, 0.1]
GENERATIONS = pytest.mark.parametrize("modern", [False, True], ids=["classic", "modern"])


def draw(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def table(*values):
    return lambda step: jnp.asarray(values, jnp.float32)[step]


@cache
def transform(modern, decay, dtype):
    tx = muon(table(1.0), table(0.9), table(decay), modern=modern, dtype=dtype)
    return tx.init, jax.jit(tx.update)


def first_update(grads, params, modern, decay=0.0, dtype="float32"):
    init, update = transform(modern, decay, dtype)
    return update(grads, init(params), params)[0]


class PlainMuon:
    """One matrix [out, in], rows are outputs: the form that papers and upstream write."""

    def __init__(self, p: np.ndarray, modern: bool):
        self.p, self.modern = p.astype(np.float64), modern
        self.buf, self.v = np.zeros_like(self.p), 0.0

    def step(self, g: np.ndarray, lr: float, m: float, wd: float) -> None:
        out, fan_in = self.p.shape
        self.buf = m * self.buf + (1 - m) * g
        u = (1 - m) * g + m * self.buf
        size = lr * np.sqrt(max(1, out / fan_in))
        if not self.modern:
            x = u / (np.linalg.norm(u) + 1e-7)
            for a, b, c in NEWTON_SCHULZ:
                x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
            self.p -= size * x
            return
        rows = np.linalg.norm(u, axis=1, keepdims=True)
        x = u * np.linalg.norm(u) / np.sqrt(out) / np.maximum(rows, 1e-6)
        x = x / (1.01 * np.linalg.norm(x) + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
        x *= np.sqrt(min(out, fan_in)) / np.linalg.norm(x)
        norm = np.linalg.norm(x)
        self.v = 0.9 * self.v + 0.1 * np.mean(x**2, axis=1 if out >= fan_in else 0, keepdims=True)
        x = x / np.sqrt(np.maximum(self.v, 1e-10))
        x *= norm / np.linalg.norm(x)
        self.p -= size * (x + wd * self.p * (x * self.p >= 0))


@GENERATIONS
def test_three_steps_equal_the_plain_form(modern):
    params = draw()
    plain = {name: PlainMuon(p.T, modern) for name, p in params.items()}
    tx = muon(table(*LRS), table(*MOMENTA), table(*DECAYS), modern=modern)
    state, update = tx.init(params), jax.jit(tx.update)
    with jax.default_matmul_precision("highest"):
        for step in range(3):
            grads = draw(seed=step + 1)
            updates, state = update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            decay = DECAYS[step] if modern else 0.0
            for name, one in plain.items():
                one.step(grads[name].T, LRS[step], MOMENTA[step], decay)
                np.testing.assert_allclose(params[name], one.p.T, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "polynomials, low, high", [(NEWTON_SCHULZ, 0.6, 1.25), (POLAR_EXPRESS, 0.75, 1.15)]
)
def test_singular_values_end_up_near_one(polynomials, low, high):
    """From anywhere between 1 and a hundredth of the largest."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((16, 16)))[0] for _ in range(2))
    x = (left * np.geomspace(0.7, 0.007, 16)) @ right
    y = np.asarray(orthogonalise(jnp.asarray(x[:, :12], jnp.float32), polynomials))
    values = np.linalg.svd(y, compute_uv=False)
    assert low < values.min() < values.max() < high
    # The directions stay: u' y v is diagonal in the singular vectors of x.
    u, _, vt = np.linalg.svd(x[:, :12], full_matrices=False)
    inner = u.T @ y @ vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-3)


@GENERATIONS
def test_the_size_of_a_gradient_does_not_matter(modern):
    """But for its floors, which keep a vanished gradient from blowing up."""
    grads, params = draw(), draw(1)
    louder = {name: 1_000 * g for name, g in grads.items()}
    a, b = (first_update(g, params, modern) for g in (grads, louder))
    for name in SHAPES:
        np.testing.assert_allclose(a[name], b[name], atol=2e-4)
    silent = first_update({name: 0 * g for name, g in grads.items()}, params, modern)
    assert all(not np.any(update) for update in silent.values())


@GENERATIONS
def test_stacked_equals_one_by_one(modern):
    shapes = {"a": (12, 8), "b": (8, 12), "c": (12, 8), "d": (12, 8)}
    grads, params = draw(0, shapes), draw(1, shapes)
    together = first_update(grads, params, modern, decay=0.2)
    for name in shapes:
        alone = first_update({"a": grads[name]}, {"a": params[name]}, modern, decay=0.2)["a"]
        np.testing.assert_allclose(together[name], alone, atol=5e-6)


def test_decay_only_where_it_agrees_with_the_step():
    grads, params, decay = draw(), draw(1), 0.2
    bare = first_update(grads, params, modern=True)
    decayed = first_update(grads, params, modern=True, decay=decay)
    for name, p in params.items():
        size = max(1, p.shape[1] / p.shape[0]) ** 0.5
        towards_zero = np.asarray(bare[name]) * p <= 0
        assert 0.2 < towards_zero.mean() < 0.8
        expected = np.where(towards_zero, -size * decay * p, 0)
        np.testing.assert_allclose(decayed[name] - bare[name], expected, atol=1e-6)


@GENERATIONS
def test_bfloat16_keeps_the_direction(modern):
    """8 bits blur the smallest singular values; the update as a whole points where it should."""
    grads, params = draw(), draw(1)
    exact, rounded = (first_update(grads, params, modern, dtype=d) for d in ("float32", "bfloat16"))
    for name, update in exact.items():
        a, b = np.ravel(update), np.ravel(rounded[name])
        assert b.dtype == np.float32 and np.any(a != b)
        assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b), name
