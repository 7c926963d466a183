"""The GPT: one class, of which the classic and the modern recipe are configurations.

  ids -> embed, norm -> (smear) -> num_layers x [ + attention(norm), + MLP(norm) ] -> norm -> head
  -> softcap

classic  pre-norm blocks, rotary positions, QK-norm, relu^2 MLP, untied head, logits 15 tanh(x/15)
modern   also (extras): value embeddings, mixed into v by a gate on every other layer (arXiv
         2410.17897); learned scales of the residual stream and of the first embedding at every
         layer; a "smear" of the previous token's embedding; and "backout", which subtracts the
         mid-layer residual at the end

Dims: B batch, T query time, S key time, D model, N heads, K KV heads, H head dim, F MLP = 4D,
V vocabulary (padded to a multiple of 64; padded ids are never predicted), L layers.

Parameters travel as a flat dict {dotted path: float32 array}, e.g. "blocks.3.attn.c_q.kernel" [D,
N*H]; `bind` puts them back into the module. Re-expresses karpathy/nanochat's gpt.py; tests/goldens
holds its exact numbers. Training, prefill and decoding (inference/decode.py) all use `GPT.run`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.model.attention import attention
from nanochat_jax.model.layers import Embedding, Linear, rms_norm, rotary_tables, rotate, scaled
from nanochat_jax.model.sharding import shard_rows

SOFTCAP = 15.0
VE_GATE_DIM = 12  # leading channels of x that steer the value-embedding gate
SMEAR_GATE_DIM = 24  # leading channels of x that steer the smear gate
REMAT = ("none", "names", "full")  # how much of a block is kept for the backward pass

# (layer, q [B, T, N, H], k and v [B, T, K, H]) -> y [B, T, N, H], and the layer's cache or None
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class GPTConfig:
    """Shape and variant of a model; every field is explained in configs/default.py."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    rope_base: float = 10_000.0
    window_pattern: str = "L"
    qk_scale: float = 1.0
    extras: bool = False
    embed_init_std: float = 1.0
    fc_init_scale: float = 1.0
    compute_dtype: str = "float32"
    attention_backend: str = "auto"
    remat: str = "none"
    fp8_layers: tuple[str, ...] = ()  # read by the training step alone

    def __post_init__(self):
        assert self.model_dim % self.num_heads == 0, (self.model_dim, self.num_heads)
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert set(self.window_pattern) <= {"S", "L"}, self.window_pattern
        assert self.remat in REMAT, self.remat

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def windows(self) -> tuple[int, ...]:
        """How far back each layer sees: seq_len (L, the last layer), or a quarter of it, rounded up
        to a multiple of 128 (S)."""
        size = {"S": -(-self.seq_len // 4 // 128) * 128, "L": self.seq_len}
        pattern = self.window_pattern * self.num_layers
        return tuple(size[letter] for letter in pattern[: self.num_layers - 1] + "L")

    def sees(self, layer: int) -> int | None:
        """How many earlier positions a layer's attention sees; None (classic): all of them, even
        in a text longer than seq_len."""
        return self.windows[layer] if self.extras or "S" in self.window_pattern else None

    def has_value_embed(self, layer: int) -> bool:
        return self.extras and layer % 2 == (self.num_layers - 1) % 2


def keep(x: jax.Array) -> jax.Array:
    """Mark what remat=names keeps: results of matmuls that the backward pass reads again."""
    return checkpoint_name(x, "kept")


def is_kept(primitive, *_, **params) -> bool:
    """The policy of remat=names for jax.checkpoint. cuDNN's forward attention is kept as a whole:
    its backward pass also reads the log-sum-exp, which has no name."""
    named = primitive.name == "name" and params["name"] == "kept"
    return named or primitive.name.startswith("dot_product_attention_fwd")


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int, rngs: nnx.Rngs):
        self.config, self.layer = config, layer
        D, kv_dim = config.model_dim, config.num_kv_heads * config.head_dim
        self.c_q, self.c_k, self.c_v = (
            Linear(uniform(rngs, (D, width), D)) for width in (D, kv_dim, kv_dim)
        )
        self.c_proj = Linear(jnp.zeros((D, D)))
        if config.has_value_embed(layer):
            self.ve_gate = Linear(small_positive(rngs, (VE_GATE_DIM, config.num_kv_heads)))

    def __call__(self, x: jax.Array, ve: jax.Array | None, cos_sin, attend: Attend):
        B, T, D = x.shape
        c = self.config
        q = keep(self.c_q(x)).reshape(B, T, c.num_heads, c.head_dim)
        k = keep(self.c_k(x)).reshape(B, T, c.num_kv_heads, c.head_dim)
        v = keep(self.c_v(x)).reshape(B, T, c.num_kv_heads, c.head_dim)
        if ve is not None:
            gate = 3 * jax.nn.sigmoid(self.ve_gate(x[..., :VE_GATE_DIM]))  # [B, T, K]
            v = v + scaled(ve.reshape(v.shape), gate[..., None])
        # Normalised after the rotation; the scale sharpens the softmax, half on each side.
        q, k = (rms_norm(rotate(t, *cos_sin)) * c.qk_scale for t in (q, k))
        attended, cache = attend(self.layer, q, k, v)
        return keep(self.c_proj(keep(attended).reshape(B, T, D))), cache


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        D = config.model_dim
        self.c_fc = Linear(uniform(rngs, (D, 4 * D), D) * config.fc_init_scale)
        self.c_proj = Linear(jnp.zeros((4 * D, D)))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = keep(self.c_fc(x))
        return self.c_proj(jnp.square(jax.nn.relu(hidden)))  # relu^2: arXiv 2109.08668


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int, rngs: nnx.Rngs):
        self.attn = Attention(config, layer, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, ve: jax.Array | None, cos_sin, attend: Attend):
        attended, cache = self.attn(rms_norm(x), ve, cos_sin, attend)
        x = x + attended
        return shard_rows(x + self.mlp(rms_norm(x))), cache


