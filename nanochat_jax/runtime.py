"""JAX as this project starts it: processes, compile cache, and steps compiled before they run.

Compiling ahead of time tells how long it took and how much memory the step will need, so a run that
cannot fit says so before it starts instead of dying in the middle of it.
"""

import ctypes
import math
import os
import shutil
import time

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh, NamedSharding

from nanochat_jax import cluster, hardware
from nanochat_jax.cluster import Launch
from nanochat_jax.common import UserError, base_dir, log
from nanochat_jax.model.sharding import ROWS
from nanochat_jax.train.state import TrainState

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def start_runtime(*, compile_cache: bool, launch: Launch | None = None) -> None:
    """Join the other processes, if any, and turn on the persistent compile cache."""
    together = launch if launch and not jax.distributed.is_initialized() else None
    if together:
        cluster.join(together)
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    if shutil.which("nvidia-smi") is None:  # before JAX starts its threads
        keep_freed_memory()
    devices = jax.devices()
    log(f"devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)")
    if together:
        cluster.watch(together)


def keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees for the next one; elsewhere do nothing.

    By default it returns large ones to the system, which then clears every page anew at each step:
    an eighth to a half of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def compile_step(
    train_step, state: TrainState, rows: int, seq_len: int, mesh: Mesh, *, weights: bool = False
):
    """Compile for batches [rows, seq_len]; says the seconds and the bytes a step needs.

    state: shapes with shardings (train.state.abstract_state). weights: batches bring theirs.
    """

    def shape(dtype):
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=NamedSharding(mesh, ROWS))

    batch = {"inputs": shape(jnp.int32), "targets": shape(jnp.int32)}
    if weights:
        batch["weights"] = shape(jnp.float32)
    began = time.monotonic()
    log(f"compiling train_step for {rows} x {seq_len} tokens ...")
    with jax.set_mesh(mesh):
        compiled = train_step.lower(state, batch).compile()
    needed = compiled_bytes(compiled)
    available = available_bytes(mesh)
    log(
        f"compiled train_step in {time.monotonic() - began:.1f}s; a step needs "
        f"{needed / GIB:.2f} GiB of {available / GIB:.1f} GiB per device"
    )
    return compiled


def step_for_widths(
    train_step,
    state: TrainState,
    rows: int,
    widest: int,
    mesh: Mesh,
    *,
    stage: str,
    weights: bool = False,
):
    """train_step compiled for every width of batch that comes; the widest now, for its memory.

    UserError if that one cannot fit; narrower ones need less, and what is free when they come no
    longer counts the state.
    stage: whose device_batch_size the error advises to lower.
    """
    compiled = {}

    def step(state_now: TrainState, batch):
        width = batch["inputs"].shape[1]
        if width not in compiled:
            compiled[width] = compile_step(train_step, state, rows, width, mesh, weights=weights)
        return compiled[width](state_now, batch)

    compiled[widest] = compile_step(train_step, state, rows, widest, mesh, weights=weights)
    _require(compiled_bytes(compiled[widest]), "a step needs", mesh, stage)
    return step


def require_memory(state: TrainState, mesh: Mesh) -> None:
    """UserError when base's weights, gradients and optimizer state alone do not fit; costs nothing.

    state: shapes with shardings (train.state.abstract_state).
    """
    _require(_held_bytes(state), "weights, gradients and optimizer state alone need", mesh, "base")


def compiled_bytes(compiled) -> int:
    """Peak bytes per device of a compiled function: arguments, results and temporaries."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )


def available_bytes(mesh: Mesh) -> int:
    """Bytes a device of this process can still take; CPU devices share the machine's memory."""
    device = mesh.local_mesh.devices.flat[0]
    if device.platform == "cpu":
        free = psutil.virtual_memory().available
        limit = hardware.memory_bytes()  # a container's, where there is one
        if limit:
            free = min(free, limit - psutil.Process().memory_info().rss)
        return free // mesh.local_mesh.size
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def _held_bytes(state: TrainState) -> int:
    """Per device: its share of the state, plus gradients of all parameters (those of its rows)."""

    def num_bytes(leaf, shape) -> int:
        return math.prod(shape) * leaf.dtype.itemsize

    held = sum(num_bytes(a, a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(state))
    tensor = next(iter(state.params.values())).sharding.mesh.shape["tensor"]
    return held + sum(num_bytes(a, a.shape) for a in state.params.values()) // tensor


def _require(needed: int, what: str, mesh: Mesh, stage: str) -> None:
    available = available_bytes(mesh)
    if needed > available:
        raise UserError(
            f"{what} {needed / GIB:.1f} GiB per device, there are {available / GIB:.1f} GiB, "
            f"{(needed - available) / GIB:.1f} GiB too few; lower "
            f"--config.{stage}.device_batch_size, split the model with --config.mesh.tensor, "
            "choose a smaller --config.model.depth or, on a GPU, set --config.model.remat=full"
        )
