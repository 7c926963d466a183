"""JAX as this project starts it: processes, memory, compile cache."""

import ctypes
import os
import shutil

import jax

from nanochat_jax.common import base_dir
from nanochat_jax.launch import cluster
from nanochat_jax.launch.cluster import Launch

MEMORY_SHARE = 0.92  # of a GPU that JAX takes; the rest is for CUDA, cuDNN, NCCL and their graphs
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def start_runtime(*, compile_cache: bool, launch: Launch | None = None) -> str:
    """Join the other processes, if any, and turn on the persistent compile cache; returns a line
    about the devices."""
    together = launch if launch and not jax.distributed.is_initialized() else None
    if together:
        cluster.join(together)
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compile_cache"))
        # By default those that took less than a second are not kept: a third of the engine's.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))
    # What is recomputed is chosen by the layout; XLA would do it unasked near the memory's limit.
    jax.config.update("jax_compiler_enable_remat_pass", False)
    if shutil.which("nvidia-smi") is None:  # before JAX starts its threads
        keep_freed_memory()
    devices = jax.devices()
    if together:
        cluster.watch(together)
    return f"devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)"


def keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees for the next one; elsewhere do nothing. By
    default it returns large ones to the system, which takes an eighth to a half of a step on a CPU.
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