class GPT(nnx.Module):
    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        V, D, L = config.padded_vocab_size, config.model_dim, config.num_layers
        self.wte = Embedding(normal(rngs, (V, D), config.embed_init_std))
        self.blocks = nnx.List([Block(config, layer, rngs) for layer in range(L)])
        self.lm_head = Linear(normal(rngs, (D, V), 0.001))
        if config.extras:
            kv_dim = config.num_kv_heads * config.head_dim
            layers = [layer for layer in range(L) if config.has_value_embed(layer)]
            tables = {str(layer): Embedding(uniform(rngs, (V, kv_dim), D)) for layer in layers}
            self.value_embeds = nnx.Dict(tables)
            depth_frac = jnp.arange(L, dtype=jnp.float32) / max(L - 1, 1)
            self.resid_lambdas = nnx.Param(1.15 - 0.10 * depth_frac)
            self.x0_lambdas = nnx.Param(0.20 - 0.15 * depth_frac)
            self.smear_gate = Linear(small_positive(rngs, (SMEAR_GATE_DIM, 1)))
            self.smear_lambda = nnx.Param(jnp.zeros(1))
            self.backout_lambda = nnx.Param(jnp.full(1, 0.2))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Softcapped logits [B, T, vocab_size] in float32 for ids [B, T], all of them at once."""
        return self.logits(self.hidden(ids))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Softcapped logits [..., vocab_size] in float32 for hidden [..., D]."""
        head = self.lm_head.kernel[...].astype(hidden.dtype)
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        return SOFTCAP * jnp.tanh(logits[..., : self.config.vocab_size] / SOFTCAP)

    def hidden(self, ids: jax.Array) -> jax.Array:
        """What the head sees: [B, T, D] in the compute dtype for ids [B, T]."""
        return self.run(ids)[0]

    def run(
        self,
        ids: jax.Array,
        *,
        positions: jax.Array | None = None,
        previous: jax.Array | None = None,
        attend: Attend | None = None,
    ) -> tuple[jax.Array, list]:
        """`hidden`, and the cache of each layer that `attend` returned.

        positions [B, T]: of the ids; by default 0..T-1. previous [B, T]: the id before each of
        them, negative where there is none; by default the one to its left. attend: replaces causal
        attention among these positions.
        """
        c, attend = self.config, attend or self.attend
        x = self.embed(ids)
        if c.extras:
            x = self.smear(x, previous)
        x0 = mid = x
        # Constants by default, else XLA repeats cos and sin for every head and row.
        places = np.arange(ids.shape[1]) if positions is None else positions
        cos_sin = rotary_tables(places, c.head_dim, c.rope_base)

        def one_layer(block, value_embed, lambdas, x, x0, cos_sin):
            if c.extras:
                resid, first = lambdas
                x = scaled(x, resid) + scaled(x0, first)
            ve = value_embed(ids, x.dtype) if value_embed else None
            return block(x, ve, cos_sin, attend)

        if c.remat != "none":
            one_layer = nnx.remat(one_layer, policy=is_kept if c.remat == "names" else None)
        caches = []
        for layer, block in enumerate(self.blocks):
            lambdas = (self.resid_lambdas[layer], self.x0_lambdas[layer]) if c.extras else None
            value_embed = self.value_embeds[str(layer)] if c.has_value_embed(layer) else None
            x, cache = one_layer(block, value_embed, lambdas, x, x0, cos_sin)
            caches.append(cache)
            if layer == c.num_layers // 2:
                mid = x
        if c.extras:
            x = x - scaled(mid, self.backout_lambda[...])
        return rms_norm(x), caches

    def embed(self, ids: jax.Array) -> jax.Array:
        return rms_norm(shard_rows(self.wte(ids, jnp.dtype(self.config.compute_dtype))))

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array):
        c = self.config
        return attention(q, k, v, c.sees(layer), c.attention_backend), None

    def smear(self, x: jax.Array, previous: jax.Array | None) -> jax.Array:
        """Mix into each embedding of x [B, T, D] the one before it, where there is one."""
        channels = x[:, 1:, :SMEAR_GATE_DIM] if previous is None else x[..., :SMEAR_GATE_DIM]
        gate = jax.nn.sigmoid(self.smear_gate(channels))  # [B, T, 1], or T - 1
        gate = scaled(gate, self.smear_lambda[...])
        if previous is None:
            return jnp.concatenate([x[:, :1], x[:, 1:] + scaled(x[:, :-1], gate)], axis=1)
        smeared = x + scaled(self.embed(jnp.maximum(previous, 0)), gate)
        return jnp.where(previous[..., None] >= 0, smeared, x)


def init_params(config: GPTConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters; the same numbers however they are sharded."""
    return params_of(GPT(config, nnx.Rngs(params=key)))


def param_shapes(config: GPTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def bind(config: GPTConfig, params: dict[str, jax.Array]) -> GPT:
    """The module with these parameters; cheap, meant to be called inside jit."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))), nnx.Param)
    keys = flatten_dict(nnx.to_pure_dict(state))
    return nnx.merge(graphdef, unflatten_dict({key: params[dotted(key)] for key in keys}))


def params_of(model: GPT) -> dict[str, jax.Array]:
    """The parameters of a module by path."""
    flat: Any = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {dotted(key): value for key, value in flat.items()}


def dotted(key: tuple[str | int, ...]) -> str:
    return ".".join(map(str, key))


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = (3 / fan_in) ** 0.5  # std 1/sqrt(fan_in), without a normal's outliers
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.normal(rngs.params(), shape)


def small_positive(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Gates start slightly above neutral."""
    return jax.random.uniform(rngs.params(), shape, maxval=0.02)
