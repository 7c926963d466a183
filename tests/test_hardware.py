"""Which accelerator a name means, and what this machine tells about itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nanochat_jax import hardware
from nanochat_jax.common import UserError
from nanochat_jax.hardware import ACCELERATORS, compute_ceiling, find_accelerator, usd_per_hour

PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GH200 480GB": 989e12}
PEAKS |= {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12}
PEAKS |= {"rtx4090": 165.2e12, "TPU v5 lite": 197e12}
# Names that contain a known one and are something else: no number rather than a wrong one.
UNKNOWN = ["GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "H100 80GB HBM3 MIG 1g.10gb"]
UNKNOWN += ["T400", "H20", "cpu", ""]


@pytest.mark.parametrize("name, flops", [*PEAKS.items(), *((name, None) for name in UNKNOWN)])
def test_peak_of_a_name_and_of_several_devices(name, flops):
    assert compute_ceiling("gpu", name, 8)[0] == (flops and 8 * flops)


def test_every_row_can_be_found():
    for row in ACCELERATORS:
        assert find_accelerator("NVIDIA " + "-".join(row.words).upper()) == row


def test_price_of_upstreams_node_is_24_dollars_and_ones_own_cpu_is_free():
    assert 8 * (usd_per_hour("NVIDIA H100 80GB HBM3") or 0) == 24
    assert (usd_per_hour("cpu", "cpu"), usd_per_hour("NVIDIA Unheard Of")) == (0, None)


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


def test_describe_is_json_and_counts_the_fake_devices():
    machine = json.loads(json.dumps(hardware.describe()))
    assert (machine["platform"], machine["num_devices"], machine["num_processes"]) == ("cpu", 8, 1)
    assert machine["versions"]["numpy"] == np.__version__
    assert 1 <= machine["cpu_cores"] <= 4096 and 2**28 < machine["memory_bytes"] < 2**50


@pytest.mark.parametrize("script, told", [("echo 570.86.15", "570.86.15"), ("exit 6", None)])
def test_the_driver_comes_from_nvidia_smi(tmp_path, monkeypatch, script, told):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_driver() == told


@pytest.mark.parametrize("quota, cpus", [("100000", 1), ("50000", 1), ("-1", hardware.cpu_cores())])
def test_usable_cpus_follow_the_containers_quota(tmp_path, quota, cpus):
    assert hardware.usable_cpus(tmp_path) == hardware.cpu_cores()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert hardware.usable_cpus(tmp_path) == cpus  # cgroups version 1
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu.max").write_text(f"{quota.replace('-1', 'max')} 100000\n")
    assert hardware.usable_cpus(tmp_path) == cpus  # and 2
