"""The plan of a run: its numbers by hand, and bad questions refused."""

import re
from functools import partial

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError
from nanochat_jax.hardware import Accelerator, find_accelerator
from nanochat_jax.plan import collective_secs, most_gpus, plan, remaining_secs, stage_costs, step_on
from nanochat_jax.train.metrics import format_secs

PARAMS = 560_988_160  # d20
FLOPS_PER_TOKEN = 3_491_758_080
TABLES = 2 * 65_536 * 1280  # embedding and head: two moments, Muon's matrices one
STATE = 4 * PARAMS, 4 * (PARAMS + TABLES)  # masters, moments
LOGITS = 3 * 4 * 8_192 * 65_536
MUON_FLOPS = 20 * (4 * 30 + 2 * 90) * 1280**3  # c_q, c_k, c_v, c_proj 5 (4 + 2) d^3, d x 4d 5 * 18


def card(name: str = "H100") -> Accelerator:
    found = find_accelerator(name)
    assert found
    return found


def resolved(name: str = "d20.py", **overrides):
    config = cfg.load(cfg.CONFIGS / name, {k.replace("__", "."): v for k, v in overrides.items()})
    recipe.resolve(config, platform="gpu", num_devices=8)
    return config


def steps_of(network: str = "infiniband", gpu: str = "H100", **overrides):
    """Number of GPUs -> Step of d20."""
    return partial(step_on, resolved(**overrides), card(gpu), mfu=0.5, network=network)


@pytest.mark.parametrize(
    "gpu, num_gpus, network, secs",
    [
        ("H100", 1, "infiniband", 0),
        ("H100", 8, "ethernet", 7 / 8 * 1 / 370),  # one node has no network
        ("A100", 8, "infiniband", 7 / 8 * 1 / 230),
        ("H100 PCIe", 8, "infiniband", 7 / 8 * 1 / 20),
        ("L4", 8, "infiniband", 7 / 8 * 1 / 20),
        ("H100", 64, "infiniband", 7 / 8 * 1 / 370 + 1 / 8 * 7 / 8 / 50),
        ("H100", 16, "ethernet", 7 / 8 * 1 / 370 + 1 / 8 * 1 / 2 / 1.5625),
    ],
)
def test_a_gigabyte_through_links_and_network(gpu, num_gpus, network, secs):
    assert collective_secs(1e9, num_gpus, card(gpu), network) == pytest.approx(secs)


def test_a_step_of_d20_on_64_gpus():
    s = steps_of()(64)
    assert (s.rows, s.share, s.layout) == (256, 4, (4, "none"))
    assert s.model_secs == pytest.approx(524_288 / 64 * FLOPS_PER_TOKEN / (0.5 * 989e12))
    assert s.muon_secs == pytest.approx(2 / 120 * MUON_FLOPS / (0.6 * 989e12))
    per_byte = 7 / 8 / 370e9 + 1 / 8 * 7 / 8 / 50e9
    assert s.reduce_secs == pytest.approx(4 * PARAMS * per_byte)
    assert s.gather_secs == pytest.approx(2 * PARAMS * per_byte)
    kept = 4 * 2048 * 20 * 17 * 2 * 1280
    assert sum(s.memory.values()) == pytest.approx(sum(STATE) / 64 + 6 * PARAMS + kept + LOGITS)
    total = s.model_secs + s.muon_secs + 6 * PARAMS * per_byte
    assert s.efficiency == pytest.approx(s.model_secs / total)


def test_more_gpus_never_take_longer_never_cost_less_and_stop_paying():
    on = steps_of()
    steps = [on(2**n) for n in range(9)]
    for fewer, more in zip(steps, steps[1:], strict=False):
        assert more.secs < fewer.secs
        assert more.num_gpus * more.secs > fewer.num_gpus * fewer.secs
        assert more.efficiency < fewer.efficiency <= 1
    assert most_gpus(resolved(), on).num_gpus == 128 and steps[7].efficiency > 0.5
    assert most_gpus(resolved(), steps_of("ethernet")).num_gpus == 16
    assert (on(1024).rows, on(1024).share) == (1024, 1)  # four times the batch


def test_the_layout_that_a_device_has_room_for():
    """d20 on 24 GB: 4 rows keep 10 x 2,560 bytes for each of 8,192 tokens and 20 layers."""
    s = steps_of(gpu="4090")(1)
    gathered, grads, those_of_a_part = 2 * PARAMS, 4 * PARAMS, 4 * PARAMS
    kept = 4 * 2_048 * 20 * 10 * 2 * 1_280
    expected = sum(STATE) + gathered + grads + those_of_a_part + kept + LOGITS
    assert (s.layout, s.fits) == ((4, "names"), True)
    assert sum(s.memory.values()) == pytest.approx(expected)
    assert steps_of(gpu="4090", model__remat="none")(1).layout == (2, "none")
    assert not steps_of(gpu="4090", model__depth="40")(1).fits


def test_the_text_has_one_size_one_time_and_one_price_for_one_question():
    question = {"gpu": "H100", "num_gpus": 8, "mfu": 0.5, "network": "infiniband"}
    text = plan(cfg.load(cfg.CONFIGS / "d20.py"), **question)
    step = steps_of()(8)
    secs = 21_400 * step.secs
    assert text.count(format_secs(secs)) == 2 and f"${24 * secs / 3600:,.2f}" in text
    for expected in ("11,219,763,200 in 21,400 steps", "560,988,160", "3,491,758,080", "24.1 GB"):
        assert expected in text
    too_large = cfg.load(cfg.CONFIGS / "d20.py", {"model.depth": "80"})
    text = plan(too_large, **question | {"gpu": "T4"})
    assert re.findall(r"\$[\d.]+", text) == ["$0.35"]  # a device's hour, and no other price


def test_costs_of_the_stages():
    """tiny.py by hand: 40 steps of 1,024 tokens, and 5 validations that read 4,096 forward."""
    config = resolved("tiny.py")
    costs = stage_costs(config, "cpu")
    assert costs["base"] == pytest.approx(40 * 1024 + 5 * 4096 / 3)
    assert costs["base_eval"] == pytest.approx(2 * 4096 / 3)
    assert [name for name in costs if "eval" not in name] == ["base", "mid", "sft", "rl"]
    assert remaining_secs(config, "rl", 2.0, "cpu") == pytest.approx(2 * costs["rl_eval"])
    assert remaining_secs(config, "rl_eval", 2.0, "cpu") == 0
    assert "mid" not in stage_costs(resolved("gpt2.py"), "gpu")


def test_bad_questions():
    question = {"gpu": "H100", "num_gpus": 8, "mfu": 0.5, "network": "infiniband"}
    for wrong in ({"gpu": "Voodoo2"}, {"mfu": 1.5}, {"num_gpus": 3}):
        with pytest.raises(UserError, match=str(*wrong.values())):
            plan(cfg.load(cfg.CONFIGS / "d20.py"), **question | wrong)
    with pytest.raises(UserError, match="config.mesh"):
        plan(cfg.load(cfg.CONFIGS / "d20.py", {"mesh.data": "2"}), **question)
