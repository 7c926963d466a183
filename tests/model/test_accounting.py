"""The closed forms against the parameters, the program and the optimizer they speak of."""

from collections import Counter
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import accounting
from nanochat_jax.model.gpt import SMEAR_GATE_DIM, GPTConfig, bind, param_shapes
from nanochat_jax.optim.build import label
from tests.model.programs import equations
from tests.train.test_step import optimizer

CLASSIC = GPTConfig(
    vocab_size=500, num_layers=2, model_dim=48, num_heads=4, num_kv_heads=4, seq_len=40
)
MODERN = replace(CLASSIC, extras=True, window_pattern="SSL", num_kv_heads=2)
CONFIGS = [
    CLASSIC,
    replace(CLASSIC, num_layers=1, num_heads=6, num_kv_heads=1, vocab_size=512),
    replace(CLASSIC, num_layers=7, num_kv_heads=2),
    MODERN,
    replace(MODERN, num_layers=1),
    replace(MODERN, num_layers=5, num_kv_heads=4, vocab_size=64),
    replace(MODERN, num_layers=4, num_heads=8, num_kv_heads=1),
]
D20 = GPTConfig(
    vocab_size=65_536, num_layers=20, model_dim=1_280, num_heads=10, num_kv_heads=10, seq_len=2_048
)
COUNTED_AS = {"embed": "wte", "unembed": "lm_head", "muon": "transformer_matrices"}
COUNTED_AS |= {"value_embeds": "value_embeds"}


@pytest.mark.parametrize("config", CONFIGS)
def test_counts_are_those_of_the_parameters(config):
    sizes = {path: leaf.size for path, leaf in param_shapes(config).items()}
    by_group = Counter()
    for path, size in sizes.items():
        by_group[COUNTED_AS.get(label(path), "scalars")] += size
    counts = accounting.param_counts(config)
    assert counts == {name: by_group[name] for name in counts if name != "total"} | {
        "total": sum(sizes.values())
    }
    kernels = [size for path, size in sizes.items() if path.endswith("kernel")]
    assert accounting.matmul_params(config) == sum(kernels)


def test_d20_is_the_published_size():
    assert accounting.param_counts(D20)["total"] == 560_988_160


def matmul_flops(jaxpr) -> int:
    """FLOPs of every matmul in a traced program, calls within it included."""
    total = 0
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * prod(eqn.outvars[0].aval.shape) * prod(shape[d] for d in contracting)
    return total


@pytest.mark.parametrize("config", [CLASSIC, replace(MODERN, window_pattern="L")])
def test_flops_are_those_of_the_traced_forward_pass(config):
    """Attention is counted without the causal half, training as three forward passes."""
    ids = jax.ShapeDtypeStruct((1, config.seq_len), jnp.int32)
    traced = jax.make_jaxpr(lambda p, ids: bind(config, p)(ids))(param_shapes(config), ids)
    flops = matmul_flops(traced.jaxpr)
    flops += 2 * SMEAR_GATE_DIM * config.extras  # which the first position has no use for
    assert accounting.train_flops_per_token(config) * config.seq_len == 3 * flops
    assert accounting.decode_flops(config, config.seq_len) * config.seq_len == flops


@pytest.mark.parametrize("config", [CLASSIC, MODERN])
def test_bytes_of_the_state_are_those_of_its_leaves(config):
    shapes = param_shapes(config)
    tx = optimizer(config)
    like_a_parameter = {leaf.shape for leaf in shapes.values()}
    kept = [
        4 * np.prod(leaf.shape, dtype=int)
        for leaf in jax.tree.leaves(jax.eval_shape(tx.init, shapes))
        if leaf.shape in like_a_parameter
    ]
    total = accounting.param_counts(config)["total"]
    expected = {"params": 4 * total, "grads": 4 * total, "optimizer": sum(kept)}
    assert accounting.state_bytes(config) == expected
