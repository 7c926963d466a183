"""What more GPUs bring: each term of a step by hand, and where it stops paying."""

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError
from nanochat_jax.hardware import ACCELERATORS, Accelerator, find_accelerator
from nanochat_jax.plan import plan
from nanochat_jax.plan_scale import (
    NVLINK,
    collective_secs,
    link_bytes_per_sec,
    most_gpus,
    muon_flops,
    step_on,
)

PARAMS = 560_988_160  # d20
FLOPS_PER_TOKEN = 3_491_758_080
MATRICES = 20 * 6
KIND = {"device_batch_size": 32, "mfu": 0.5, "network": "infiniband"}


def h100() -> Accelerator:
    card = find_accelerator("H100")
    assert card
    return card


def gpt(name: str = "d20.py"):
    config = cfg.load(cfg.CONFIGS / name)
    recipe.resolve(config, platform="gpu", num_devices=8)
    return recipe.gpt_config(config)


def test_muon_flops():
    # Square c_q, c_k, c_v, c_proj: 5 (4 + 2) d^3 each; two of d x 4d: 5 (16 + 2) d^3 each.
    assert muon_flops(gpt()) == 20 * (4 * 30 + 2 * 90) * 1280**3  # 12.6 TFLOP


@pytest.mark.parametrize(
    "num_gpus, network, secs",
    [
        (1, "infiniband", 0),
        (8, "infiniband", 7 / 8 * 1 / 370),
        (8, "ethernet", 7 / 8 * 1 / 370),  # one node has no network
        (64, "infiniband", 7 / 8 * 1 / 370 + 1 / 8 * 7 / 8 / 50),
        (1024, "infiniband", 7 / 8 * 1 / 370 + 1 / 8 * 127 / 128 / 50),
        (16, "ethernet", 7 / 8 * 1 / 370 + 1 / 8 * 1 / 2 / 1.5625),
    ],
)
def test_a_gigabyte_through_nvlink_and_network(num_gpus, network, secs):
    assert collective_secs(1e9, num_gpus, h100(), network) == pytest.approx(secs)


def test_links():
    assert all(any((name,) == row.words for row in ACCELERATORS) for name in NVLINK)
    rates = [link_bytes_per_sec(find_accelerator(n)) for n in ("H100", "H100 PCIe", "A100", "L4")]
    assert rates == [370e9, 20e9, 230e9, 20e9]


def test_a_step_of_d20_on_64_gpus():
    s = step_on(gpt(), h100(), 64, batch_rows=256, **KIND)
    assert (s.rows, s.parts) == (4, 1)
    assert s.model_secs == pytest.approx(524_288 / 64 * FLOPS_PER_TOKEN / (0.5 * 989e12))
    assert s.muon_secs == pytest.approx(2 / MATRICES * 12.582912e12 / (0.6 * 989e12))
    per_byte = 7 / 8 / 370e9 + 1 / 8 * 7 / 8 / 50e9
    assert s.reduce_secs == pytest.approx(4 * PARAMS * per_byte)
    assert s.gather_secs == pytest.approx(2 * PARAMS * per_byte)
    adam = 2 * 65_536 * 1280  # embedding and head: two moments, matrices one
    state = 4 * PARAMS + 4 * (2 * adam + PARAMS - adam)
    activations = 4 * 2048 * 20 * 17 * 2 * 1280
    assert s.memory_bytes == pytest.approx(state / 64 + (2 + 4) * PARAMS + activations)
    total = s.model_secs + s.muon_secs + 6 * PARAMS * per_byte
    assert s.efficiency == pytest.approx(s.model_secs / total)
    # All communication fits behind the one part's 58 ms.
    assert s.overlapped_efficiency == pytest.approx(s.model_secs / (s.model_secs + s.muon_secs))


def test_more_gpus_never_take_longer_and_never_cost_less():
    steps = [step_on(gpt(), h100(), 2**n, batch_rows=256, **KIND) for n in range(9)]
    for fewer, more in zip(steps, steps[1:], strict=False):
        assert more.secs < fewer.secs
        assert more.num_gpus * more.secs > fewer.num_gpus * fewer.secs
        assert more.efficiency < fewer.efficiency <= fewer.overlapped_efficiency <= 1


def test_where_it_stops():
    half, last = most_gpus(gpt(), h100(), batch_rows=256, **KIND)
    assert (half.num_gpus, last.num_gpus, last.rows) == (128, 256, 1)
    assert half.efficiency >= 0.5 > last.efficiency
    slow, _ = most_gpus(gpt(), h100(), batch_rows=256, **(KIND | {"network": "ethernet"}))
    assert slow.num_gpus < half.num_gpus


def test_the_plan_tells_it():
    config = cfg.load(cfg.CONFIGS / "d20.py")
    text = plan(config, gpu="H100", num_gpus=8, mfu=0.5, compile_step=False)
    assert "128 GPUs: 64% useful, 35% communication" in text
    assert "256 GPUs: 47% useful; more need a larger batch" in text
    thousand = next(line for line in text.splitlines() if line.lstrip().startswith("1,024 GPUs"))
    assert "batch x 4" in thousand and thousand.split()[2] == "1"
    with pytest.raises(UserError, match="--network got 'pigeons', expected one of: infiniband"):
        plan(config, gpu="H100", num_gpus=8, mfu=0.5, compile_step=False, network="pigeons")
