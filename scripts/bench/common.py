"""What all benchmarks share: the recipes' shapes, the training step, fair timing, results.

Candidates are timed in one run, in turn, another one first in each round, warmed up and waited for.
Data is random: on zeros a GPU draws less power and runs faster. Nothing that reads data is needed,
so that a borrowed machine can be measured. A result is a dict, with keys of COLUMNS.
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import hardware
from nanochat_jax.common import UserError, aligned, log
from nanochat_jax.model.gpt import GPTConfig, init_params, param_shapes
from nanochat_jax.model.loss import cross_entropy_sum
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.train import memory
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch

MIN_TIMED_SECS = 0.02  # of one timing: shorter calls are repeated until the clock can resolve them
STEP_TOKENS = 2**19  # of a step on a GPU, at most: upstream's batch, for all recipes alike
SHAPES = ("d4", "d20", "gpt2", "demo", "tiny")
D4 = {  # how d4 differs from the recipe d20; the other shapes are recipes
    "tokenizer": {"vocab_size": 4_096},
    "model": {"depth": 4, "seq_len": 256},
    "base": {"device_batch_size": 16, "total_batch_tokens": 4_096},
}
COLUMNS = {  # of a result: how the table shows it
    "what": "{}",
    "ms": "{:,.2f}",  # median of one call
    "spread": "{:.1%}",  # half the distance between the quartiles, of the median
    "best_ms": "{:,.2f}",  # the fastest: least disturbed by whatever else the machine does
    "times_first": "{:.2f}",  # ms over that of the first candidate
    "value": "{:,.3f}",  # from 1,000 on without decimals
    "unit": "{}",
    "of_peak": "{:.1%}",  # of the rate on the device's data sheet; of a training step that is MFU
    "of_target": "{:.0%}",
    "mib": "{:,.0f}",  # of memory, by the compiler's analysis
    "note": "{}",
}


@dataclass(frozen=True)
class Shape:
    """A model, its optimizer and a batch, as a recipe trains them on this machine."""

    name: str
    model: GPTConfig
    optim: OptimConfig
    weight_decay: float
    grad_clip: float
    tile_tokens: int  # of the loss
    rows: int  # a device works on at once: a microbatch
    accumulate: int  # microbatches of a step

    @property
    def step_tokens(self) -> int:
        return self.rows * self.accumulate * self.model.seq_len


def load_shape(name: str, platform: str = "") -> Shape:
    """A shape for "cpu" or "gpu", by default what is here; on a CPU a step is one microbatch."""
    try:
        import ml_collections  # noqa: F401
    except ImportError:
        sys.modules["ml_collections"] = _stand_in()
    from nanochat_jax import config as cfg
    from nanochat_jax import recipe

    platform = platform or jax.default_backend()
    config = cfg.load(cfg.CONFIGS / f"{'d20' if name == 'd4' else name}.py")
    for section, keys in (D4 if name == "d4" else {}).items():
        config[section].update(keys)
    recipe.resolve(config, platform=platform, num_devices=1)
    rows, tokens = config.base.device_batch_size, min(config.base.total_batch_tokens, STEP_TOKENS)
    return Shape(
        name=name,
        model=recipe.gpt_config(config),
        optim=recipe.optim_config(config, platform),
        weight_decay=recipe.weight_decay(config),
        grad_clip=config.optim.grad_clip,
        tile_tokens=config.model.loss_tile_tokens,
        rows=rows,
        accumulate=tokens // (rows * config.model.seq_len) if platform == "gpu" else 1,
    )


def _stand_in() -> types.ModuleType:
    """What recipes need of ml_collections, for machines without it; keys and types go unchecked."""

    class ConfigDict(dict):
        __setattr__, to_dict, lock = dict.__setitem__, copy.copy, lambda self: self

        def __getattr__(self, key):
            return self[key] if key in self else object.__getattribute__(self, key)

    module: Any = types.ModuleType("ml_collections")
    module.ConfigDict = ConfigDict
    module.config_dict = types.SimpleNamespace(placeholder=lambda kind: None)
    return module


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def free_bytes() -> float:
    return memory.available_bytes(one_device())


def optimizer(shape: Shape):
    """The shape's, with constant schedules."""
    return build_optimizer(
        param_shapes(shape.model),
        shape.model.model_dim,
        shape.optim,
        lr_multiplier=lambda step: jnp.float32(1.0),
        momentum=lambda step: jnp.float32(0.95),
        weight_decay=lambda step: jnp.float32(shape.weight_decay),
    )


class Training:
    """The training step of a shape, compiled, which takes no memory; after `start` a call takes a
    step on one random batch, always the same."""

    def __init__(self, shape: Shape, mesh=None, loss_sum: Callable = cross_entropy_sum):
        self.shape, self.mesh, self.tx = shape, mesh or one_device(), optimizer(shape)
        self.owners = Owners(shape.model, self.mesh)
        self.state: Any = abstract_state(self.owners, self.tx)
        step: Any = make_train_step(
            self.owners,
            self.tx,
            device_batch_size=shape.rows,
            tile_tokens=shape.tile_tokens,
            remat=shape.model.remat,
            grad_clip=shape.grad_clip,
            loss_sum=loss_sum,
        )
        rows = shape.rows * shape.accumulate * self.mesh.size
        ids = jax.ShapeDtypeStruct((rows, shape.model.seq_len), jnp.int32)
        with jax.set_mesh(self.mesh):
            lowered = step.lower(self.state, {"inputs": ids, "targets": ids})
        self.step = memory.compile_lowered(lowered)
        self.bytes = memory.compiled_bytes(self.step)

    def start(self) -> "Training":
        c, rows = self.shape.model, self.shape.rows * self.shape.accumulate
        self.state = create_state(self.owners, self.tx, seed=0)
        self.batch = put_batch(random_batch(0, rows, c.seq_len, c.vocab_size), self.mesh)
        self.first_loss = float(self())
        return self

    def stop(self) -> None:
        self.state = self.batch = None  # frees the device's memory

    def __call__(self):
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, self.batch)  # consumes the state
        self.loss = metrics["loss"]
        return self.loss


