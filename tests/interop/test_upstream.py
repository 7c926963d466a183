"""Upstream's names and ours: every weight of both generations, there and back."""

import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.interop.upstream import (
    our_path,
    params_from_upstream,
    params_to_upstream,
    upstream_name,
)
from nanochat_jax.model.gpt import GPTConfig, param_shapes


@pytest.mark.parametrize("generation", ["classic", "modern"])
def test_a_state_dict_comes_back_bit_for_bit(goldens, generation):
    with np.load(goldens / f"{generation}.npz") as arrays:
        state = {k.removeprefix("state/"): arrays[k] for k in arrays if k.startswith("state/")}
    params = params_from_upstream(state)
    back = params_to_upstream(params)
    assert list(back) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    np.testing.assert_array_equal(
        params["blocks.1.mlp.c_fc.kernel"], state["transformer.h.1.mlp.c_fc.weight"].T
    )
    np.testing.assert_array_equal(params["wte.table"], state["transformer.wte.weight"])


@pytest.mark.parametrize("extras", [False, True])
def test_every_parameter_of_ours_has_a_name_there(extras):
    config = GPTConfig(
        vocab_size=64,
        num_layers=12,
        model_dim=24,
        num_heads=2,
        num_kv_heads=1,
        seq_len=8,
        extras=extras,
    )
    for path in param_shapes(config):
        name, transposed = upstream_name(path)
        assert our_path(name) == (path, transposed)
        assert transposed == path.endswith("kernel")


def test_layers_keep_their_numbers():
    assert our_path("transformer.h.11.attn.ve_gate.weight") == (
        "blocks.11.attn.ve_gate.kernel",
        True,
    )
    assert upstream_name("value_embeds.0.table") == ("value_embeds.0.weight", False)
    assert our_path("resid_lambdas") == ("resid_lambdas", False)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.c_q.bias",
        "transformer.h.x.attn.c_q.weight",
        "transformer.h.01.attn.c_q.weight",
        "transformer_h.0.attn.c_q.weight",
        "_orig_mod.lm_head.weight",
        "lm_head.weight.",
        "blocks.0.attn.c_q.kernel",
        "cos",
        "",
    ],
)
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(UserError, match="expected a name of upstream"):
        params_from_upstream({name: np.zeros(1)})


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(UserError, match=r"got the parameter 'blocks.0.attn.c_q.bias'"):
        params_to_upstream({"blocks.0.attn.c_q.bias": np.zeros(1)})
