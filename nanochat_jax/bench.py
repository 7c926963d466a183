"""What the benchmark scripts share: fair timing, the shapes measured, the record of a measurement.

Times are compared only within one run: the candidates take turns, another one first each round, so
that a machine that slows down slows all of them. Every call is compiled and warmed up beforehand
and waited for. Data is random: on zeros a GPU draws less power and runs faster than it ever trains.

Needs JAX, flax and optax alone: neither the data pipeline nor recipes are imported, so a machine
that is borrowed for an hour can measure with what it has.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax import hardware
from nanochat_jax.bench_beside import Program
from nanochat_jax.common import UserError
from nanochat_jax.launch.runtime import available_bytes, compile_lowered, compiled_bytes
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer

MIN_TIMED_SECS = 0.02  # of one timing: shorter calls are repeated until the clock can resolve them


@dataclass(frozen=True)
class Shape:
    """A model and a batch, as one of the recipes trains them; a test compares the two."""

    model: GPTConfig
    rows: int  # a device works on at once: a microbatch
    optim: str = "classic"
    tile_tokens: int = 512  # of the loss
    accumulate: int = 1  # microbatches of an optimizer step

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.rows * self.model.seq_len

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.accumulate

    @property
    def grad_clip(self) -> float:
        return 1.0 if self.optim == "classic" else 0.0


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


_GPT2 = _model(32_768, 24, 1_536, 12, 2_048, **_MODERN)
SHAPES = {  # the large ones with upstream's 524,288 tokens a step
    "d20": Shape(_model(65_536, 20, 1_280, 10, 2_048), rows=32, accumulate=8),
    "gpt2": Shape(_GPT2, rows=16, optim="modern", accumulate=16),
    "d4": Shape(_model(4_096, 4, 256, 2, 256), rows=16),
    "demo": Shape(_model(4_096, 4, 192, 3, 256, **_MODERN), rows=32, optim="modern"),
    "tiny": Shape(_model(512, 2, 32, 2, 64), rows=8),
}


def get_shape(name: str) -> Shape:
    """A shape by name, in the dtype that this machine trains in; on a CPU a microbatch a step."""
    if name not in SHAPES:
        raise UserError(f"shape got {name!r}, expected one of {', '.join(SHAPES)}")
    shape, gpu = SHAPES[name], jax.default_backend() == "gpu"
    model = replace(shape.model, compute_dtype="bfloat16" if gpu else "float32")
    accumulate = shape.accumulate if gpu else 1
    return replace(shape, model=model, tile_tokens=8_192 if gpu else 512, accumulate=accumulate)


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


def random_batch(seed: int, rows: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """inputs and targets, int32 [rows, seq_len]: every token trained."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len + 1), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def random_arrays(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal numbers of these shapes, other ones for each."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(keys, shapes, strict=True)
    ]


def compile_together(lowered: dict[str, Any]) -> dict[str, Any]:
    """Compile lowered functions, each on a thread of its own: most of a GPU benchmark's time."""
    with ThreadPoolExecutor(max_workers=max(1, len(lowered))) as pool:
        return dict(zip(lowered, pool.map(compile_lowered, lowered.values()), strict=True))


def compile_all(
    functions: dict[str, Callable], *arguments: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """(calls, bytes) of functions of the same arguments; those that do not fit get no call."""
    lowered = {name: jax.jit(function).lower(*arguments) for name, function in functions.items()}
    calls, needed = {}, {}
    for name, compiled in compile_together(lowered).items():
        needed[name] = compiled_bytes(compiled)
        if needed[name] < available_bytes(one_device()):
            calls[name] = partial(compiled, *arguments)
    return calls, needed


class Timing(NamedTuple):
    secs: float  # median of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median
    best: float  # the fastest: least disturbed by whatever else the machine does


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any] | Program],
    *,
    budget_secs: float,
    min_rounds: int = 5,
) -> dict[str, Timing]:
    """Seconds of one call of each, measured in turn over about `budget_secs` in all.

    A candidate returns what has to be waited for, or is a program that measures its own steps. With
    budget 0 each is timed `min_rounds` times.
    """
    repeats = {}
    for name, call in candidates.items():
        _time(call, 1)  # compiles, touches its memory
        secs = _time(call, 1)
        repeats[name] = max(1, round(MIN_TIMED_SECS / secs)) if budget_secs else 1
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, rounds, began = list(candidates), 0, time.perf_counter()
    while rounds < min_rounds or time.perf_counter() - began < budget_secs:
        for name in order:
            samples[name].append(_time(candidates[name], repeats[name]) / repeats[name])
        order, rounds = order[1:] + order[:1], rounds + 1
    return {name: _summary(secs) for name, secs in samples.items()}


def _time(call: Callable[[], Any] | Program, repeats: int) -> float:
    if isinstance(call, Program):
        return call.secs(repeats)
    result, began = None, time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - began


def _summary(secs: list[float]) -> Timing:
    low, median, high = statistics.quantiles(secs, n=4)
    return Timing(median, (high - low) / 2 / median, min(secs))


def parser(doc: str | None, secs: float) -> argparse.ArgumentParser:
    """What every benchmark of shapes takes on its command line."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=SHAPES, help="by default those that suit this machine")
    made.add_argument("--secs", type=float, default=secs, help="of measuring, for each shape")
    return made


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


def number(value: float | None, form: str = "{:,.1f}") -> str:
    return "n/a" if value is None else form.format(value)


def finish(result: dict[str, Any]) -> None:
    """The last line of every benchmark: one JSON object with all its numbers."""
    print(json.dumps(result | machine()), flush=True)
