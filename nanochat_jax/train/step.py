"""One optimizer step: the only jitted function of the training loop.

  batch [R, T] -> A microbatches -> sum of gradients / trained tokens of the whole batch -> update

The loss is weighted by trained tokens over the global batch, so no split into microbatches or
devices changes it, and a row without targets is harmless. When a loss, gradient or update is not
finite the state stays as it was and metrics["finite"] says so: the loop stops with nothing lost,
without a check per step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.loss import cross_entropy_sum
from nanochat_jax.model.sharding import ROWS, num_row_shards
from nanochat_jax.train.state import TrainState, state_shardings

Batch = dict[str, jax.Array]  # inputs, targets: int32 [R, T]; target -1 = not trained


def make_train_step(
    config: GPTConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    device_batch_size: int,
    tile_tokens: int,
    grad_clip: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted (state, batch) -> (state, metrics); the state given is consumed (donated).

    device_batch_size: rows one row shard works on at once; the rest of a batch is accumulated.
    metrics: loss (before the update), grad_norm, update_norm, tokens (trained ones), finite.
    """
    shards = num_row_shards(mesh)
    tile = loss_tile(tile_tokens, device_batch_size, config.seq_len)

    def loss_fn(params, micro: Batch, scale: jax.Array) -> jax.Array:
        hidden = bind(config, params).hidden(micro["inputs"])
        weights = jnp.broadcast_to(scale, micro["targets"].shape)
        head = params["lm_head.kernel"]
        return cross_entropy_sum(hidden, head, micro["targets"], weights, config.vocab_size, tile)

    def train_step(state: TrainState, batch: Batch):
        tokens = jnp.sum(batch["targets"] >= 0)
        scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        gradient = jax.value_and_grad(loss_fn)
        rows = batch["targets"].shape[0]
        num_micro = max(1, rows // (shards * device_batch_size))
        if num_micro == 1:
            loss, grads = gradient(state.params, batch, scale)
        else:
            micros = jax.tree.map(lambda a: _split(a, shards, num_micro), batch)
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))

            def accumulate(total, micro):
                return jax.tree.map(jnp.add, total, gradient(state.params, micro, scale)), None

            (loss, grads), _ = jax.lax.scan(accumulate, zero, micros)

        grad_norm = global_norm(grads)
        if grad_clip:
            factor = jnp.minimum(1.0, grad_clip / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # An update can overflow though its gradient did not, and would poison the checkpoint.
        update_norm = global_norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        params = jax.tree.map(jnp.add, state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, state.key)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {"loss": loss, "grad_norm": grad_norm, "update_norm": update_norm}
        return state, metrics | {"tokens": tokens, "finite": finite}

    shardings = state_shardings(config, tx, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, NamedSharding(mesh, ROWS)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def loss_tile(tile_tokens: int, device_batch_size: int, seq_len: int) -> int:
    """Time steps of a loss tile, so that a device holds about tile_tokens tokens' logits at
    once."""
    return min(seq_len, max(1, tile_tokens // device_batch_size))


def global_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


def put_batch(batch: dict, mesh: Mesh) -> Batch:
    """This process's rows of inputs and targets as global arrays."""
    sharding = NamedSharding(mesh, ROWS)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, batch[name], (len(batch[name]) * jax.process_count(), batch[name].shape[1])
        )
        for name in ("inputs", "targets")
    }


def _split(a: jax.Array, shards: int, num_micro: int) -> jax.Array:
    """[R, T] -> [num_micro, R / num_micro, T], every shard keeping its own rows: nothing moves."""
    rows, seq_len = a.shape
    a = a.reshape(shards, num_micro, rows // (shards * num_micro), seq_len)
    return jnp.swapaxes(a, 0, 1).reshape(num_micro, rows // num_micro, seq_len)
