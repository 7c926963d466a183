"""Small models, and their logits by full forward passes."""

from functools import partial

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, bind


class ShortWindows(GPTConfig):
    """Windows far below the 128 that recipes start from, so that short texts go round the rings."""

    @property
    def windows(self) -> tuple[int, ...]:
        return (5, 11, 24)[: self.num_layers]


CLASSIC = GPTConfig(60, 2, 32, 4, 2, 16)
VARIANT = dict(rope_base=100_000.0, window_pattern="SL", qk_scale=1.2, extras=True)
MODERN = ShortWindows(60, 3, 32, 4, 2, 24, **VARIANT)


@pytest.fixture(params=[CLASSIC, MODERN], ids=["classic", "modern"])
def config(request) -> GPTConfig:
    return request.param


@pytest.fixture
def classic() -> GPTConfig:
    return CLASSIC


@pytest.fixture
def modern() -> GPTConfig:
    return MODERN


@partial(jax.jit, static_argnums=0)
def _log_probs(config, params, ids):
    return jax.nn.log_softmax(bind(config, params)(ids), axis=-1)


@pytest.fixture(scope="session")
def full_forward():
    """(config, params, texts of at most 128 ids) -> log probabilities [B, 128, V]."""

    def run(config, params, texts) -> np.ndarray:
        ids = np.zeros((len(texts), 128), np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        return np.asarray(_log_probs(config, params, ids))

    return run


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
