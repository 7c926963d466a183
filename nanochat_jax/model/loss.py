"""Cross entropy of softcapped logits without ever holding all of them.

  loss = sum over tokens of weight * (logsumexp(y) - y[target]),   y = 15 tanh(x head / 15)

Logits are the largest tensor of a small GPT. Here the time dim is cut into tiles, and each tile's
logits live only while the tile is worked on. The forward pass already knows each tile's gradient up
to one scalar, so it computes d/dx and d/dhead right there and the backward pass only multiplies:
the idea of Liger (arXiv 2410.10989), tiled over tokens so that every matmul keeps the whole
vocabulary. Softcapped logits lie within +-15, so logsumexp needs no maximum subtracted.

x [B, T, D] compute dtype; head [D, V] float32, or an fp8.Weight: then all three matmuls are in fp8;
targets [B, T] int, negative = ignored; weights [B, T] float32. vocab_size < V: the padded columns
are no candidates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nanochat_jax.model import fp8
from nanochat_jax.model.gpt import SOFTCAP


def cross_entropy_naive(x, head, targets, vocab_size: int) -> jax.Array:
    """nll [B, T] (0 where ignored) with all logits at once: the definition."""
    logits = (x @ head.astype(x.dtype))[..., :vocab_size].astype(jnp.float32)
    log_probs = jax.nn.log_softmax(SOFTCAP * jnp.tanh(logits / SOFTCAP), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, -picked, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(x, head, targets, weights, vocab_size: int, tile: int) -> jax.Array:
    """The weighted sum of nll over all tokens; tile: time steps worked on at once."""
    return jnp.sum(token_nll(x, head, targets, vocab_size, tile) * weights)


def token_nll(x, head, targets, vocab_size: int, tile: int) -> jax.Array:
    """nll [B, T] (0 where ignored), tile by tile; not for gradients."""
    head, of_x, _ = fp8.operands(head, x.dtype)

    def step(_, tile_xs):
        x, targets = tile_xs
        capped, total, onehot = _softmax_parts(of_x(x), head, targets, vocab_size)
        return None, jnp.where(targets >= 0, jnp.log(total) - _pick(capped, onehot), 0.0)

    _, nll = lax.scan(step, None, (_to_tiles(x, tile, 0), _to_tiles(targets, tile, -1)))
    return _from_tiles(nll, x.shape[1])


def _forward(x, head, targets, weights, vocab_size: int, tile: int):
    kernel, dtype = (head.kernel if isinstance(head, fp8.Weight) else head), x.dtype
    operand, of_x, of_gradient = fp8.operands(head, dtype)

    def step(carry, tile_xs):
        loss, dhead = carry
        x, targets, weights = tile_xs  # [B, t, D], [B, t], [B, t]
        x, weights = of_x(x), jnp.where(targets >= 0, weights, 0.0)
        capped, total, onehot = _softmax_parts(x, operand, targets, vocab_size)
        loss += jnp.sum(weights * (jnp.log(total) - _pick(capped, onehot)))
        probs = jnp.exp(capped) / total[..., None]
        dlogits = weights[..., None] * (probs - onehot.astype(probs.dtype))
        dlogits = _mask(dlogits * (1 - lax.square(capped / SOFTCAP)), vocab_size, 0.0)
        dlogits = of_gradient(dlogits, amax=jnp.max(jnp.abs(weights)))  # the rest is at most 1
        dx = fp8.product(dlogits, operand, (2,), (1,), dtype)  # [B, t, D]
        dhead += fp8.product(x, dlogits, (0, 1), (0, 1), jnp.float32)  # [D, V]
        return (loss, dhead), dx

    tiles = (_to_tiles(x, tile, 0), _to_tiles(targets, tile, -1), _to_tiles(weights, tile, 0))
    zero = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (loss, dhead), dx = lax.scan(step, zero, tiles)
    dhead = head._replace(kernel=dhead, quantised=None) if isinstance(head, fp8.Weight) else dhead
    return loss, (_from_tiles(dx, x.shape[1]), dhead)


def _backward(vocab_size: int, tile: int, gradients, g):
    dx, dhead = gradients
    return dx * g.astype(dx.dtype), jax.tree.map(lambda d: d * g, dhead), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _softmax_parts(x, head, targets, vocab_size: int):
    """Softcapped logits [B, t, V], sum of their exponentials, and where the target is."""
    logits = fp8.product(x, head, (2,), (0,), jnp.float32)
    capped = SOFTCAP * jnp.tanh(logits / SOFTCAP)
    capped = _mask(capped, vocab_size, -jnp.inf)
    ids = lax.broadcasted_iota(jnp.int32, capped.shape, capped.ndim - 1)
    return capped, jnp.sum(jnp.exp(capped), axis=-1), ids == targets[..., None]


def _pick(capped, onehot):
    return jnp.sum(jnp.where(onehot, capped, 0.0), axis=-1)


def _mask(logits, vocab_size: int, value: float):
    if logits.shape[-1] == vocab_size:
        return logits
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids < vocab_size, logits, value)


def _to_tiles(a: jax.Array, tile: int, fill) -> jax.Array:
    """[B, T, ...] -> [ceil(T / tile), B, tile, ...]: rows stay whole and so stay sharded."""
    B, T = a.shape[:2]
    num_tiles = -(-T // tile)
    padding = [(0, 0), (0, num_tiles * tile - T)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, padding, constant_values=fill).reshape(B, num_tiles, tile, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)


def _from_tiles(a: jax.Array, seq_len: int) -> jax.Array:
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :seq_len]
