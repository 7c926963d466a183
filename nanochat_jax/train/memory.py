"""Memory of the devices: what is free, what a program needs, what to tell when it runs out."""

import ctypes
import gc
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import psutil
from jax.sharding import Mesh

from nanochat_jax import hardware
from nanochat_jax.common import UserError
from nanochat_jax.train.state import TrainState

GIB, MIB = 2**30, 2**20
# XLA's CPU compiler drops the barriers of jax.checkpoint early and then merges what is recomputed
# with what was there before, so that nothing is saved. Without that pass it keeps them.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
ADVICE = (
    "leave --config.model.remat=auto, split the model with --config.mesh.tensor, or choose a "
    "smaller --config.model.depth or --config.model.seq_len"
)


class OutOfMemory(Exception):
    """A training step ran out of memory; its text is what the runtime said."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a jax.errors.JaxRuntimeError says so, in the words of XLA, CUDA or NCCL."""
    return re.search("resource_exhausted|out.of.memory", str(error), re.IGNORECASE) is not None


@contextmanager
def in_the_step() -> Iterator[None]:
    """Running out of memory in here is the fault of the layout: raises OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0]) from error


@contextmanager
def outside_the_step(stage: str) -> Iterator[None]:
    """Running out of memory in here is not the layout's fault: raises UserError."""
    try:
        with in_the_step():
            yield
    except OutOfMemory as error:
        key = "rl.slots" if stage == "rl" else "eval.device_batch_size"
        cure = f"lower --config.{key} or split the model with --config.mesh.tensor"
        what = f"{stage}: out of memory outside the training step ({error})"
        raise UserError(f"{what}; {cure}; the same command continues") from error


def compile_lowered(lowered):
    """Compile so that jax.checkpoint takes effect on every kind of device."""
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile(compiler_options=KEEP_BARRIERS if on_cpu else None)


def compiled_bytes(compiled) -> int:
    """Peak bytes per device of a compiled function; 0 where the compiler does not tell."""
    m = compiled.memory_analysis()
    sizes = "argument_size", "output_size", "temp_size", "generated_code_size"
    return int(sum(getattr(m, f"{s}_in_bytes") for s in sizes) - m.alias_size_in_bytes) if m else 0


def available_bytes(mesh: Mesh) -> float:
    """Free bytes of each device of this process, infinite where it does not tell; CPU devices
    share the machine's memory."""
    devices = mesh.local_mesh.devices.flat
    if devices[0].platform == "cpu":
        free_in_container = hardware.memory_bytes() - psutil.Process().memory_info().rss
        free = min(psutil.virtual_memory().available, free_in_container)
        return free // mesh.local_mesh.size
    stats = [device.memory_stats() for device in devices]
    return min((s["bytes_limit"] - s["bytes_in_use"] for s in stats if s), default=math.inf)


def held_bytes(state: TrainState) -> int:
    """Per device: its share of the state (an abstract_state), and gradients of all parameters."""
    leaves, params = jax.tree.leaves(state), list(state.params.values())
    share = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    gradients = sum(a.size * a.dtype.itemsize for a in params)
    return share + gradients // params[0].sharding.mesh.shape["tensor"]


def require_memory(state: TrainState, mesh: Mesh) -> None:
    """UserError when weights, gradients and optimizer state alone do not fit; costs nothing."""
    what = "weights, gradients and optimizer state alone need"
    if (needed := held_bytes(state)) > (available := available_bytes(mesh)):
        raise too_little_memory(what, needed, available)


def too_little_memory(what: str, needed: float, available: float) -> UserError:
    there_are = f"there are {format_bytes(available)}"
    return UserError(f"{what} {format_bytes(needed)} per device, {there_are}; {ADVICE}")


def format_bytes(count: float) -> str:
    if not 0 < count < math.inf:
        return "unknown"
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def return_freed_memory() -> None:
    """Return to the system what glibc keeps, so that it counts as free again."""
    gc.collect()  # arrays may hang in a cycle of frames and exceptions
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
