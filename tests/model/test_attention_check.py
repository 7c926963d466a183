"""The self-test takes the first backend that is right, and says why a faster one is not."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError
from nanochat_jax.model.attention import BACKENDS, attention, attention_naive
from nanochat_jax.model.attention_check import TOLERANCE, check_attention
from nanochat_jax.model.gpt import GPTConfig

SHAPE = dict(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, seq_len=512)
PLAIN, WINDOWED = GPTConfig(**SHAPE), GPTConfig(**SHAPE, window_pattern="S")


def raises(q, k, v, window):
    raise RuntimeError("cuDNN is not detected.\nThe rest of a long story")


def one_key_too_many(q, k, v, window):
    return attention_naive(q, k, v, None if window is None else window + 1)


def sees_the_future(q, k, v, window):
    """What a left window without is_causal does."""
    with jax.numpy_dtype_promotion("standard"):
        side = q.shape[1] if window is None else window
        return jax.nn.dot_product_attention(q, k, v, local_window_size=(side, side))


def swapped_heads(q, k, v, window):
    return attention_naive(q, k[:, :, ::-1], v[:, :, ::-1], window)


def no_gradient(q, k, v, window):
    return attention_naive(jax.lax.stop_gradient(q), k, v, window)


@jax.custom_jvp
def poisoned(x):
    return x


@poisoned.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] * jnp.nan


def nan_in_a_gradient(q, k, v, window):
    return attention_naive(q, k, poisoned(v), window)


def wide(function):
    """Computed in float32 and rounded once, whatever comes in: only what is wrong differs."""

    def form(q, k, v, window):
        return function(*(a.astype(jnp.float32) for a in (q, k, v)), window).astype(q.dtype)

    return form


def tried(model: GPTConfig, function) -> tuple[str, str]:
    """(backend taken, line) where the function stands for cudnn, the fastest, and xla follows."""
    forms = {"cudnn": function, "xla": partial(attention, backend="xla")}
    checked, line = check_attention(model, "auto", forms)
    return checked.attention_backend, line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "function", [one_key_too_many, sees_the_future, swapped_heads, no_gradient, nan_in_a_gradient]
)
def test_a_wrong_backend_is_passed_over_aloud(function, dtype):
    model = GPTConfig(**SHAPE, window_pattern="S", compute_dtype=dtype)
    backend, line = tried(model, wide(function))
    assert backend == "xla"
    numbers = re.search(
        r"definition (\S+) .*not cudnn: (?:difference (\S+)|it is not finite)", line
    )
    taken, passed_over = float(numbers[1]), float(numbers[2] or "inf")
    assert taken < TOLERANCE[dtype] / 2 and passed_over > 5 * TOLERANCE[dtype]


def test_a_backend_that_does_not_run_is_passed_over_aloud():
    backend, line = tried(PLAIN, raises)
    assert backend == "xla" and line.endswith("cuDNN is not detected.")
    with pytest.raises(UserError, match="config.model.attention=auto"):  # none is left
        check_attention(PLAIN, "auto", {"cudnn": raises})


def test_a_window_of_the_model_is_tried_and_no_other():
    """Wrong with windows only: harmless to a model that has none."""
    assert tried(PLAIN, one_key_too_many)[0] == "cudnn"
    assert tried(WINDOWED, one_key_too_many)[0] == "xla"


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"cudnn"}))
def test_on_this_machine_the_fast_form_passes(backend):
    taken = check_attention(WINDOWED, backend)[0].attention_backend
    assert taken == ("blocked" if backend == "auto" else backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "named"),
    [
        ("cudnn", "float32", "config.model.attention=cudnn failed"),
        ("flash", "float32", "config.model.attention got 'flash'"),
        ("auto", "bf16", "config.model.compute_dtype got 'bf16'"),
    ],
)
def test_a_backend_asked_for_by_name_must_pass(backend, dtype, named):
    with pytest.raises(UserError, match=named):
        check_attention(GPTConfig(**SHAPE, compute_dtype=dtype), backend)


def test_one_process_that_cannot_decides_for_all(monkeypatch):
    gathered = []

    def gather(own):
        gathered.append(float(own))
        return np.array([own, np.inf if len(gathered) == 1 else 1e-7], np.float32)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    model, line = check_attention(PLAIN, "auto")
    assert model.attention_backend == "xla" and len(gathered) == 2 and max(gathered) < 1e-5
    assert line.endswith("; not blocked: difference inf in process 1")
