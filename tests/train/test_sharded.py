"""Two forms of the same numbers: nothing lost, everything where it should be."""

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import OWNERS, make_mesh, param_shardings
from nanochat_jax.train.sharded import Owners
from tests.train.test_step import optimizer

CONFIG = GPTConfig(
    vocab_size=100, num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2, seq_len=8, extras=True
)


def random_params() -> dict[str, np.ndarray]:
    rng, shapes = np.random.default_rng(0), param_shapes(CONFIG)
    return {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (3, 1, 1)])
def test_there_and_back_is_the_identity(layout):
    data, fsdp, tensor = layout
    devices = jax.devices()[: data * fsdp * tensor]
    mesh, params = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices), random_params()
    owners = Owners(CONFIG, mesh)
    owned = owners.to_owned(params)
    for again in (owners.to_paths(owned), owners.by_path(owned)):
        assert list(again) == list(params)
        for path, value in params.items():
            np.testing.assert_array_equal(again[path], value, err_msg=path)
    for path, sharding in param_shardings(mesh, param_shapes(CONFIG)).items():
        assert owners.by_path(owned)[path].sharding.is_equivalent_to(sharding, params[path].ndim)

    # A matrix lies whole on one device, a table's rows are dealt out, scalars are everywhere.
    squares = [v for p, v in params.items() if p.startswith("blocks.") and v.shape == (24, 24)]
    stack = np.asarray(owned["blocks.24x24"])
    np.testing.assert_array_equal(stack[: len(squares)], squares)
    assert len(stack) % mesh.size == 0 and not stack[len(squares) :].any()
    share = owned["blocks.24x24"].addressable_shards[-1].data
    assert share.shape == (len(stack) // mesh.size, 24, 24)
    assert owned["wte.table"].sharding.spec == OWNERS
    assert owned["resid_lambdas"].sharding.is_fully_replicated


def test_an_optimizer_state_changes_form_like_its_parameters():
    """The state born owned is the owned form of the state born by path."""
    mesh, params = make_mesh(data=4, fsdp=2), random_params()
    owners, tx = Owners(CONFIG, mesh), optimizer(CONFIG)

    @jax.jit
    def one_step(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(params, tx.init(params), params)[1]

    by_path, owned = one_step(params), one_step(owners.to_owned(params))
    again = owners.to_paths(owned)
    assert jax.tree.structure(again) == jax.tree.structure(by_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, by_path)
    shapes = jax.tree.map(lambda leaf: leaf.shape, owners.on_disk(owned))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, by_path)
