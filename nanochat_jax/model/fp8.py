"""Matmuls in 8-bit floating point: twice the bfloat16 rate on Hopper and later, for training only.

  x8, w8 = e4m3(x / sx), e4m3(w / sw)           sx, sw = max|.| / 448, one number a tensor
  y  = (x8 w8) * sx sw                          tensor cores, fast accumulation
  g8 = e5m2(dy / sg)                            sg = max|dy| / 57344
  dx = (g8 w8') * sg sw,  dw = (x8' g8) * sx sg     accumulated in full

Activations and weights get the format with more mantissa (e4m3: 3 bits), gradients the one with
more range (e5m2: 2 bits), as arXiv 2209.05433 proposes; each scale comes from the tensor as it is
now. Of x only its 8 bits are kept for the backward pass.

A weight is quantised once a step, before the microbatches (train/step.py), and bound as a `Weight`
in the place of its kernel. Without that a model computes as ever. How exact it is: a dot product of
independent numbers is off by 3.8% forward, 5.9% backward (tests/model/test_fp8.py).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # what the tensor cores' matmuls want dims to be a multiple of
LAYERS = {  # what config.model.fp8_layers names; gates and embeddings are in none of them
    "attn": r"blocks\.\d+\.attn\.c_\w+\.kernel",
    "mlp": r"blocks\.\d+\.mlp\.c_\w+\.kernel",
    "head": r"lm_head\.kernel",
}


class Scaled(NamedTuple):
    """The tensor values * scale."""

    values: jax.Array  # E4M3 or E5M2
    scale: jax.Array  # float32 scalar


class Weight(NamedTuple):
    """Takes a kernel's place where fp8 multiplies."""

    kernel: jax.Array  # [in, out] float32; for its gradient
    quantised: Scaled


def quantise(x: jax.Array, dtype, amax: jax.Array | None = None) -> Scaled:
    """x in E4M3 or E5M2; its largest magnitude, `amax`, becomes the format's largest. Inf or nan
    in x makes all of it nan."""
    top, info = float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32)
    amax = jnp.max(jnp.abs(x)) if amax is None else amax
    scale = jnp.maximum(amax.astype(jnp.float32) / top, info.tiny)  # tiny: 1 / scale is finite
    values = jnp.clip(x.astype(jnp.float32) * (1 / scale), -top, top)
    return Scaled(values.astype(dtype), scale)


def product(a, b, axis_a, axis_b, dtype) -> jax.Array:
    """a and b, two arrays or two Scaled, contracted over these axes, in `dtype`."""
    dims = ((axis_a, axis_b), ((), ()))
    if not isinstance(a, Scaled):
        return lax.dot_general(a, b, dims, preferred_element_type=dtype)
    # What XLA takes these to mean in fp8: full or fast accumulation (openxla/xla issue 6168).
    is_gradient = E5M2 in (a.values.dtype, b.values.dtype)
    precision = lax.Precision.HIGHEST if is_gradient else lax.Precision.DEFAULT
    out = lax.dot_general(a.values, b.values, dims, precision, preferred_element_type=dtype)
    return (out.astype(jnp.float32) * (a.scale * b.scale)).astype(dtype)


@jax.custom_vjp
def dot(x: jax.Array, weight: Scaled, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out] in x's dtype. kernel: what weight was quantised from, in
    float32; it gets the weight's gradient, its numbers are not read."""
    return _forward(x, weight, kernel)[0]


def _forward(x, weight, _kernel):
    x8 = quantise(x, E4M3)
    return product(x8, weight, (x.ndim - 1,), (0,), x.dtype), (x8, weight)


def _backward(residuals, dy):
    x8, weight = residuals
    dy8, rows = quantise(dy, E5M2), tuple(range(dy.ndim - 1))
    dx = product(dy8, weight, (dy.ndim - 1,), (1,), dy.dtype)
    return dx, None, product(x8, dy8, rows, rows, jnp.float32)


dot.defvjp(_forward, _backward)


def operands(head: jax.Array | Weight, dtype) -> tuple[jax.Array | Scaled, Callable, Callable]:
    """(head, of_x, of_gradient): the head as `product` takes it, and functions that make the same
    of x and of a gradient of known amax. Without fp8 they are casts to `dtype`."""
    if isinstance(head, Weight):
        return head.quantised, partial(quantise, dtype=E4M3), partial(quantise, dtype=E5M2)
    return head.astype(dtype), lambda x: x, lambda grad, amax: grad.astype(dtype)


def quantise_weights(weights: dict[str, jax.Array], layers: tuple[str, ...]) -> dict[str, Scaled]:
    """In E4M3: the kernels that `layers` names and whose dims fp8 can multiply."""

    def wanted(path: str, weight: jax.Array) -> bool:
        named = any(re.fullmatch(LAYERS[layer], path) for layer in layers)
        return named and all(dim % MULTIPLE == 0 for dim in weight.shape)

    return {path: quantise(w, E4M3) for path, w in weights.items() if wanted(path, w)}
