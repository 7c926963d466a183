"""GPUs that are not there, as devices that can only be compiled for.

XLA's compiler for NVIDIA GPUs needs no GPU, only a description of one (gpus.toml). Nothing can be
timed, so it takes its first choice of kernels instead of the fastest.
"""

import importlib.util
import os
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from nanochat_jax.common import UserError
from nanochat_jax.plan import GPUS_PER_NODE

NO_TIMING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"  # products by cuBLAS
CUDNN_VERSION = 91_000  # the least that constraints/constraints.txt could stand for
LIBRARIES = "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
GPUS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text())
COMMON = GPUS.pop("all")


def describe(name: str) -> str:
    """A GPU as XLA reads it: GpuTargetConfigProto, as text."""
    numbers = COMMON | GPUS[name]
    major, minor = numbers.pop("capability").split(".")
    fields = " ".join(f"{key}: {value}" for key, value in numbers.items())
    fields += f" cuda_compute_capability {{ major: {major} minor: {minor} }}"
    rest = f'platform_name: "CUDA" device_description_str: "NVIDIA {name.upper()}" {LIBRARIES}'
    return f"gpu_device_info {{ {fields} }} {rest}"


@contextmanager
def absent_gpus(name: str, count: int) -> Iterator[list]:
    """Some of them, in nodes of eight; JAX, which must not have started, takes itself to be on GPUs
    while they are used. UserError without the packages of the extra gpu."""
    if name not in GPUS:
        raise UserError(f"--gpu got {name!r}, expected with --compile one of: {', '.join(GPUS)}")
    if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise UserError(f"--gpus got {count}, expected at most 8 or a multiple of 8")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        cure = "pip install '.[gpu]' in an environment of its own, on Linux (5.5 GB)"
        raise UserError(f"--compile needs XLA's compiler for GPUs: {cure}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plug-in starts without a driver
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_TIMING}"
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    in_node = min(count, GPUS_PER_NODE)
    grid = f"1x{count // in_node}x{in_node}"
    known = topologies.get_topology_desc(
        platform="cuda", target_config=describe(name), topology=grid
    )
    with ExitStack() as stack:
        for where, function, answer in (  # these would ask a device
            (jax, "default_backend", "gpu"),
            (cudnn, "check_cudnn_version", CUDNN_VERSION),
            (cudnn, "check_compute_capability", True),
        ):
            stack.enter_context(mock.patch.object(where, function, lambda *_, a=answer, **__: a))
        yield list(known.devices)
