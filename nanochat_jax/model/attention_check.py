"""Which attention a run computes with: the fastest backend that gets a small problem right.

A model trained with a wrong mask looks fine until it is used. So each candidate computes outputs
and gradients of a small problem with the model's own heads, dtype and windows, and is compared with
the definition in float32.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError
from nanochat_jax.model.attention import BACKENDS, attention, attention_naive, candidates
from nanochat_jax.model.gpt import GPTConfig

# Tokens of the problem: two blocks of queries on a CPU, several tiles of a GPU's kernels.
LENGTH = {"cpu": 128, "gpu": 512}
# Of the largest value of an array, about five roundings (float32: with room for the order of the
# terms). A key too many or too few makes a difference of more than a tenth.
TOLERANCE = {"bfloat16": 2e-2, "float16": 2.5e-3, "float32": 1e-4}


def check_attention(
    model: GPTConfig, backend: str, forms: dict[str, Callable] | None = None
) -> tuple[GPTConfig, str]:
    """(the model with the backend it will use, the same in all processes; a line that says why);
    UserError when none passes. forms: other functions of q, k, v and window to be tried instead."""
    if backend not in BACKENDS:
        expected = ", ".join(BACKENDS)
        raise UserError(f"config.model.attention got {backend!r}, expected one of {expected}")
    names = candidates() if backend == "auto" else (backend,)
    forms = forms or {name: partial(attention, backend=name) for name in names}
    tolerance, failed = _tolerance(model.compute_dtype), []
    for name, form in forms.items():
        difference, why = _everywhere(*_difference(model, form))
        if difference <= tolerance:
            off = (
                f"largest difference from the definition {difference:.1e} ({tolerance:.1e} allowed)"
            )
            line = "; not ".join([f"attention: {name}, {off}", *failed])
            return replace(model, attention_backend=name), line
        failed.append(f"{name}: {why or f'difference {difference:.1e}'}")
    cure = "look at the driver and jax" if backend == "auto" else "take auto, it chooses another"
    raise UserError(
        f"config.model.attention={backend} failed its self-test ({'; '.join(failed)}), expected "
        f"differences up to {tolerance:.1e}; {cure}"
    )


def _tolerance(dtype: str) -> float:
    if dtype not in TOLERANCE:
        expected = ", ".join(TOLERANCE)
        raise UserError(f"config.model.compute_dtype got {dtype!r}, expected one of {expected}")
    if jax.default_backend() != "cpu":  # a GPU rounds the factors of float32 products as float16
        return max(TOLERANCE[dtype], TOLERANCE["float16"])
    return TOLERANCE[dtype]


def _difference(model: GPTConfig, form: Callable) -> tuple[float, str]:
    """The largest difference relative to its array's largest value; infinite, and why, if none."""
    length = LENGTH.get(jax.default_backend(), 512)
    seen = [model.sees(layer) or model.seq_len for layer in range(model.num_layers)]
    is_windowed = min(seen) < model.seq_len
    windows = (None, min(*seen, length * 2 // 5)) if is_windowed else (None,)  # ends within a tile
    draw, N, K = np.random.default_rng(0).standard_normal, model.num_heads, model.num_kv_heads
    shapes = [(1, length, n, model.head_dim) for n in (N, K, K, N)]  # q, k, v, gradient of y
    arrays = [jnp.asarray(draw(shape), model.compute_dtype) for shape in shapes]
    try:
        with jax.numpy_dtype_promotion("standard"):  # gradients of jax's own code count on it
            ours = _values(form, windows, *arrays)
        ours = [np.asarray(a, np.float32) for a in ours]
    except (RuntimeError, ValueError) as error:  # cuDNN, XLA and jax.nn say no in many ways
        return math.inf, str(error).partition("\n")[0]
    with jax.default_matmul_precision("highest"):
        wide = [a.astype(jnp.float32) for a in arrays]
        exact = [np.asarray(a) for a in _values(attention_naive, windows, *wide)]
    pairs = zip(ours, exact, strict=True)
    worst = float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))
    return (worst, "") if worst < math.inf else (math.inf, "it is not finite")


@partial(jax.jit, static_argnums=(0, 1))
def _values(form: Callable, windows: tuple, q, k, v, dy) -> list[jax.Array]:
    """The output of `form` and its gradients by q, k and v, for each window."""
    values = []
    for window in windows:
        y, pull = jax.vjp(lambda *qkv, w=window: form(*qkv, w), q, k, v)
        values += [y, *pull(dy)]
    return values


def _everywhere(difference: float, why: str) -> tuple[float, str]:
    """The worst of all processes: where one cannot, none may."""
    if jax.process_count() == 1:
        return difference, why
    found = np.ravel(multihost_utils.process_allgather(np.float32(difference)))
    worst = int(np.argmax(found))
    return float(found[worst]), why or f"difference {found[worst]:.1e} in process {worst}"
