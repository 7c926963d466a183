"""Small models with weights that are nowhere zero, so that every path through them counts."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, param_shapes


@pytest.fixture(scope="session")
def random_params() -> Callable[[GPTConfig], dict[str, np.ndarray]]:
    """config -> parameters of the right shapes, drawn without compiling anything."""

    def draw(config: GPTConfig) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        params = {}
        for path, leaf in param_shapes(config).items():
            value = rng.standard_normal(leaf.shape, np.float32)
            if path.endswith("kernel"):
                value *= leaf.shape[0] ** -0.5
            elif path.endswith("lambdas"):
                value = 1 + 0.1 * value
            elif path.endswith("lambda"):
                value = 0.3 + 0.1 * value
            params[path] = value.astype(np.float32)
        return params

    return draw


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
