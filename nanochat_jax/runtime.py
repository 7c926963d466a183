"""JAX as this project starts it: processes, compile cache, and steps compiled before they run.

Compiling ahead of time tells how long it took and how much memory the step will need, so a run that
cannot fit says so before it starts instead of dying in the middle of it.
"""

import ctypes
import os
import shutil
import time

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh, NamedSharding

from nanochat_jax import hardware
from nanochat_jax.common import UserError, base_dir, log
from nanochat_jax.model.sharding import ROWS
from nanochat_jax.train.state import TrainState

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def start_runtime(
    *, compile_cache: bool, coordinator: str = "", num_processes: int = 1, process_id: int = 0
) -> None:
    """Join the other processes, if any, and turn on the persistent compile cache."""
    if num_processes > 1 and not jax.distributed.is_initialized():
        if not coordinator or not 0 <= process_id < num_processes:
            raise UserError(
                f"config.mesh got coordinator {coordinator!r}, process_id {process_id}, "
                f"num_processes {num_processes}; expected host:port of process 0 and an id "
                f"below {num_processes}"
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
        os.environ["NANOCHAT_PROCESS_INDEX"] = str(process_id)
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
    if shutil.which("nvidia-smi") is None:  # before JAX starts its threads
        keep_freed_memory()
    devices = jax.devices()
    log(f"devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)")


def keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees for the next one; elsewhere do nothing.

    By default it returns large ones to the system, which then clears every page anew at each step:
    an eighth to a half of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def compile_step(train_step, state: TrainState, rows: int, seq_len: int, mesh: Mesh):
    """Compile for batches [rows, seq_len]; says the seconds and bytes; UserError if it cannot fit.

    state: shapes with shardings (train.state.abstract_state).
    """
    batch = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32, sharding=NamedSharding(mesh, ROWS))
    began = time.monotonic()
    log("compiling train_step ...")
    with jax.set_mesh(mesh):
        compiled = train_step.lower(state, {"inputs": batch, "targets": batch}).compile()
    needed = compiled_bytes(compiled)
    available = available_bytes(mesh)
    log(
        f"compiled train_step in {time.monotonic() - began:.1f}s; a step needs "
        f"{needed / GIB:.2f} GiB of {available / GIB:.1f} GiB per device"
    )
    _require(needed, "a step needs", mesh)
    return compiled


def require_memory(state: TrainState, mesh: Mesh) -> None:
    """UserError when weights, gradients and optimizer state alone do not fit; costs nothing to ask.

    state: shapes with shardings (train.state.abstract_state).
    """
    _require(_held_bytes(state), "weights, gradients and optimizer state alone need", mesh)


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
    """Per device: the state's shards plus gradients as large as the parameters."""

    def shard_bytes(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        count = 1
        for size in shape:
            count *= size
        return count * leaf.dtype.itemsize

    leaves = jax.tree.leaves(state) + jax.tree.leaves(state.params)
    return sum(shard_bytes(leaf) for leaf in leaves)


def _require(needed: int, what: str, mesh: Mesh) -> None:
    available = available_bytes(mesh)
    if needed > available:
        raise UserError(
            f"{what} {needed / GIB:.1f} GiB per device, there are {available / GIB:.1f} GiB, "
            f"{(needed - available) / GIB:.1f} GiB too few; lower "
            "--config.base.device_batch_size, split the weights with --config.mesh.fsdp, choose a "
            "smaller --config.model.depth or, on a GPU, set --config.model.remat=full"
        )
