"""JAX as this project starts it: processes, compile cache, and steps compiled before they run.

Compiling ahead of time tells how long it took and how much memory the step will need, so a run
takes the fastest layout that fits (train/layout.py), and one that cannot fit at all says so before
it starts instead of dying in the middle of it.
"""

import ctypes
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from nanochat_jax import hardware
from nanochat_jax.common import UserError, base_dir, log
from nanochat_jax.launch import cluster
from nanochat_jax.launch.cluster import Launch
from nanochat_jax.model.sharding import ROWS
from nanochat_jax.train.layout import Layout, LayoutRecord, is_out_of_memory
from nanochat_jax.train.state import TrainState

GIB, MIB = 2**30, 2**20
MEMORY_SHARE = 0.92  # of a GPU that JAX takes; the rest is for CUDA, cuDNN, NCCL and their graphs
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
# XLA's CPU compiler drops the barriers of jax.checkpoint early and then merges what is recomputed
# with what was there before, so that nothing is saved. Without that pass it keeps them.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

_ADVICE = (
    "leave --config.model.remat=auto, split the model with --config.mesh.tensor, or choose a "
    "smaller --config.model.depth or --config.model.seq_len"
)


def start_runtime(*, compile_cache: bool, launch: Launch | None = None) -> None:
    """Join the other processes, if any, and turn on the persistent compile cache."""
    together = launch if launch and not jax.distributed.is_initialized() else None
    if together:
        cluster.join(together)
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    take_memory()
    # What is recomputed is chosen by the layout; XLA would do it unasked near the memory's limit.
    jax.config.update("jax_compiler_enable_remat_pass", False)
    if shutil.which("nvidia-smi") is None:  # before JAX starts its threads
        keep_freed_memory()
    devices = jax.devices()
    log(f"devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)")
    if together:
        cluster.watch(together)


def take_memory() -> None:
    """Have JAX take MEMORY_SHARE of each GPU, unless told otherwise; before it sees the devices."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


def keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees for the next one; elsewhere do nothing.

    By default it returns large ones to the system, which then clears every page anew at each step:
    an eighth to a half of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """The opposite, once: so that what nobody uses counts as free again."""
    gc.collect()  # arrays may hang in a cycle of frames and exceptions
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def compile_step(
    train_step,
    layout: Layout,
    state: TrainState,
    rows: int,
    seq_len: int,
    mesh: Mesh,
    *,
    weights: bool = False,
):
    """Compile for batches [rows, seq_len]; says the seconds.

    layout: of train_step. state: shapes with shardings (train.state.abstract_state). weights:
    batches bring theirs.
    """

    def shape(dtype):
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=NamedSharding(mesh, ROWS))

    batch = {"inputs": shape(jnp.int32), "targets": shape(jnp.int32)}
    if weights:
        batch["weights"] = shape(jnp.float32)
    began = time.monotonic()
    log(f"compiling train_step for {rows} x {seq_len} tokens, {layout} ...")
    with jax.set_mesh(mesh):
        compiled = compile_lowered(train_step.lower(state, batch))
    log(f"compiled train_step in {time.monotonic() - began:.1f}s")
    return compiled


def compile_lowered(lowered):
    """Compile so that what is to be recomputed is recomputed, on every kind of device."""
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile(compiler_options=KEEP_BARRIERS if on_cpu else None)


def step_for_widths(
    make_step: Callable[[Layout], Callable],
    record: LayoutRecord,
    state: TrainState,
    rows: int,
    widest: int,
    mesh: Mesh,
    *,
    weights: bool = False,
):
    """The training step in the first layout that fits, compiled for every width that comes.

    The layout is chosen by the widest; narrower ones need less, and what is free when they come no
    longer counts the state. UserError when none fits. make_step: the step in a given layout.
    """
    kind = {"weights": weights}
    layout, widest_step = _first_that_fits(make_step, record, state, rows, widest, mesh, **kind)
    compiled, train_step = {widest: widest_step}, make_step(layout)

    def step(state_now: TrainState, batch):
        width = batch["inputs"].shape[1]
        if width not in compiled:
            compiled[width] = compile_step(train_step, layout, state, rows, width, mesh, **kind)
        return compiled[width](state_now, batch)

    return step


def _first_that_fits(make_step, record, state, rows, widest, mesh, **kind):
    """(layout, compiled step) of the first layout left that fits; the record takes it.

    Layouts that cannot fit are not compiled. Bytes grow with the rows, from more than weights,
    gradients and optimizer state take (parts are added up in gradients of their own): so a line
    from there to a layout with more rows and the same remat lies below the truth.
    """
    left, held, what = record.left(), _held_bytes(state), "a step needs"
    # What ran out of memory before shows that there is less than the device says.
    limit = min(record.too_large.values(), default=math.inf)
    known: dict[str, tuple[int, float]] = {}  # remat: (rows, bytes) of the one compiled last
    needed = available = 0.0
    for layout in left:
        if layout.remat in known and layout != left[-1]:
            more_rows, more_bytes = known[layout.remat]
            if held + (more_bytes - held) * layout.rows / more_rows > available:
                continue
        compiled = None
        try:
            compiled = compile_step(make_step(layout), layout, state, rows, widest, mesh, **kind)
            needed = compiled_bytes(compiled)
        except jax.errors.JaxRuntimeError as error:  # while kernels are tried out
            if not is_out_of_memory(error):
                raise
            needed = math.inf
        needed, available = _agreed(needed, min(limit, available_bytes(mesh)))
        size = f"{format_bytes(needed)} of {format_bytes(available)} per device"
        if compiled is not None and needed <= available:
            log(f"layout: {layout}; {what} {size}")
            if record.taken not in (None, layout):
                log(f"layout: was {record.taken}; from here on losses agree up to rounding only")
            record.take(layout, int(needed))
            return layout, compiled
        log(f"layout: {layout}; {what} {size}, too much")
        if math.isfinite(needed):
            known[layout.remat] = layout.rows, needed
    if not left:
        raise UserError(
            f"{record.path} says that every layout ran out of memory; {_ADVICE}, or delete it"
        )
    raise _too_little_memory(f"with {left[-1]} {what}", needed, available)


def _agreed(needed: float, available: float) -> tuple[float, float]:
    """The most that any process needs, the least that any has: all must choose the same."""
    if jax.process_count() == 1:
        return needed, available
    values = multihost_utils.process_allgather(np.array([needed, available], np.float32))
    return float(values[:, 0].max()), float(values[:, 1].min())


@contextmanager
def outside_the_step(stage: str) -> Iterator[None]:
    """Out of memory in here is not the fault of the layout: a UserError says what to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        key = "rl.slots" if stage == "rl" else "eval.device_batch_size"
        raise UserError(
            f"{stage}: out of memory outside the training step ({str(error).splitlines()[0]}); "
            f"lower --config.{key} or, if nothing was being evaluated, split the model with "
            "--config.mesh.tensor; the same command continues from the last checkpoint"
        ) from error


