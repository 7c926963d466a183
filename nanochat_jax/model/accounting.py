"""What a model costs: parameters by group, FLOPs, bytes, as closed forms over GPTConfig.

A matmul weight costs 2 FLOPs a token forward and 4 backward; attention 4*D*window forward and 8
backward per layer, counted without the causal halving, as upstream and most published MFUs do.
"""

from nanochat_jax.model.gpt import SMEAR_GATE_DIM, VE_GATE_DIM, GPTConfig


def param_counts(c: GPTConfig) -> dict[str, int]:
    """Numbers of parameters: wte, value_embeds, lm_head, transformer_matrices, scalars, total."""
    V, D, L, kv_dim = c.padded_vocab_size, c.model_dim, c.num_layers, c.num_kv_heads * c.head_dim
    with_ve = sum(c.has_value_embed(layer) for layer in range(L))
    counts = {
        "wte": V * D,
        "value_embeds": with_ve * V * kv_dim,
        "lm_head": V * D,
        "transformer_matrices": L * (2 * D * D + 2 * D * kv_dim + 8 * D * D)
        + with_ve * VE_GATE_DIM * c.num_kv_heads,
        "scalars": 2 * L + SMEAR_GATE_DIM + 2 if c.extras else 0,
    }
    return counts | {"total": sum(counts.values())}


def matmul_params(c: GPTConfig) -> int:
    """Weights every token is multiplied with: all but embeddings and scalars."""
    counts = param_counts(c)
    return counts["transformer_matrices"] + counts["lm_head"] + SMEAR_GATE_DIM * c.extras


def train_flops_per_token(c: GPTConfig) -> int:
    attention = sum(12 * c.model_dim * min(window, c.seq_len) for window in c.windows)
    return 6 * matmul_params(c) + attention


def decode_flops(c: GPTConfig, context_len: int) -> int:
    """Forward FLOPs of one new token after `context_len` others."""
    attention = sum(4 * c.model_dim * min(context_len, window) for window in c.windows)
    return 2 * matmul_params(c) + attention


def kv_bytes_per_token(c: GPTConfig, bytes_per_value: int) -> int:
    """Bytes of KV cache that one token takes over all layers."""
    return c.num_layers * 2 * c.num_kv_heads * c.head_dim * bytes_per_value


def state_bytes(c: GPTConfig) -> dict[str, int]:
    """Bytes in float32; the optimizer keeps two moments for AdamW, one for Muon."""
    counts = param_counts(c)
    params, moments = counts["total"], 2 * counts["total"] - counts["transformer_matrices"]
    return {"params": 4 * params, "grads": 4 * params, "optimizer": 4 * moments}
