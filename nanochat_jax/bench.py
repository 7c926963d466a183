"""What the benchmark scripts share: fair timing, random batches, and the record of a measurement.

Times are compared only within one run: the candidates take turns, a different one first each round,
so that a machine that slows down slows all of them. Every call is warmed up (compiled) beforehand
and waited for. Data is random: on zeros a GPU draws less power and runs faster than it ever trains.

Nothing here or below imports the data pipeline, the tokenizer or ml_collections: a machine that is
borrowed to measure on needs JAX, flax and optax alone.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from nanochat_jax import hardware

MIN_TIMED_SECS = 0.02  # of one timing: short calls are repeated until the clock can resolve them


class Timing(NamedTuple):
    secs: float  # median of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], *, budget_secs: float = 10.0, min_rounds: int = 5
) -> dict[str, Timing]:
    """Seconds of one call of each, measured in turn over about `budget_secs` in all.

    A candidate returns what has to be waited for. `budget_secs` 0 gives exactly `min_rounds` rounds.
    """
    calls = {}
    for name, call in candidates.items():
        jax.block_until_ready(call())  # compiles
        secs = _time(call, 1)
        calls[name] = max(1, round(MIN_TIMED_SECS / max(secs, 1e-6))) if budget_secs else 1
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    began = time.perf_counter()
    while len(samples[names[0]]) < min_rounds or time.perf_counter() - began < budget_secs:
        for name in names:
            samples[name].append(_time(candidates[name], calls[name]) / calls[name])
        names = names[1:] + names[:1]
    return {name: _summary(secs) for name, secs in samples.items()}


def _time(call: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - began


def _summary(secs: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(secs, n=4)
    return Timing(middle, (high - low) / 2 / middle)


def random_batch(key_seed: int, rows: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """inputs and targets, int32 [rows, seq_len]: every token trained."""
    ids = np.random.default_rng(key_seed).integers(0, vocab_size, (rows, seq_len + 1), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def machine() -> dict[str, Any]:
    """What a number is worth nothing without."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": device.device_kind if device.platform != "cpu" else hardware.cpu_model(),
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "cpu_cores": hardware.cpu_cores(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in names},
    }


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [tuple(str(cell) for cell in row) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def finish(result: dict[str, Any]) -> None:
    """The last line of every benchmark: one JSON object with all its numbers."""
    print(json.dumps(result | machine()), flush=True)
