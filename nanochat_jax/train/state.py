"""Everything a training run carries from step to step, born in its final place on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.gpt import GPTConfig, init_params, param_shapes
from nanochat_jax.model.sharding import like_params, param_shardings


class TrainState(NamedTuple):
    """Leaves are arrays, or their shapes or shardings where a function says so."""

    step: Any  # [] int32, updates done
    params: dict[str, Any]  # float32 masters by dotted path
    opt_state: Any
    key: Any  # [2] uint32, raw key for stages that sample


def state_shardings(config: GPTConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState whose leaves are shardings."""
    shapes = param_shapes(config)
    params = param_shardings(mesh, shapes)
    everywhere = NamedSharding(mesh, P())
    opt_state = like_params(jax.eval_shape(tx.init, shapes), params, shapes, mesh)
    return TrainState(everywhere, params, opt_state, everywhere)


def abstract_state(config: GPTConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState of shapes with shardings: what restoring and ahead-of-time compiling need."""
    shapes = jax.eval_shape(lambda: _create(config, tx, 0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, tx, mesh),
    )


def create_state(
    config: GPTConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Initialise on the mesh: no device ever holds more than its share."""
    shardings = state_shardings(config, tx, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(lambda: _create(config, tx, seed), out_shardings=shardings)()


def _create(config: GPTConfig, tx: optax.GradientTransformation, seed: int) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key_data(run_key))
