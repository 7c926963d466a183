"""GPUs that are not there, as devices that can only be compiled for.

XLA's compiler for NVIDIA GPUs needs no GPU, only a description of one. Those below are facts from
openxla/xla, xla/backends/gpu/target_config/specs; rtx4090 from NVIDIA's Ada architecture paper.
Nothing can be timed, so XLA takes its first choice of kernels instead of the fastest.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import jax

from nanochat_jax.common import UserError
from nanochat_jax.plan import GPUS_PER_NODE

NO_TIMING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"  # products by cuBLAS
CUDNN_VERSION = 91_000  # 9.10, as constraints/constraints.txt has it or later


class Gpu(NamedTuple):
    name: str  # as hardware.find_accelerator and JAX spell it
    capability: str
    cores: int  # multiprocessors
    fpus: int  # float32 units of a core
    threads: int  # of a core
    shared_bytes: int  # memory of a core that its threads share; a block gets 1,024 less
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    bandwidth: float  # bytes/s


GPUS = {
    "a100": Gpu("A100", "8.0", 108, 64, 2048, 167_936, 41_943_040, 1.41, 85_100_068_864, 2.039e12),
    "a6000": Gpu("A6000", "8.6", 84, 128, 1536, 102_400, 6_291_456, 1.8, 51_041_271_808, 0.768e12),
    "4090": Gpu("4090", "8.9", 128, 128, 1536, 102_400, 75_497_472, 2.52, 25_757_220_864, 1.008e12),
    "h100": Gpu("H100", "9.0", 132, 128, 2048, 233_472, 52_428_800, 1.98, 84_942_979_072, 3.352e12),
    "h200": Gpu("H200", "9.0", 132, 128, 2048, 233_472, 52_428_800, 1.98, 151_397_597_184, 4.8e12),
    "b200": Gpu(
        "B200", "10.0", 148, 128, 2048, 233_472, 132_644_864, 1.965, 191_514_411_008, 7.672e12
    ),
}


def find_gpu(name: str) -> Gpu:
    if (gpu := GPUS.get(name.lower().removeprefix("rtx").strip())) is None:
        raise UserError(f"--gpu got {name!r}, expected with --compile one of: {', '.join(GPUS)}")
    return gpu


def describe(gpu: Gpu) -> str:
    """The description that XLA reads: GpuTargetConfigProto, as text."""
    major, minor = gpu.capability.split(".")
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.shared_bytes - 1024,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = [f"  {key}{'' if '{' in str(value) else ':'} {value}" for key, value in numbers.items()]
    rest = "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
    info = "\n".join(["gpu_device_info {", *lines, "}"])
    return f'{info}\nplatform_name: "CUDA"\n{rest}\ndevice_description_str: "NVIDIA {gpu.name}"\n'


@contextmanager
def absent_gpus(gpu: Gpu, count: int) -> Iterator[list]:
    """Some of them, in nodes of eight; JAX, which must not have started, takes itself to be on GPUs
    while they are used. UserError without the packages of the extra gpu."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        cure = "pip install '.[gpu]' in an environment of its own, on Linux (5.5 GB)"
        raise UserError(f"--compile needs XLA's compiler for GPUs: {cure}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plug-in starts without a driver
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_TIMING}"
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    nodes = -(-count // GPUS_PER_NODE)
    if count % nodes:
        raise UserError(f"--gpus got {count}, expected at most 8 or a multiple of 8")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=describe(gpu), topology=f"1x{nodes}x{count // nodes}"
    )
    with ExitStack() as stack:
        for where, name, answer in (  # they would ask a device
            (jax, "default_backend", "gpu"),
            (cudnn, "check_cudnn_version", CUDNN_VERSION),
            (cudnn, "check_compute_capability", True),
        ):
            stack.enter_context(mock.patch.object(where, name, lambda *_, a=answer, **__: a))
        yield list(topology.devices)
