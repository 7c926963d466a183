"""The step that an NVIDIA GPU would get: lowered for CUDA here, read, never run.

Lowering needs no GPU, only cuDNN's version and the answer that it will do, which are told here.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state
from nanochat_jax.train.step import make_train_step
from tests.train.test_step import one_device, optimizer

SEQ_LEN, ROWS, LAYERS = 512, 4, 4
CLASSIC = GPTConfig(
    1_024, LAYERS, 256, 2, 2, SEQ_LEN, compute_dtype="bfloat16", attention_backend="cudnn"
)
MODERN = replace(CLASSIC, extras=True, window_pattern="SSSL", qk_scale=1.2)  # windows of 128


@pytest.fixture
def lower(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda wanted: True)

    def text(config: GPTConfig) -> str:
        mesh, tx = one_device(), optimizer(config)
        owners = Owners(replace(config, remat="none"), mesh)
        step = make_train_step(
            owners, tx, remat=config.remat, device_batch_size=ROWS // 2, tile_tokens=256
        )
        ids = jax.ShapeDtypeStruct((ROWS, SEQ_LEN), jnp.int32)
        state = abstract_state(owners, tx)
        with jax.set_mesh(mesh):
            traced = step.trace(state, {"inputs": ids, "targets": ids})
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return text


def attention_calls(text: str, backward: bool) -> list[str]:
    name = "__cudnn$fmhaSoftmaxBackward" if backward else "__cudnn$fmhaSoftmax"
    return [line for line in text.splitlines() if f"@{name}(" in line]


@pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_attention_is_fused_both_ways(lower, config):
    text = lower(config)
    for backward in (False, True):
        calls = attention_calls(text, backward)
        assert len(calls) == LAYERS
        assert all(r"\22mask_type\22: \22CAUSAL\22" in call for call in calls)
        windows = [int(re.search(r"sliding_window_length\\22: (\d+)", call)[1]) for call in calls]
        assert sorted(windows) == ([0] * 4 if config is CLASSIC else [0, 129, 129, 129])
    assert not re.search(rf"tensor<[\dx]*{SEQ_LEN}x{SEQ_LEN}x\w+>", text), "scores are never held"


def test_matrices_are_multiplied_in_bfloat16(lower):
    products = re.findall(
        r"dot_general .*: \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>", lower(MODERN)
    )
    dtypes = [tuple(shape.split("x")[-1] for shape in product) for product in products]
    assert {pair[:2] for pair in dtypes} == {("bf16", "bf16")}
    # Logits, their gradient for the head: the only results that are not rounded.
    assert [result for *_, result in dtypes].count("f32") == 2


def test_nothing_is_summed_in_bfloat16(lower):
    """Hopper adds up in the dtype it is given; a CPU widens, and would not show it."""
    text = lower(replace(MODERN, num_kv_heads=1))
    sums = re.findall(r"applies stablehlo.add .*: \(tensor<(\S+)>, .* -> tensor<(\S+)>", text)
    real = [of for of, into in sums if of.replace("1x", "") != into]  # others drop a dim of 1
    assert real and not [of for of in real if of.endswith("bf16")]
    scatters = re.findall(r"stablehlo.add .*: tensor<(\w+)>\n\s+stablehlo.return", text)
    assert scatters and set(scatters) <= {"f32", "i32"}


def test_attention_is_recomputed_only_where_everything_is(lower):
    """And remat=names computes no matmul twice: cuDNN keeps what its backward pass reads."""
    none, names, full = (lower(replace(CLASSIC, remat=remat)) for remat in REMAT)
    for text, forward_runs in ((none, 1), (names, 1), (full, 2)):
        assert len(attention_calls(text, backward=False)) == forward_runs * LAYERS
        assert len(attention_calls(text, backward=True)) == LAYERS
    assert names.count("dot_general") == none.count("dot_general") < full.count("dot_general")
