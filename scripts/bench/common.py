"""What all benchmarks share: the recipes' shapes, the training step, fair timing, how results look.

Times are compared only within one run. The candidates take turns, another one first in each round,
so that a machine that slows down slows all of them; each is compiled, warmed up and waited for.
Data is random: on zeros a GPU draws less power and runs faster. Only JAX, Flax and Optax are
needed, and nothing that reads data, so that a borrowed machine can be measured.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import hardware
from nanochat_jax.common import UserError, log
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.train import memory
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch

MIN_TIMED_SECS = 0.02  # of one timing: shorter calls are repeated until the clock can resolve them
STEP_TOKENS = 2**19  # of a step on a GPU, at most: upstream's batch, for all recipes alike
SMALL = {
    "tokenizer.vocab_size": 4_096,
    "model.depth": 4,
    "model.seq_len": 256,
    "base.device_batch_size": 16,
    "base.total_batch_tokens": 4_096,
}
# Recipe, and what differs from it.
SHAPES = {"d4": ("d20", SMALL)} | {name: (name, {}) for name in ("d20", "gpt2", "demo", "tiny")}


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
    file, changes = SHAPES[name]
    config = cfg.load(cfg.CONFIGS / f"{file}.py")
    for key, value in changes.items():
        section, key = key.split(".")
        config[section][key] = value
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


def optimizer(shape: Shape, paths=None):
    """The shape's, with constant schedules; of all parameters or of those at `paths`."""
    return build_optimizer(
        param_shapes(shape.model) if paths is None else paths,
        shape.model.model_dim,
        shape.optim,
        lr_multiplier=lambda step: jnp.float32(1.0),
        momentum=lambda step: jnp.float32(0.95),
        weight_decay=lambda step: jnp.float32(shape.weight_decay),
    )


