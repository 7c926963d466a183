"""What every stage does before its first step: the self-test of attention, and refusals."""

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.config import CONFIGS, load
from nanochat_jax.model import attention_check
from nanochat_jax.stages import same as stages_same
from nanochat_jax.stages import train as stages_train


def start(**overrides):
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return stages_train.start(load(CONFIGS / "tiny.py", {"run.name": "start", **keys}))


def test_the_attention_that_passed_is_the_model_s(capsys, monkeypatch):
    assert start().model.attention_backend == "blocked"
    assert start(model__attention="xla").model.attention_backend == "xla"
    monkeypatch.setattr(attention_check, "candidates", lambda: ("cudnn", "xla"))
    capsys.readouterr()
    assert start().model.attention_backend == "xla"
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("attention: ")]
    assert "; not cudnn: attention backend cudnn needs an NVIDIA GPU" in line


def test_mistakes_are_told_before_anything_is_done():
    with pytest.raises(UserError, match="config.run.profile got '5', expected first:last"):
        start(run__profile="5")
    with pytest.raises(UserError, match="config.model.attention=cudnn failed its self-test"):
        start(model__attention="cudnn")


def test_a_run_may_be_continued_with_another_of_both():
    for key in ("run.profile", "model.attention"):
        assert key.startswith(stages_same.MAY_CHANGE)
