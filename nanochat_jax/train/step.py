"""One optimizer step: the only jitted function of the training loop.

  owned shares -> gather weights, in the compute dtype          } on every row shard by itself,
  weights that fp8 multiplies -> their 8 bits                   } under shard_map
  own rows -> A microbatches -> float32 sum of gradients        }
  scatter: the sum over all shards, each owner its share        }
  clip -> optimizer, every device on what it owns -> new shares

Between gather and scatter only the compiler sends something, over the tensor axis. The loss is
weighted by trained tokens over the global batch, so no split into microbatches or devices changes
it; a batch of RL brings weights of its own, the advantages. When a loss, gradient or update is not
finite, the state stays as it was and metrics["finite"] is false.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.common import log
from nanochat_jax.model import fp8
from nanochat_jax.model.gpt import bind
from nanochat_jax.model.loss import cross_entropy_sum
from nanochat_jax.model.sharding import ROW_AXES, ROWS
from nanochat_jax.train.layout import Layout, LayoutRecord, choose
from nanochat_jax.train.memory import available_bytes, compile_lowered, compiled_bytes, held_bytes
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState, abstract_state

# inputs, targets: int32 [R, T], target -1 = not trained; perhaps weights: float32 [R, T]
Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    owners: Owners,
    tx: optax.GradientTransformation,
    *,
    device_batch_size: int,
    tile_tokens: int,
    remat: str = "none",
    grad_clip: float = 0.0,
    loss_sum: Callable = cross_entropy_sum,
) -> Step:
    """The jitted (state, batch) -> (state, metrics); the state given is consumed (donated).

    device_batch_size: rows that a row shard works on at once; the rest is accumulated.
    remat: one of model.gpt.REMAT. loss_sum: the loss; benchmarks take another.
    metrics: loss (before the update), grad_norm, update_norm, tokens (trained ones), finite.
    """
    config, mesh = replace(owners.config, remat=remat), owners.mesh
    dtype = jnp.dtype(config.compute_dtype)

    def loss_fn(params, in_fp8, micro: Batch, scale: jax.Array) -> jax.Array:
        params = params | {path: fp8.Weight(params[path], w) for path, w in in_fp8.items()}
        hidden = bind(config, params).hidden(micro["inputs"])
        weights = micro.get("weights", jnp.broadcast_to(scale, micro["targets"].shape))
        tile = loss_tile(tile_tokens, device_batch_size, micro["inputs"].shape[1])
        head = params["lm_head.kernel"]
        return loss_sum(hidden, head, micro["targets"], weights, config.vocab_size, tile)

    def sum_gradients(shares, batch: Batch, scale: jax.Array):
        """On one row shard, with its rows: (loss of all, its share of the gradient of all)."""
        whole = owners.gather(shares, dtype)
        in_fp8 = fp8.quantise_weights(whole, config.fp8_layers)

        def gradient(micro: Batch):
            # The model casts them back, which compiles to nothing; gradients come out in float32.
            params = {path: w.astype(jnp.float32) for path, w in whole.items()}
            return jax.value_and_grad(loss_fn)(params, in_fp8, micro, scale)

        rows = len(batch["targets"])
        num_micro = max(1, rows // device_batch_size)
        if num_micro == 1:
            loss, grads = gradient(batch)
        else:
            micros = jax.tree.map(lambda a: a.reshape(num_micro, -1, a.shape[1]), batch)
            zero = (jnp.zeros(()), {path: jnp.zeros(w.shape) for path, w in whole.items()})

            def accumulate(total, micro):
                return jax.tree.map(jnp.add, total, gradient(micro)), None

            (loss, grads), _ = jax.lax.scan(accumulate, zero, micros)
        return jax.lax.psum(loss, ROW_AXES), owners.scatter(grads)

    sum_gradients = jax.shard_map(
        sum_gradients,
        mesh=mesh,
        in_specs=(owners.specs(), ROWS, P()),
        out_specs=(P(), owners.specs()),
        axis_names=set(mesh.axis_names if mesh.shape["tensor"] == 1 else ROW_AXES),
        check_vma=False,
    )

    def train_step(state: TrainState, batch: Batch):
        tokens = jnp.sum(batch["targets"] >= 0)
        scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        loss, grads = sum_gradients(state.params, batch, scale)
        grad_norm = global_norm(grads)
        if grad_clip:
            factor = jnp.minimum(1.0, grad_clip / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # An update can overflow though its gradient did not, and would be saved in the checkpoint.
        update_norm = global_norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        params = jax.tree.map(jnp.add, state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, state.key)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {"loss": loss, "grad_norm": grad_norm, "update_norm": update_norm}
        return state, metrics | {"tokens": tokens, "finite": finite}

    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(owners, tx))
    given, made = (state, NamedSharding(mesh, ROWS)), (state, None)
    return jax.jit(train_step, in_shardings=given, out_shardings=made, donate_argnums=0)


def step_for_widths(
    owners: Owners,
    tx: optax.GradientTransformation,
    record: LayoutRecord,
    state: TrainState,
    *,
    rows: int,
    widest: int,
    has_token_weights: bool,
    **options,
) -> Step:
    """The training step in the first layout in which the widest batch fits, compiled for each
    width that comes; UserError when no layout fits.

    state: an abstract_state. options: of make_train_step.
    """
    mesh, compiled = owners.mesh, {}

    def compile(layout: Layout, width: int):
        rows_at_once, remat = layout
        step = make_train_step(owners, tx, device_batch_size=rows_at_once, remat=remat, **options)
        ids = jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=NamedSharding(mesh, ROWS))
        batch = {"inputs": ids, "targets": ids}
        batch |= {"weights": ids.update(dtype=jnp.float32)} if has_token_weights else {}
        compiled.pop(width, None)  # one that did not fit
        log(f"compiling train_step for {rows} x {width} tokens, {layout} ...")
        began = time.monotonic()
        with jax.set_mesh(mesh):
            compiled[width] = compile_lowered(step.lower(state, batch))
        log(f"compiled train_step in {time.monotonic() - began:.1f}s")
        return compiled_bytes(compiled[width])

    free = partial(available_bytes, mesh)
    layout = choose(record, partial(compile, width=widest), held_bytes(state), free)

    def step(state_now: TrainState, batch: Batch):
        width = batch["inputs"].shape[1]
        if width not in compiled:
            compile(layout, width)
        return compiled[width](state_now, batch)

    return step


def loss_tile(tile_tokens: int, device_batch_size: int, seq_len: int) -> int:
    """Time steps of a loss tile: a device holds the logits of about tile_tokens tokens at once."""
    return min(seq_len, max(1, tile_tokens // device_batch_size))


def global_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


def put_batch(batch: dict, mesh: Mesh) -> Batch:
    """This process's rows of inputs, targets and, if any, weights as global arrays."""
    arrays = {name: batch[name] for name in ("inputs", "targets", "weights") if name in batch}
    put = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, ROWS))
    rows = len(batch["inputs"]) * jax.process_count()
    return {name: put(a, (rows, a.shape[1])) for name, a in arrays.items()}
