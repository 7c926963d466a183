"""Small models."""

import jax
import pytest

from nanochat_jax.model.gpt import GPTConfig


class ShortWindows(GPTConfig):
    """Windows far below the 128 that recipes start from, so that short texts go round the rings."""

    @property
    def windows(self) -> tuple[int, ...]:
        return (5, 11, 24)[: self.num_layers]


CLASSIC = GPTConfig(60, 2, 32, 4, 2, 16)
VARIANT = dict(rope_base=100_000.0, window_pattern="SL", qk_scale=1.2, extras=True)
MODERN = ShortWindows(60, 3, 32, 4, 2, 24, **VARIANT)


@pytest.fixture
def classic() -> GPTConfig:
    return CLASSIC


@pytest.fixture
def modern() -> GPTConfig:
    return MODERN


@pytest.fixture(params=[CLASSIC, MODERN], ids=["classic", "modern"])
def config(request) -> GPTConfig:
    return request.param


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
