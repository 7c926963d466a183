"""What the benchmark scripts share: fair timing, the shapes measured, the record of a measurement.

Times are compared only within one run: the candidates take turns, another one first each round, so
that a machine that slows down slows all of them. Every call is compiled and warmed up beforehand
and waited for. Data is random: on zeros a GPU draws less power and runs faster than it ever trains.

Needs JAX, flax and optax alone: neither the data pipeline nor recipes are imported, so a machine
that is borrowed for an hour can measure with what it has.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax import hardware
from nanochat_jax.common import UserError
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer

MIN_TIMED_SECS = 0.02  # of one timing: shorter calls are repeated until the clock can resolve them


@dataclass(frozen=True)
class Shape:
    """A model and a batch, as one of the recipes trains them; a test compares the two."""

    model: GPTConfig
    rows: int  # a device works on at once
    tile_tokens: int  # of the loss
    optim: str = "classic"

    @property
    def tokens(self) -> int:
        return self.rows * self.model.seq_len


_MODERN = dict(
    rope_base=100_000.0,
    window_pattern="SSSL",
    qk_scale=1.2,
    extras=True,
    embed_init_std=0.8,
    fc_init_scale=0.4,
)


def _model(vocab_size: int, depth: int, dim: int, heads: int, seq_len: int, **kw) -> GPTConfig:
    return GPTConfig(vocab_size, depth, dim, heads, heads, seq_len, **kw)


_GPU = dict(compute_dtype="bfloat16")
SHAPES = {
    "d20": Shape(_model(65_536, 20, 1_280, 10, 2_048, **_GPU), 32, 8_192),
    "d24": Shape(_model(32_768, 24, 1_536, 12, 2_048, **_GPU, **_MODERN), 16, 8_192, "modern"),
    "d4": Shape(_model(4_096, 4, 256, 2, 256), 16, 512),
    "demo": Shape(_model(4_096, 4, 192, 3, 256, **_MODERN), 32, 512, "modern"),
    "tiny": Shape(_model(512, 2, 32, 2, 64), 8, 512),
}


def get_shape(name: str, *, rows: int = 0, dtype: str = "") -> Shape:
    """A shape by name, with another number of rows or compute dtype if given."""
    if name not in SHAPES:
        raise UserError(f"shape got {name!r}, expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    model = replace(shape.model, compute_dtype=dtype) if dtype else shape.model
    return replace(shape, rows=rows or shape.rows, model=model)


def default_shapes() -> list[str]:
    return ["d20"] if jax.default_backend() == "gpu" else ["d4", "demo"]


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def optimizer(shape: Shape, paths=None) -> optax.GradientTransformation:
    """The shape's optimizer with constant schedules, for all parameters or those at `paths`."""
    learning_rates = OptimConfig(
        recipe=shape.optim,
        embed_lr=0.3,
        unembed_lr=0.004,
        matrix_lr=0.02,
        scalar_lr=0.5,
        smear_lr=0.2,
        ns_dtype=shape.model.compute_dtype,
    )
    return build_optimizer(
        param_shapes(shape.model) if paths is None else paths,
        shape.model.model_dim,
        learning_rates,
        lr_multiplier=lambda step: jnp.float32(1.0),
        momentum=lambda step: jnp.float32(0.95),
        weight_decay=lambda step: jnp.float32(0.1 if shape.optim == "modern" else 0.0),
    )


def random_batch(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """inputs and targets, int32 [rows, seq_len]: every token trained."""
    size = (shape.rows, shape.model.seq_len + 1)
    ids = np.random.default_rng(seed).integers(0, shape.model.vocab_size, size, np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


class Timing(NamedTuple):
    secs: float  # median of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], *, budget_secs: float, min_rounds: int = 5
) -> dict[str, Timing]:
    """Seconds of one call of each, measured in turn over about `budget_secs` in all.

    A candidate returns what has to be waited for. With budget 0 each is timed `min_rounds` times.
    """
    repeats = {}
    for name, call in candidates.items():
        jax.block_until_ready(call())  # compiles, touches its memory
        secs = _time(call, 1)
        repeats[name] = max(1, round(MIN_TIMED_SECS / secs)) if budget_secs else 1
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, rounds, began = list(candidates), 0, time.perf_counter()
    while rounds < min_rounds or time.perf_counter() - began < budget_secs:
        for name in order:
            samples[name].append(_time(candidates[name], repeats[name]) / repeats[name])
        order, rounds = order[1:] + order[:1], rounds + 1
    return {name: _summary(secs) for name, secs in samples.items()}


def _time(call: Callable[[], Any], repeats: int) -> float:
    result, began = None, time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - began


def _summary(secs: list[float]) -> Timing:
    low, median, high = statistics.quantiles(secs, n=4)
    return Timing(median, (high - low) / 2 / median)


def matmul_flops(size: int, dtype: str, budget_secs: float = 1.0) -> float:
    """FLOP/s of a square matrix product of random numbers: what this device can really reach."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
    multiply = jax.jit(jnp.matmul)
    timing = time_interleaved({"matmul": lambda: multiply(a, b)}, budget_secs=budget_secs)
    return 2 * size**3 / timing["matmul"].secs


def machine() -> dict[str, Any]:
    """What a number is worth nothing without."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": hardware.cpu_model() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu_cores": hardware.cpu_cores(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
    }


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def print_json(result: dict[str, Any]) -> None:
    """The last line of every benchmark: one JSON object with all its numbers."""
    print(json.dumps(result | machine()), flush=True)
