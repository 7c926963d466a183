import json
import shutil
import stat
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat_jax import hardware
from nanochat_jax.common import UserError
from nanochat_jax.hardware import ACCELERATORS, find_accelerator, peak_flops, usd_per_hour


@pytest.mark.parametrize(
    "name,flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("rtx4090", 165.2e12),
        ("h100", 989e12),
        ("Tesla T4", 65e12),
        ("TPU v5 lite", 197e12),
        # Names that contain a known one and are something else: no number rather than a wrong one.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T400", None),
        ("NVIDIA H20", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops_by_name(name, flops):
    assert peak_flops(name) == flops


def test_memory_tells_variants_apart():
    names = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H200")
    gigabytes = [getattr(find_accelerator(name), "memory_bytes", 0) / 1e9 for name in names]
    assert gigabytes == [40, 80, 96, 141]


def test_every_row_can_be_found():
    for row in ACCELERATORS:
        assert find_accelerator("NVIDIA " + "-".join(row.words).upper()) == row


def test_price_of_upstreams_node_is_24_dollars_and_ones_own_cpu_is_free():
    assert 8 * (usd_per_hour("NVIDIA H100 80GB HBM3") or 0) == 24
    assert usd_per_hour("cpu", "cpu") == 0
    assert usd_per_hour("NVIDIA Unheard Of") is None


def test_ceiling_of_gpus_multiplies_and_of_fake_cpu_devices_does_not():
    assert hardware.compute_ceiling("gpu", "NVIDIA H200", 8)[0] == 8 * 989e12
    assert hardware.compute_ceiling("gpu", "NVIDIA Unheard Of", 8) == (
        None,
        "no peak known for NVIDIA Unheard Of",
    )
    one, source = hardware.compute_ceiling("cpu", "cpu", 1)
    assert one == hardware.compute_ceiling("cpu", "cpu", 8)[0]
    assert "measured" in source


@pytest.mark.parametrize(
    ("kind", "capability", "dtype"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0", "bfloat16"),
        ("NVIDIA L40S", "8.9", "bfloat16"),
        ("AMD Instinct MI300X", "gfx942", "bfloat16"),
        ("cpu", None, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "9.0", "float32"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be_had(kind, capability, dtype):
    device = SimpleNamespace(device_kind=kind)
    if capability:
        device.compute_capability = capability
    with pytest.raises(UserError) as error:
        hardware.check_fp8(device, dtype)
    [line] = str(error.value).splitlines()
    assert f"got {kind} (compute capability {str(capability).lower()})" in line and dtype in line
    assert "expected an NVIDIA GPU of 9.0 (Hopper) or later and bfloat16" in line


def test_fp8_is_accepted_from_hopper_on():
    for kind, capability in (("NVIDIA H200", "9.0"), ("NVIDIA B200", "10.0")):
        device = SimpleNamespace(device_kind=kind, compute_capability=capability)
        hardware.check_fp8(device, "bfloat16")


def test_measured_rate_is_of_this_machines_size():
    hardware.measured_matmul_flops.cache_clear()
    start = time.perf_counter()
    flops = hardware.measured_matmul_flops(budget_secs=0.2)
    assert time.perf_counter() - start < 5  # far above the budget: the machine may be busy
    a = np.ones((768, 768), np.float32)
    secs = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        secs.append(time.perf_counter() - start)
    assert 1 / 30 < flops / (2 * 768**3 / min(secs)) < 30


def test_describe_is_json_and_counts_the_fake_devices():
    machine = json.loads(json.dumps(hardware.describe()))
    assert (machine["platform"], machine["num_devices"], machine["num_processes"]) == ("cpu", 8, 1)
    assert machine["versions"]["numpy"] == np.__version__
    assert 1 <= machine["cpu_cores"] <= 4096
    assert 2**28 < machine["memory_bytes"] < 2**50


def test_driver_and_memory_come_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '570.86.15, 81559'\necho '570.86.15, 81559'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert hardware._nvidia_driver_and_memory() == ("570.86.15", 81559 * 2**20)
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert hardware._nvidia_driver_and_memory() == (None, None)
    tool.write_text("#!/bin/sh\necho '570.86.15, [N/A]'\n")
    assert hardware._nvidia_driver_and_memory() == (None, None)


def test_a_hanging_or_missing_tool_is_no_error(monkeypatch):
    def hang(*_args, **_kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", hang)
    assert hardware._nvidia_driver_and_memory() == (None, None)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert hardware._nvidia_driver_and_memory() == (None, None)
