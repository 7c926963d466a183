"""The plan of a run: its numbers by hand, and bad questions refused."""

import jax
import pytest

from nanochat_jax import config as cfg
from nanochat_jax.common import UserError
from nanochat_jax.plan import plan


def planned(name: str, gpu="H100", num_gpus=8, mfu=0.5, compile_step=False, **overrides) -> str:
    keys = {k.replace("__", "."): str(v) for k, v in overrides.items()}
    config = cfg.load(cfg.CONFIGS / name, keys)
    return plan(config, gpu=gpu, num_gpus=num_gpus, mfu=mfu, compile_step=compile_step)


def test_d20_on_eight_h100s():
    text = planned("d20.py")
    for expected in (
        "560,988,160 parameters",
        "3,491,758,080",  # FLOPs per token
        "11,219,763,200 in 21,400 steps",
        "240 of fineweb_edu = 60.0B characters: enough",
        "24.1 GB",  # 241 shards of 100 MB
        "256 rows: 32 a device at once, 1 in turn",
        "2h45m",  # 11.2e9 * 3.49e9 / (8 * 989e12 / 2) seconds
        "$66.02",
    ):
        assert expected in text, f"{expected} in\n{text}"


def test_fewer_gpus_take_longer_and_cost_the_same():
    text = planned("d20.py", num_gpus=1)
    assert "16 a device at once, 16 in turn" in text
    assert "22h00m" in text and "$66.02" in text


def test_too_little_text_is_told():
    assert "epochs; one would take" in planned("d20.py", data__num_shards=100)


def test_memory_of_the_compiled_step():
    overrides = {"base__num_steps": 1, "base__total_batch_tokens": 1024}
    with jax.numpy_dtype_promotion("standard"):  # JAX's own bfloat16 attention counts on it
        text = planned("tiny.py", num_gpus=8, compile_step=True, **overrides)
    line = next(line for line in text.splitlines() if "CPU compiler" in line)
    assert 0 < float(line.split()[2]) + 0.1 < 1 and "whole step" in line


def test_the_layout_that_a_device_has_room_for():
    """d20 on 24 GB: 4 rows keep 10 x 2,560 bytes for each of 8,192 tokens and 20 layers."""
    text = planned("d20.py", gpu="4090", num_gpus=1)
    values = 4 * 2_048 * 20 * 10 * 2 * 1_280
    params, tables = 560_988_160, 2 * 65_536 * 1_280
    moments = 4 * (params + tables)  # one for Muon's matrices, two for embedding and head
    gathered, grads, those_of_a_part = 2 * params, 4 * params, 4 * params
    logits = 3 * 4 * 8_192 * 65_536
    size = 4 * params + moments + gathered + grads + those_of_a_part + values + logits
    assert f"{size / 2**30:.1f} GiB: 4 rows at once, remat names" in text
    assert "256 rows: 4 a device at once, 64 in turn" in text
    assert "too little" not in text
    given = planned("d20.py", gpu="4090", num_gpus=1, model__remat="none")
    assert "2 rows at once, remat none" in given
    assert "GiB: too little" in planned("d20.py", gpu="4090", num_gpus=1, model__depth=40)


def test_bad_questions():
    with pytest.raises(UserError, match="--gpu got 'Voodoo2', expected one of: .*h100"):
        planned("d20.py", gpu="Voodoo2")
    with pytest.raises(UserError, match="--mfu got 1.5"):
        planned("d20.py", mfu=1.5)
    with pytest.raises(UserError, match="expected a multiple of 3 row shards"):
        planned("d20.py", num_gpus=3)