class Training:
    """Training of a shape on one random batch, always the same: `compile` takes no memory; after
    `start` a call takes a step."""

    def __init__(self, shape: Shape, mesh=None):
        self.shape, self.mesh, self.tx = shape, mesh or one_device(), optimizer(shape)
        self.owners = Owners(shape.model, self.mesh)
        self.state: Any = abstract_state(self.owners, self.tx)
        self.step: Any = make_train_step(
            self.owners,
            self.tx,
            device_batch_size=shape.rows,
            tile_tokens=shape.tile_tokens,
            remat=shape.model.remat,
            grad_clip=shape.grad_clip,
        )

    def compile(self) -> "Training":
        rows = self.shape.rows * self.shape.accumulate * self.mesh.size
        ids = jax.ShapeDtypeStruct((rows, self.shape.model.seq_len), jnp.int32)
        with jax.set_mesh(self.mesh):
            lowered = self.step.lower(self.state, {"inputs": ids, "targets": ids})
        self.step = memory.compile_lowered(lowered)
        self.bytes = memory.compiled_bytes(self.step)
        return self

    def start(self) -> "Training":
        c, rows = self.shape.model, self.shape.rows * self.shape.accumulate
        self.state = create_state(self.owners, self.tx, seed=0)
        self.batch = put_batch(random_batch(0, rows, c.seq_len, c.vocab_size), self.mesh)
        self()
        self.first_loss = float(self.loss)
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
    while True:
        training, training.bytes = Training(shape), float("inf")
        try:
            training.compile()
        except jax.errors.JaxRuntimeError as error:  # while kernels are tried out
            if not memory.is_out_of_memory(error):
                raise
        if training.bytes <= free:
            return training
        needed, free_text = map(memory.format_bytes, (training.bytes, free))
        log(f"{shape.name}: {shape.rows} rows at once need {needed}, free are {free_text}")
        if shape.rows % 2:
            raise UserError(f"{shape.name} does not fit; expected more memory: set --remat=full")
        shape = replace(shape, rows=shape.rows // 2, accumulate=shape.accumulate * 2)


def random_batch(seed: int, rows: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """inputs and targets, int32 [rows, seq_len]: every token trained."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len + 1), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def random_arrays(dtype, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal numbers of these shapes, other ones for each."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, jnp.dtype(dtype)) for k, s in zip(keys, shapes, strict=True)]


class Timing(NamedTuple):
    ms: float  # median of one call
    spread: float  # half the distance between the quartiles, as a fraction of the median
    best_ms: float  # the fastest: least disturbed by whatever else the machine does
    times_first: float  # ms over that of the first candidate


def time_in_turn(
    calls: dict[str, Callable], secs: float, *, min_rounds: int = 5
) -> dict[str, Timing]:
    """One call of each, in turn over about `secs` in all; with 0 once in each of min_rounds."""
    repeats = {}
    for name, call in calls.items():
        _time(call, 1)  # compiles, touches its memory
        repeats[name] = max(1, round(MIN_TIMED_SECS / _time(call, 1))) if secs else 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, rounds, began = list(calls), 0, time.perf_counter()
    while rounds < min_rounds or time.perf_counter() - began < secs:
        for name in order:
            samples[name].append(1e3 * _time(calls[name], repeats[name]) / repeats[name])
        order, rounds = order[1:] + order[:1], rounds + 1
    found, first = {}, None
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        first = first or median
        found[name] = Timing(median, (high - low) / 2 / median, min(times), median / first)
    return found


def _time(call: Callable, repeats: int) -> float:
    """call returns what has to be waited for, if anything."""
    result, began = None, time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - began


@dataclass
class Row:
    """A result: a line of the table, an object of the JSON; the first fields as in Timing."""

    what: str
    ms: float | None = None
    spread: float | None = None
    best_ms: float | None = None
    times_first: float | None = None
    value: float | None = None
    unit: str = ""
    work: float | None = None  # FLOP/s or bytes/s
    limit: str = ""  # what bounds it: "bf16" or "fp8" products, "copy"
    bytes: int | None = None  # by the compiler's analysis
    note: str = ""


class Form(NamedTuple):
    """A function to measure; work: FLOPs or bytes, limit: of which kind, as in Row."""

    function: Callable
    args: tuple | list
    work: float | None = None
    limit: str = "bf16"


def measure(forms: dict[str, Form], secs: float) -> list[Row]:
    """Compile all, on threads; run in turn those that fit."""
    lowered = [jax.jit(form.function).lower(*form.args) for form in forms.values()]
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = dict(zip(forms, pool.map(memory.compile_lowered, lowered), strict=True))
    needed = {name: memory.compiled_bytes(program) for name, program in compiled.items()}
    fit = {name: form for name, form in forms.items() if needed[name] < free_bytes()}
    calls = {name: functools.partial(compiled[name], *form.args) for name, form in fit.items()}
    rows = {name: Row(name, bytes=needed[name], note="does not fit") for name in forms}
    for name, timing in time_in_turn(calls, secs).items():
        row = rows[name] = Row(name, *timing, limit=forms[name].limit, bytes=needed[name])
        if work := forms[name].work:
            row.work, row.value = 1e3 * work / timing.ms, work / timing.ms / 1e9
            row.unit = "TB/s" if row.limit == "copy" else "TFLOP/s"
    return list(rows.values())


@functools.cache
def peak(limit: str) -> float | None:
    """FLOP/s or bytes/s from the device's data sheet; on a CPU, as measured: products in float32, a
    large array read once."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        if limit != "copy":
            return hardware.measured_matmul_flops() if limit == "bf16" else None
        (large,) = random_arrays("float32", (2**26,))
        read = functools.partial(jax.jit(jnp.sum), large)
        return 1e3 * large.nbytes / time_in_turn({"read": read}, 1.0)["read"].ms
    card = hardware.find_accelerator(device.device_kind)
    # In fp8 the tensor cores of Ada, Hopper and Blackwell are twice as fast.
    rates = card and {"bf16": card.peak_flops, "fp8": 2 * card.peak_flops, "copy": card.bandwidth}
    return rates[limit] if rates else None


def of_peak(row: Row) -> float | None:
    limit = peak(row.limit) if row.work else None
    return row.work / limit if row.work and limit else None


def text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def cells(row: Row) -> dict[str, str]:
    """A row for people, by column."""
    return {
        "what": row.what,
        "ms": text(row.ms, "{:,.2f}"),
        "spread": text(row.spread, "{:.1%}"),
        "best ms": text(row.best_ms, "{:,.2f}"),
        "x first": text(row.times_first, "{:.2f}"),
        "achieved": text(row.value, "{:,.4g}" if (row.value or 0) < 1e3 else "{:,.0f}"),
        "unit": row.unit,
        "of peak": text(of_peak(row), "{:.1%}"),
        "MiB": text(row.bytes and row.bytes / 2**20, "{:,.0f}"),
        "note": row.note,
    }


def table(rows: list[dict[str, str]]) -> str:
    """Aligned columns, text to the left; without those that are empty."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [{name: name for name in names}, *rows]
    for name in names:
        width = max(len(line[name]) for line in lines)
        at_left = name in ("what", "unit", "note")
        for line in lines:
            line[name] = line[name].ljust(width) if at_left else line[name].rjust(width)
    return "\n".join("  ".join(line[name] for name in names).rstrip() for line in lines)


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


def finish(bench: str, rows: list[Row], **more: Any) -> None:
    """How every benchmark ends: the table, then one line of JSON with everything."""
    log(table([cells(row) for row in rows]))
    found = [asdict(row) | {"of_peak": of_peak(row)} for row in rows]
    result = {"bench": bench, "rows": found} | more | {"machine": hardware.describe()}
    print(json.dumps(result), flush=True)
