"""What goes into small models, and what to ask of them."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig


@pytest.fixture
def tiny_ids() -> Callable[..., np.ndarray]:
    """(config, rows, seq_len) -> ids int32 [rows, seq_len]."""

    def draw(config: GPTConfig, rows: int, seq_len: int, seed: int = 1) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.integers(config.vocab_size, size=(rows, seq_len)).astype(np.int32)

    return draw


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
