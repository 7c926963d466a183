"""What machine this is, how fast it could be, and what an hour of it costs.

Peaks are dense bfloat16 matrix rates with float32 accumulation, per device, from the makers'
datasheets (which print twice that where they count 2:4 sparsity). A device that is not in the table
has no peak and no MFU. A CPU's ceiling is measured. JAX is imported only to ask about this machine.
"""

import functools
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from nanochat_jax.common import UserError

GB = 10**9  # as on datasheets


@dataclass(frozen=True)
class Accelerator:
    words: tuple[str, ...]  # all of them occur in the device's name
    peak_flops: float  # FLOP/s, bfloat16, dense
    memory_bytes: float
    bandwidth: float  # bytes/s of device memory
    usd_per_hour: float  # one device, rented on demand


# The first row wins whose words all occur in a name. Sources: the makers' datasheets; for GeForce
# and RTX architecture papers; for TPUs (a chip) cloud.google.com/tpu/docs and list prices. V100 and
# T4 have no bfloat16 units: float16 rates. Prices: H100, A100 and V100 are upstream's ($24 an hour
# for 8xH100); the others are typical on-demand rates of GPU clouds, rounded, 2026-05.
ACCELERATORS = (
    Accelerator(("gb200",), 2.5e15, 186 * GB, 8.0e12, 6.00),
    Accelerator(("b200",), 2.25e15, 180 * GB, 7.7e12, 5.50),
    Accelerator(("5090",), 209.5e12, 32 * GB, 1.792e12, 0.80),
    Accelerator(("gh200",), 989e12, 96 * GB, 4.0e12, 2.00),
    Accelerator(("h200", "nvl"), 835.5e12, 141 * GB, 4.8e12, 3.50),
    Accelerator(("h200",), 989e12, 141 * GB, 4.8e12, 3.50),
    Accelerator(("h100", "nvl"), 835.5e12, 94 * GB, 3.9e12, 3.00),
    Accelerator(("h100", "pcie"), 756e12, 80 * GB, 2.0e12, 3.00),
    Accelerator(("h100",), 989e12, 80 * GB, 3.35e12, 3.00),
    Accelerator(("l40s",), 362e12, 48 * GB, 864e9, 0.90),
    Accelerator(("l40",), 181e12, 48 * GB, 864e9, 0.80),
    Accelerator(("l4",), 121e12, 24 * GB, 300e9, 0.50),
    Accelerator(("4090",), 165.2e12, 24 * GB, 1.008e12, 0.40),
    Accelerator(("6000", "ada"), 364.2e12, 48 * GB, 960e9, 0.80),
    Accelerator(("a100", "40gb"), 312e12, 40 * GB, 1.555e12, 1.79),
    Accelerator(("a100", "pcie"), 312e12, 80 * GB, 1.935e12, 1.79),
    Accelerator(("a100",), 312e12, 80 * GB, 2.039e12, 1.79),
    Accelerator(("a10",), 125e12, 24 * GB, 600e9, 0.75),
    Accelerator(("a10g",), 70e12, 24 * GB, 600e9, 1.00),
    Accelerator(("a6000",), 154.8e12, 48 * GB, 768e9, 0.50),
    Accelerator(("3090", "ti"), 80e12, 24 * GB, 1.008e12, 0.25),
    Accelerator(("3090",), 71e12, 24 * GB, 936e9, 0.25),
    Accelerator(("v100", "pcie"), 112e12, 16 * GB, 900e9, 0.55),
    Accelerator(("v100",), 125e12, 16 * GB, 900e9, 0.55),
    Accelerator(("t4",), 65e12, 16 * GB, 300e9, 0.35),
    Accelerator(("tpu", "v6", "lite"), 918e12, 32 * GB, 1.64e12, 2.70),
    Accelerator(("tpu", "v5", "lite"), 197e12, 16 * GB, 819e9, 1.20),
    Accelerator(("tpu", "v5p"), 459e12, 95 * GB, 2.765e12, 4.20),
    Accelerator(("tpu", "v5"), 459e12, 95 * GB, 2.765e12, 4.20),
    Accelerator(("tpu", "v4"), 275e12, 32 * GB, 1.228e12, 3.22),
)
NOT_THE_CARD = {"laptop", "mobile", "mig", "max", "d", "dd", "super"}  # other chips, same number
CGROUPS = Path("/sys/fs/cgroup")  # versions 1 and 2
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def find_accelerator(device_name: str) -> Accelerator | None:
    """The table's row for a name as JAX or a person spells it ("NVIDIA H100 80GB HBM3", "h100")."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower().replace("rtx", "rtx ")))
    known = () if words & NOT_THE_CARD else ACCELERATORS
    return next((row for row in known if set(row.words) <= words), None)


def usd_per_hour(device_kind: str, platform_name: str = "gpu") -> float | None:
    """Price of one device for an hour; 0 for a CPU, taken as one's own machine; None if unknown."""
    row = find_accelerator(device_kind)
    return 0.0 if platform_name == "cpu" else row and row.usd_per_hour