def compile_fitting(shape: Shape, free: float) -> Training:
    """The compiled step of a shape; if it needs too much memory, in smaller microbatches."""
    training = Training(shape)
    while training.bytes > free:
        needed = memory.format_bytes(training.bytes)
        what = f"{shape.name}: {shape.rows} rows at once need {needed}, more than there is"
        if shape.rows % 2:
            raise UserError(f"{what}; set --remat=full")
        log(f"{what}: halved")
        shape = replace(shape, rows=shape.rows // 2, accumulate=shape.accumulate * 2)
        training = Training(shape)
    return training


def random_batch(seed: int, rows: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """inputs and targets, int32 [rows, seq_len]: every token trained."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len + 1), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def random_arrays(dtype, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal numbers of these shapes, other ones for each."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, jnp.dtype(dtype)) for k, s in zip(keys, shapes, strict=True)]


def turns(calls: dict[str, Callable], secs: float, *, min_rounds: int = 5) -> dict[str, dict]:
    """The times of each call, in turn over about `secs` in all; with 0 once in each of min_rounds.

    A call returns what has to be waited for, if anything.
    """
    repeats = {}
    for name, call in calls.items():
        _time(call, 1)  # compiles, touches its memory
        repeats[name] = max(1, round(MIN_TIMED_SECS / _time(call, 1))) if secs else 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, rounds, stop = list(calls), 0, time.perf_counter() + secs
    while rounds < min_rounds or time.perf_counter() < stop:
        for name in order:
            samples[name].append(_time(calls[name], repeats[name]))
        order, rounds = order[1:] + order[:1], rounds + 1
    found, first = {}, 0.0
    for name, times in samples.items():
        low, ms, high = statistics.quantiles(times, n=4)
        first = first or ms
        spread = (high - low) / 2 / ms
        found[name] = dict(ms=ms, spread=spread, best_ms=min(times), times_first=ms / first)
    return found


def _time(call: Callable, repeats: int) -> float:
    """Milliseconds of one call."""
    result, began = None, time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - began) / repeats


def random_params(config: GPTConfig) -> dict[str, jax.Array]:
    """No value is zero, as many are where training starts."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    noise = random_arrays("float32", *(value.shape for value in params.values()))
    return {path: params[path] + 0.05 * n for path, n in zip(params, noise, strict=True)}


class Form(NamedTuple):
    """A function to measure; work: FLOPs or bytes, limit: what bounds it, as in `reached`."""

    function: Callable
    args: tuple | list
    work: float | None = None
    limit: str = "bf16"


def measure(forms: dict[str, Form], secs: float) -> list[dict]:
    """Run all in turn; of what does not fit into memory only the bytes."""
    rows, calls = {}, {}
    for name, form in forms.items():
        program = memory.compile_lowered(jax.jit(form.function).lower(*form.args))
        needed = memory.compiled_bytes(program)
        rows[name] = {"what": name, "mib": needed / 2**20}
        if needed < free_bytes():
            calls[name] = functools.partial(program, *form.args)
    for name, times in turns(calls, secs).items():
        _, _, work, limit = forms[name]
        rows[name] |= times | (reached(work, times["ms"], limit) if work else {})
    return list(rows.values())


def reached(work: float, ms: float, limit: str) -> dict:
    """`work` in `ms` as a rate: bytes/s if limit is "copy", FLOP/s of "bf16" or "fp8" products."""
    rate, best = 1e3 * work / ms, peaks().get(limit)
    unit = "TB/s" if limit == "copy" else "TFLOP/s"
    return {"value": rate / 1e12, "unit": unit, "of_peak": rate / best if best else None}


@functools.cache
def peaks() -> dict[str, float]:
    """FLOP/s or bytes/s by data sheet; of a CPU those of products in float32, measured."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return {"bf16": hardware.measured_matmul_flops()}
    card = hardware.find_accelerator(device.device_kind)
    # In fp8 the tensor cores of Ada, Hopper and Blackwell are twice as fast.
    rates = card and {"bf16": card.peak_flops, "fp8": 2 * card.peak_flops, "copy": card.bandwidth}
    return rates or {}


def table(rows: list[dict]) -> str:
    """The columns that any row has."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [names, *([cell(name, row.get(name)) for name in names] for row in rows)]
    return "\n".join(aligned(lines, [n for n, name in enumerate(names) if COLUMNS[name] == "{}"]))


def cell(column: str, value) -> str:
    large = column == "value" and (value or 0) >= 1e3
    form = "{:,.0f}" if large else COLUMNS[column]
    return "" if value is None else form.format(value)


def parser(doc: str | None, secs: float) -> argparse.ArgumentParser:
    """What every benchmark of shapes takes on its command line."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=form)
    made.add_argument("--shape", choices=SHAPES, help="by default those that suit this machine")
    made.add_argument("--secs", type=float, default=secs, help="of measuring, for each shape")
    return made


def chosen_shapes(args: argparse.Namespace) -> list[Shape]:
    defaults = ["d20"] if jax.default_backend() == "gpu" else ["d4", "demo"]
    return [load_shape(name) for name in ([args.shape] if args.shape else defaults)]


def finish(bench: str, rows: list[dict], **more: Any) -> None:
    """How every benchmark ends: the table, then one line of JSON with everything."""
    log(table(rows))
    print(json.dumps({"bench": bench, "rows": rows} | more | {"machine": hardware.describe()}))
