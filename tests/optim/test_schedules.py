"""Schedules at their boundaries, by hand; and inside a traced program."""

from functools import partial

import jax
import numpy as np
import pytest

from nanochat_jax.optim.schedules import cosine_to_zero, lr_multiplier, muon_momentum

LR = partial(lr_multiplier, num_steps=100, warmup_steps=4, warmdown_frac=0.5, final_frac=0.1)
SHAPE = {"start": 0.85, "peak": 0.97, "end": 0.90}
MOMENTUM = partial(muon_momentum, num_steps=100, warmdown_frac=0.25, warmup_steps=40, **SHAPE)
COSINE = partial(cosine_to_zero, num_steps=100)


@pytest.mark.parametrize(
    "schedule, values",
    [
        (LR, {0: 0.25, 2: 0.75, 3: 1.0, 4: 1.0, 50: 1.0, 51: 0.982, 75: 0.55, 99: 0.118, 100: 0.1}),
        (MOMENTUM, {0: 0.85, 10: 0.88, 39: 0.967, 40: 0.97, 75: 0.97, 85: 0.942, 100: 0.90}),
        (COSINE, {0: 1.0, 50: 0.5, 25: 0.5 + 0.5**1.5, 100: 0.0}),
    ],
    ids=["lr", "momentum", "cosine"],
)
def test_values_by_hand_as_numbers_and_traced(schedule, values):
    traced = jax.jit(schedule)
    for step, expected in values.items():
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-12), step
        assert float(traced(step)) == pytest.approx(expected, abs=1e-6), step


def test_without_warmup_and_warmdown_nothing_moves():
    flat = partial(lr_multiplier, num_steps=7, warmup_steps=0, warmdown_frac=0.0, final_frac=0.0)
    assert [float(flat(step)) for step in range(7)] == [1.0] * 7
    steady = partial(MOMENTUM, num_steps=7, warmup_steps=0, end=SHAPE["peak"])
    np.testing.assert_allclose([steady(step) for step in range(8)], SHAPE["peak"])


def test_a_warmup_that_outlasts_the_run_wins_over_the_warmdown():
    """A run shorter than the warmup: it rises to the end, as upstream's does."""
    momentum = partial(MOMENTUM, num_steps=20)
    np.testing.assert_allclose(momentum(19), 0.85 + 0.12 * 19 / 40, atol=1e-12)
    lr = partial(LR, num_steps=8, warmup_steps=8)
    np.testing.assert_allclose([lr(step) for step in range(8)], np.arange(1, 9) / 8)
