"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.model.gpt import init_params
from nanochat_jax.train.sharded import Owners


class TrainState(NamedTuple):
    """Arrays, or their shapes or shardings where a function says so; params and opt_state are in
    the owned form in a step, by path in a checkpoint (train/sharded.py)."""

    step: Any  # [] int32, updates done
    params: dict[str, Any]  # float32 masters
    opt_state: Any
    key: Any  # [2] uint32, raw key for stages that sample


def abstract_state(owners: Owners, tx: optax.GradientTransformation) -> TrainState:
    """The owned state as shapes with shardings: for compiling before there is one."""
    shapes = jax.eval_shape(lambda: _create(owners, tx, 0))
    return jax.tree.map(lambda a, s: a.update(sharding=s), shapes, owners.shardings(shapes))


def create_state(owners: Owners, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, made on the mesh: no device ever holds more than its share."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(owners, tx))
    with jax.set_mesh(owners.mesh):
        return jax.jit(lambda: _create(owners, tx, seed), out_shardings=places)()


def _create(owners: Owners, tx: optax.GradientTransformation, seed: int) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = owners.owned(init_params(owners.config, init_key))
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key_data(run_key))
