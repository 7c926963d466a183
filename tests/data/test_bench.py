"""The benchmark of the loader says what it measured, on one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_bench_data_prints_one_line_of_numbers(corpus_paths, packing):
    settings = {"shard": corpus_paths[0], "packing": packing, "seq-len": 64, "batch-rows": 4}
    settings |= {"vocab-size": 300, "tokens": 50_000, "buffer-docs": 20}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_data.py")]
        + [f"--{key}={value}" for key, value in settings.items()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == 50_000 // 256 * 256
    assert result["tokens_per_sec"] == pytest.approx(
        result["tokens"] / result["wall_secs"], rel=0.02
    )
    assert result["tokens_per_core_sec"] == pytest.approx(
        result["tokens"] / result["cpu_secs"], rel=0.1
    )
    assert (result["cropped_frac"] > 0) == (packing == "best_fit")
    for name, gpu in (("d20", 184_000), ("gpt2", 123_000)):
        sums = result["eaten"][name]
        assert sums["tokens_per_sec"] == pytest.approx(8 * gpu, rel=0.01)
        assert sums["times_a_gpu"] * gpu == pytest.approx(result["tokens_per_core_sec"], rel=0.1)
        assert sums["times_a_gpu"] * sums["cores_for_all"] == pytest.approx(8, rel=0.2)
        assert f"\n{name}: 8 H100s eat " in "\n" + done.stdout
    per_token = result["encoded_tokens_per_core_sec"] / result["tokens_per_core_sec"]
    assert per_token == pytest.approx(1 / (1 - result["cropped_frac"]), rel=0.01)
