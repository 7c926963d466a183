"""The self-test takes the first backend that is right, and says why a faster one is not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.model import attention_check
from nanochat_jax.model.attention import BACKENDS, attention, attention_naive
from nanochat_jax.model.attention_check import check_attention
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
    return lambda q, *kv: function(*(a.astype(jnp.float32) for a in (q, *kv[:2])), kv[2]).astype(
        q.dtype
    )


@pytest.fixture
def broken(monkeypatch):
    """Make cudnn, the fastest of three, the given function; the others are themselves."""

    def use(function):
        def patched(q, k, v, window, backend):
            if backend == "cudnn":
                return function(q, k, v, window)
            return attention(q, k, v, window, backend)

        monkeypatch.setattr(attention_check, "attention", patched)
        monkeypatch.setattr(attention_check, "candidates", lambda: ("cudnn", "xla", "blocked"))

    return use


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "function", [one_key_too_many, sees_the_future, swapped_heads, no_gradient, nan_in_a_gradient]
)
def test_a_wrong_backend_is_passed_over_aloud(broken, capsys, function, dtype):
    broken(wide(function))
    model = GPTConfig(**SHAPE, window_pattern="S", compute_dtype=dtype)
    assert check_attention(model, "auto").attention_backend == "xla"
    (line,) = capsys.readouterr().out.splitlines()
    if function is nan_in_a_gradient:
        assert line.endswith("; not cudnn: it is not finite")
    else:
        numbers = re.search(r"definition (\S+) .*; not cudnn: difference (\S+)$", line)
        taken, passed_over = map(float, numbers.groups())
        allowed = attention_check.TOLERANCE[dtype]
        assert taken < allowed / 2 and passed_over > 5 * allowed


def test_a_backend_that_does_not_run_is_passed_over_aloud(broken, capsys):
    broken(raises)
    assert check_attention(PLAIN, "auto").attention_backend == "xla"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("attention: xla, largest difference from the definition ")
    assert line.endswith("; not cudnn: cuDNN is not detected.")


def test_a_window_of_the_model_is_tried_and_no_other(broken, capsys):
    """Wrong with windows only: harmless to a model that has none."""
    broken(one_key_too_many)
    assert check_attention(PLAIN, "auto").attention_backend == "cudnn"
    assert check_attention(WINDOWED, "auto").attention_backend == "xla"


def test_on_this_machine_the_fast_form_passes(capsys):
    assert check_attention(WINDOWED, "auto").attention_backend == "blocked"
    assert capsys.readouterr().out.count("\n") == 1
    for backend in set(BACKENDS) - {"auto", "cudnn"}:
        assert check_attention(WINDOWED, backend).attention_backend == backend


def test_a_backend_asked_for_by_name_must_pass(broken):
    with pytest.raises(UserError, match=r"=cudnn failed its self-test \(cudnn: .*needs an NVIDIA"):
        check_attention(PLAIN, "cudnn")
    with pytest.raises(UserError, match="config.model.attention got 'flash', expected one of auto"):
        check_attention(PLAIN, "flash")
    with pytest.raises(UserError, match="compute_dtype got 'bf16', expected one of bfloat16"):
        check_attention(GPTConfig(**SHAPE, compute_dtype="bf16"), "auto")
    broken(sees_the_future)
    with pytest.raises(UserError, match=r"failed its self-test \(cudnn: difference .*take auto"):
        check_attention(PLAIN, "cudnn")


def test_no_backend_at_all_is_an_error(broken, monkeypatch):
    broken(raises)
    monkeypatch.setattr(attention_check, "candidates", lambda: ("cudnn",))
    with pytest.raises(UserError, match="auto failed its self-test .*look at the driver"):
        check_attention(PLAIN, "auto")


def test_one_process_that_cannot_decides_for_all(monkeypatch, capsys):
    gathered = []

    def gather(own):
        gathered.append(float(own))
        return np.array([own, np.inf if len(gathered) == 1 else 1e-7], np.float32)

    monkeypatch.setattr(attention_check.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert check_attention(PLAIN, "auto").attention_backend == "xla"
    assert len(gathered) == 2 and max(gathered) < 1e-5
    assert capsys.readouterr().out.endswith("; not blocked: difference inf in process 1\n")
