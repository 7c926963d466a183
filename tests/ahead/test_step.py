"""Plans by compiling: refused clearly without the compiler, true to the run where it is there."""

import importlib.util
import os
import subprocess
import sys

import pytest

from nanochat_jax import config as cfg
from nanochat_jax.ahead import gpus
from nanochat_jax.ahead.gpus import GPUS, absent_gpus
from nanochat_jax.common import UserError
from nanochat_jax.hardware import find_accelerator

HAS_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs the packages of the extra gpu")


@pytest.mark.parametrize("name", GPUS)
def test_a_described_gpu_is_the_one_that_the_prices_know(name):
    """Memory and bandwidth agree with the datasheet's, which is rounded."""
    ours, sheet = GPUS[name], find_accelerator(name)
    assert sheet
    assert ours["device_memory_size"] == pytest.approx(sheet.memory_bytes, rel=0.08)
    assert ours["memory_bandwidth"] == pytest.approx(sheet.bandwidth, rel=0.01)


@pytest.mark.parametrize("name, count, word", [("TPU", 1, "h100"), ("h100", 12, "multiple of 8")])
def test_what_cannot_be_compiled_for_is_refused(name, count, word):
    with pytest.raises(UserError, match=word), absent_gpus(name, count):
        pass


def test_without_the_compiler_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install"), absent_gpus("h100", 1):
        pass


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("gpu, num_gpus", [("h100", 2), ("b200", 1), ("a100", 1), ("4090", 1)])
def test_a_small_run_is_compiled(gpu, num_gpus):
    script = cfg.CONFIGS.parent / "scripts" / "plan.py"
    command = [sys.executable, script, f"--config={cfg.CONFIGS / 'tiny.py'}", "--compile"]
    command += [f"--gpu={gpu}", f"--gpus={num_gpus}"]
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<- taken" in done.stdout and "products bf16" in done.stdout
    assert ("all-gather" in done.stdout) == (num_gpus > 1)
