"""Which accelerator a name means, and what this machine tells about itself."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat_jax import hardware
from nanochat_jax.common import UserError
from nanochat_jax.hardware import (
    ACCELERATORS,
    cpu_cores,
    find_accelerator,
    peak_flops,
    usable_cpus,
    usd_per_hour,
)


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("rtx4090", 165.2e12),
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


def test_every_row_can_be_found():
    for row in ACCELERATORS:
        assert find_accelerator("NVIDIA " + "-".join(row.words).upper()) == row


def test_price_of_upstreams_node_is_24_dollars_and_ones_own_cpu_is_free():
    assert 8 * (usd_per_hour("NVIDIA H100 80GB HBM3") or 0) == 24
    assert (usd_per_hour("cpu", "cpu"), usd_per_hour("NVIDIA Unheard Of")) == (0, None)


def test_ceiling_of_gpus_multiplies_and_of_fake_cpu_devices_does_not():
    assert hardware.compute_ceiling("gpu", "NVIDIA H200", 8)[0] == 8 * 989e12
    assert hardware.compute_ceiling("gpu", "NVIDIA Unheard Of", 8)[0] is None
    assert hardware.compute_ceiling("cpu", "cpu", 1) == hardware.compute_ceiling("cpu", "cpu", 8)


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "accepted"),
    [
        ("NVIDIA H200", "9.0", "bfloat16", True),
        ("NVIDIA B200", "10.0", "bfloat16", True),
        ("NVIDIA H200", "9.0", "float32", False),
        ("NVIDIA L40S", "8.9", "bfloat16", False),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", False),
        ("cpu", None, "bfloat16", False),
    ],
)
def test_fp8_is_accepted_from_hopper_on(kind, capability, dtype, accepted):
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    if accepted:
        hardware.check_fp8(device, dtype)
    else:
        with pytest.raises(UserError, match=f"config.model.fp8_layers got {kind}"):
            hardware.check_fp8(device, dtype)


def test_measured_rate_is_of_this_machines_size():
    flops = hardware.measured_matmul_flops(budget_secs=0.2)
    a, secs = np.ones((768, 768), np.float32), []
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


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo '570.86.15, 81559'; echo '570.86.15, 81559'", ("570.86.15", 81559 * 2**20)),
        ("echo 'No devices were found'; exit 6", (None, None)),
        ("echo '570.86.15, [N/A]'", (None, None)),
        (None, (None, None)),
    ],
)
def test_driver_and_memory_come_from_nvidia_smi(tmp_path, monkeypatch, script, told):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_driver_and_memory() == told


@pytest.mark.parametrize("quota, cpus", [("100000", 1), ("50000", 1), ("-1", cpu_cores())])
def test_usable_cpus_follow_the_containers_quota(tmp_path, quota, cpus):
    assert usable_cpus(tmp_path) == cpu_cores()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(tmp_path) == cpus  # cgroups version 1
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu.max").write_text(f"{quota.replace('-1', 'max')} 100000\n")
    assert usable_cpus(tmp_path) == cpus  # and 2
