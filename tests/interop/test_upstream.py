"""Upstream's names and ours, for every weight of both generations."""

import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.interop.upstream import NAMES, our_path, params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, param_shapes


@pytest.mark.parametrize("generation", ["classic", "modern"])
def test_every_weight_of_a_state_dict_arrives_in_our_layout(goldens, generation):
    with np.load(goldens / f"{generation}.npz") as arrays:
        state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    params = params_from_upstream(state)
    assert len(params) == len(state)
    for name, value in state.items():
        is_linear = value.ndim == 2 and "wte" not in name and "value_embeds" not in name
        np.testing.assert_array_equal(params[our_path(name)], value.T if is_linear else value)
    np.testing.assert_array_equal(
        params["blocks.1.mlp.c_fc.kernel"], state["transformer.h.1.mlp.c_fc.weight"].T
    )


@pytest.mark.parametrize("extras", [False, True])
def test_every_parameter_of_ours_has_a_name_there(extras):
    config = GPTConfig(64, 12, 24, 2, 1, 8, extras=extras)
    named = {our_path(name.replace("{i}", str(i))) for name in NAMES for i in range(12)}
    assert param_shapes(config).keys() <= named


@pytest.mark.parametrize(
    "name", ["transformer.h.01.attn.c_q.weight", "_orig_mod.lm_head.weight", "lm_head.weight.", ""]
)
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(UserError):
        params_from_upstream({name: np.zeros(1)})
