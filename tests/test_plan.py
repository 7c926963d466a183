"""The plan of a run: its numbers by hand, and bad questions refused."""

import re
from functools import partial

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError
from nanochat_jax.hardware import find_accelerator
from nanochat_jax.plan import collective_secs, later_tokens, most_gpus, plan, stage_costs, step_on
from nanochat_jax.train.metrics import format_secs

PARAMS = 560_988_160  # d20
FLOPS_PER_TOKEN = 3_491_758_080
TABLES = 2 * 65_536 * 1280  # embedding and head: two moments, Muon's matrices one
STATE = 4 * PARAMS, 4 * (PARAMS + TABLES)  # masters, moments
LOGITS = 3 * 4 * 8_192 * 65_536
MUON_FLOPS = 20 * (4 * 30 + 2 * 90) * 1280**3  # c_q, c_k, c_v, c_proj 5 (4 + 2) d^3, d x 4d 5 * 18
QUESTION = {"gpu": "H100", "num_gpus": 8, "mfu": 0.5, "network": "infiniband"}


def load(name: str = "d20.py", **overrides: str):
    return cfg.load(cfg.CONFIGS / name, {k.replace("__", "."): v for k, v in overrides.items()})


def resolved(name: str = "d20.py", **overrides: str):
    config = load(name, **overrides)
    recipe.resolve(config, platform="gpu", num_devices=8)
    return config


def steps_of(network: str = "infiniband", gpu: str = "H100", **overrides: str):
    """Number of GPUs -> Step of d20."""
    return partial(step_on, resolved(**overrides), find_accelerator(gpu), mfu=0.5, network=network)


@pytest.mark.parametrize(
    "gpu, num_gpus, network, secs",
    [
        ("H100", 1, "infiniband", 0),
        ("H100", 8, "ethernet", 7 / 8 * 1 / 370),  # one node has no network
        ("A100", 8, "infiniband", 7 / 8 * 1 / 230),
        ("H100 PCIe", 8, "infiniband", 7 / 8 * 1 / 20),
        ("H100", 64, "infiniband", 7 / 8 * 1 / 370 + 1 / 8 * 7 / 8 / 50),
        ("H100", 16, "ethernet", 7 / 8 * 1 / 370 + 1 / 8 * 1 / 2 / 1.5625),
    ],
)
def test_a_gigabyte_through_links_and_network(gpu, num_gpus, network, secs):
    got = collective_secs(1e9, num_gpus, find_accelerator(gpu), network)
    assert got == pytest.approx(secs)


def test_a_step_of_d20_on_64_gpus():
    s = steps_of()(64)
    per_byte = 7 / 8 / 370e9 + 1 / 8 * 7 / 8 / 50e9
    terms = {
        "model": 524_288 / 64 * FLOPS_PER_TOKEN / (0.5 * 989e12),
        "muon": 2 / 120 * MUON_FLOPS / (0.6 * 989e12),
        "reduce": 4 * PARAMS * per_byte,
        "gather": 2 * PARAMS * per_byte,
    }
    assert (s.rows, s.share, s.layout) == (256, 4, (4, "none"))
    assert s.terms == pytest.approx(terms)
    assert s.efficiency == pytest.approx(terms["model"] / sum(terms.values()))
    kept = 4 * 2048 * 20 * 17 * 2 * 1280
    assert sum(s.memory.values()) == pytest.approx(sum(STATE) / 64 + 6 * PARAMS + kept + LOGITS)


def test_more_gpus_never_take_longer_never_cost_less_and_stop_paying():
    on = steps_of()
    steps = [on(2**n) for n in range(9)]
    for fewer, more in zip(steps, steps[1:], strict=False):
        assert fewer.secs > more.secs > fewer.secs * fewer.num_gpus / more.num_gpus
        assert more.efficiency < fewer.efficiency <= 1
    assert most_gpus(resolved(), on).num_gpus == 128 and steps[7].efficiency > 0.5
    assert most_gpus(resolved(), steps_of("ethernet")).num_gpus == 16
    assert (on(1024).rows, on(1024).share) == (1024, 1)  # four times the batch


def test_the_layout_that_a_device_has_room_for():
    """d20 on 24 GB: 4 rows keep 10 x 2,560 bytes for each of 8,192 tokens and 20 layers."""
    s = steps_of(gpu="4090")(1)
    kept = 4 * 2_048 * 20 * 10 * 2 * 1_280
    weights_and_gradients = (2 + 4 + 4) * PARAMS  # gradients twice: of all parts, and of this one
    expected = sum(STATE) + weights_and_gradients + kept + LOGITS
    assert (s.layout, s.fits) == ((4, "names"), True)
    assert sum(s.memory.values()) == pytest.approx(expected)
    assert steps_of(gpu="4090", model__remat="none")(1).layout == (2, "none")
    assert not steps_of(gpu="4090", model__depth="40")(1).fits


def test_the_text_has_one_size_one_time_and_one_price_for_one_question():
    text, secs = plan(load(), **QUESTION), 21_400 * steps_of()(8).secs
    assert text.count(format_secs(secs)) == 2 and f"${24 * secs / 3600:,.2f}" in text
    facts = ("11,219,763,200 in 21,400 steps", "560,988,160", "3,491,758,080", "24.1 GB")
    assert all(fact in text for fact in facts)
    text = plan(load(model__depth="80"), **QUESTION | {"gpu": "T4"})  # too large
    assert re.findall(r"\$[\d.]+", text) == ["$0.35"]  # a device's hour, and no other price


def test_costs_of_the_stages():
    """tiny.py by hand: 40 steps of 1,024 tokens, and 5 validations that read 4,096 forward."""
    config = resolved("tiny.py")
    costs = stage_costs(config, "cpu")
    assert costs["base"] == pytest.approx(40 * 1024 + 5 * 4096 / 3)
    assert costs["base_eval"] == pytest.approx(2 * 4096 / 3)
    assert [name for name in costs if "eval" not in name] == ["base", "mid", "sft", "rl"]
    assert later_tokens(config, "rl") == pytest.approx(stage_costs(config, "gpu")["rl_eval"])
    assert later_tokens(config, "rl_eval") == 0


@pytest.mark.parametrize("wrong", [{"gpu": "Voodoo2"}, {"mfu": 1.5}, {"num_gpus": 3}])
def test_bad_questions(wrong):
    with pytest.raises(UserError, match=str(*wrong.values())):
        plan(load(), **QUESTION | wrong)
    with pytest.raises(UserError, match="config.mesh"):
        plan(load(mesh__data="2"), **QUESTION)
