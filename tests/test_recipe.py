"""Deriving a run from its recipe. Parameter counts, horizons and schedules for all depths are
compared with upstream's tables in tests/parity; here are the rules around them."""

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError


def resolved(name: str, platform: str = "cpu", num_devices: int = 1, **overrides):
    keys = {k.replace("__", "."): str(v) for k, v in overrides.items()}
    config = cfg.load(cfg.CONFIGS / name, keys)
    return config, recipe.resolve(config, platform=platform, num_devices=num_devices)


def test_what_was_derived_is_told_and_what_was_given_is_kept():
    config, derived = resolved("d20.py", model__num_heads=20)
    told = {d.key: d.text for d in derived}
    assert config.model.num_heads == 20 and "model.num_heads" not in told
    assert told["model.model_dim"] == "1,280" and config.model.model_dim == 20 * 64
    # 20 tokens for each of 560,988,160 parameters, 2^19 a step.
    assert config.base.num_steps == 20 * 560_988_160 // 2**19
    assert recipe.resolve(config, platform="cpu", num_devices=1) == []


def test_the_machine_decides_precision_and_mesh():
    on_cpu, _ = resolved("d20.py")
    on_gpus, _ = resolved("d20.py", platform="gpu", num_devices=8, mesh__fsdp=2)
    assert (on_cpu.model.compute_dtype, on_gpus.model.compute_dtype) == ("float32", "bfloat16")
    assert (on_cpu.mesh.data, on_gpus.mesh.data) == (1, 4)


def test_batches_come_out_even_or_not_at_all():
    config, _ = resolved("d20.py", base__total_batch_tokens=2048 * 96)
    assert recipe.rows_per_step(config, 8) == 96
    config.base.total_batch_tokens = 2048 * 90
    with pytest.raises(UserError, match="config.base.total_batch_tokens got 184320"):
        recipe.rows_per_step(config, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_heads", 7),
        ("model.window_pattern", "SX"),
        ("model.window_pattern", ""),
        ("model.remat", "some"),
        ("model.fp8_layers", "('mlp', 'gates')"),
        ("base.horizon_params", "most"),
        ("base.num_steps", 0),
        ("rl.num_steps", -1),
        ("eval.device_batch_size", 0),
        ("model.extras", True),  # the classic optimizer has no settings for them
        ("rl.pass_rows", 3),
        ("rl.temperature", 0.0),
        ("eval.chat_tasks", "('gsm8k test', 1)"),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(UserError, match=key.split(".")[1]):
        config, _ = resolved("d20.py", **{key.replace(".", "__"): value})
        recipe.gpt_config(config)
        recipe.optim_config(config, "cpu")


@pytest.mark.parametrize(("name", "unembed"), [("d20.py", 0.004), ("gpt2.py", 0.008)])
def test_stages_after_base_have_learning_rates_of_their_own(name, unembed):
    """Upstream scales by the batch in pretraining only, and RL keeps the head's classic rate."""
    config, _ = resolved(name, base__total_batch_tokens=2**21)
    base = recipe.optim_config(config, "cpu")
    scale = 2.0 if name == "gpt2.py" else 1.0  # sqrt(2^21 / 2^19), modern only
    assert (base.lr_scale, base.unembed_lr) == (scale, unembed)
    for stage, rate in (("sft", unembed), ("rl", 0.004)):
        own = {key: config[stage][key] for key in ("embed_lr", "unembed_lr")}
        lrs = recipe.optim_config(config, "cpu", **own, lr_frac=0.5)
        assert (lrs.lr_scale, lrs.unembed_lr, lrs.matrix_lr) == (1.0, rate / 2, 0.01)


def test_changes_of_a_recipe_are_named():
    before = {"base.num_steps": 5, "mesh.data": 1, "eval.prompts": ["a"], "data.num_workers": 1}
    now = {"base.num_steps": 5, "mesh.data": 8, "eval.prompts": ("a",)}  # and a removed key
    recipe.refuse_changes(before, now, ("mesh.",), "the run")
    for changed, named in ((now, "mesh.data was 1, now 8"), (before | {"new": 2}, "config.new")):
        with pytest.raises(UserError, match=named):
            recipe.refuse_changes(before, changed, ("eval.",), "the run")