def require_memory(state: TrainState, mesh: Mesh) -> None:
    """UserError when weights, gradients and optimizer state alone do not fit; costs nothing.

    state: shapes with shardings (train.state.abstract_state).
    """
    needed, available = _held_bytes(state), available_bytes(mesh)
    if needed > available:
        what = "weights, gradients and optimizer state alone need"
        raise _too_little_memory(what, needed, available)


def compiled_bytes(compiled) -> int:
    """Peak bytes per device of a compiled function: arguments, results and temporaries; 0 where
    the compiler does not tell."""
    m = compiled.memory_analysis()
    if m is None:
        return 0
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )


def available_bytes(mesh: Mesh) -> float:
    """Bytes each device of this process can still take, infinite where it does not tell; CPU
    devices share the machine's memory."""
    devices = mesh.local_mesh.devices.flat
    if devices[0].platform == "cpu":
        free = psutil.virtual_memory().available
        limit = hardware.memory_bytes()  # a container's, where there is one
        if limit:
            free = min(free, limit - psutil.Process().memory_info().rss)
        return free // mesh.local_mesh.size
    stats = [device.memory_stats() for device in devices]
    return min((s["bytes_limit"] - s["bytes_in_use"] for s in stats if s), default=math.inf)


def format_bytes(count: float) -> str:
    if not 0 < count < math.inf:
        return "unknown"
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _held_bytes(state: TrainState) -> int:
    """Per device: its share of the state, plus gradients of all parameters (those of its rows)."""

    def num_bytes(leaf, shape) -> int:
        return math.prod(shape) * leaf.dtype.itemsize

    held = sum(num_bytes(a, a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(state))
    tensor = next(iter(state.params.values())).sharding.mesh.shape["tensor"]
    return held + sum(num_bytes(a, a.shape) for a in state.params.values()) // tensor


def _too_little_memory(what: str, needed: float, available: float) -> UserError:
    return UserError(
        f"{what} {format_bytes(needed)} per device, there are {format_bytes(available)}, "
        f"{format_bytes(needed - available)} too few; {_ADVICE}"
    )