def compute_ceiling(platform: str, device_kind: str, num_devices: int) -> tuple[float | None, str]:
    """FLOP/s that all devices together can reach (what MFU divides by), and what that number is."""
    if platform == "cpu":  # its "devices" are slices of one machine
        return measured_matmul_flops(), "measured float32 matmul rate of this machine"
    if row := find_accelerator(device_kind):
        return row.peak_flops * num_devices, f"bfloat16 peak of {num_devices} x {device_kind}"
    return None, f"no peak known for {device_kind}"


def check_fp8(device: Any, compute_dtype: str) -> None:
    """UserError unless the JAX device multiplies in fp8 and the rest computes in bfloat16."""
    capability = str(getattr(device, "compute_capability", "none"))  # "9.0"; on AMD "gfx942"
    major = capability.partition(".")[0]
    if not (major.isdecimal() and int(major) >= 9 and compute_dtype == "bfloat16"):
        got = f"{device.device_kind} (compute capability {capability}) and {compute_dtype}"
        raise UserError(
            f"config.model.fp8_layers got {got}, expected an NVIDIA GPU of 9.0 (Hopper) or later "
            "and bfloat16; train without: --config.model.fp8_layers='()'"
        )


@functools.cache
def measured_matmul_flops() -> float:
    """FLOP/s of the fastest float32 matrix product seen within half a second on JAX's first device.

    The size grows until one product takes long enough to fill every core and be timed well.
    """
    import jax
    import jax.numpy as jnp

    best_flops, size, stop = 0.0, 512, time.perf_counter() + 0.5
    while time.perf_counter() < stop:
        a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
        (a @ a).block_until_ready()  # compiled, and pages touched
        start = time.perf_counter()
        (a @ a).block_until_ready()
        secs = time.perf_counter() - start
        best_flops = max(best_flops, 2 * size**3 / secs)
        size *= 2 if secs < 0.02 and size < 8192 else 1
    return best_flops


def describe() -> dict[str, Any]:
    """This machine and its software, JSON-ready; None where the system does not tell."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "driver": nvidia_driver() if device.platform == "gpu" else None,
        "cpu_model": cpu_model(),
        "cpu_cores": cpu_cores(),
        "memory_bytes": memory_bytes(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")  # Linux
    found = re.search(r"model name\s*: *(.+)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.processor() or platform.machine() or None


def cpu_cores() -> int:
    """Cores this process may use, which a container or taskset makes fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus(cgroups: Path = CGROUPS) -> int:
    """CPUs that this process can keep busy: `cpu_cores`, or the container's quota where less."""
    v1 = (cgroups / "cpu/cpu.cfs_quota_us", cgroups / "cpu/cpu.cfs_period_us")
    numbers = _numbers(cgroups / "cpu.max") or [n for file in v1 for n in _numbers(file)]
    quota, period = numbers if len(numbers) == 2 else (-1, 1)
    return max(1, min(cpu_cores(), quota // period)) if quota > 0 else cpu_cores()


def memory_bytes() -> int:
    """Main memory, or the container's limit where that is less."""
    limits = _numbers(CGROUPS / "memory.max") or _numbers(CGROUPS / "memory/memory.limit_in_bytes")
    return min([psutil.virtual_memory().total, *limits])


def _numbers(limit_file: Path) -> list[int]:
    """What a control group's file holds; [] where there is no such file, or no limit ("max")."""
    try:
        return [int(word) for word in limit_file.read_text().split()]
    except (OSError, ValueError):
        return []


def nvidia_driver() -> str | None:
    """Its version; None where nvidia-smi does not tell."""
    ask = "nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()
    try:
        said = subprocess.check_output(ask, stderr=subprocess.DEVNULL, text=True, timeout=10)
        return said.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
