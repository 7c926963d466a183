"""Matmuls in fp8: rounding as the formats define it, dots against exact sums, gradients, programs,
and a small model's training beside bfloat16's."""

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import config
from nanochat_jax.common import UserError
from nanochat_jax.model import fp8
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.stages.base import Base
from nanochat_jax.stages.run import start
from nanochat_jax.stages.train import train_stage
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch
from tests.model.programs import equations
from tests.train.test_step import one_device

RNG = np.random.default_rng(0)
STEP = {fp8.E4M3: 2.0**-3, fp8.E5M2: 2.0**-2}  # between neighbours, from 1 to 2


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def exact(scaled: fp8.Scaled) -> np.ndarray:
    return np.asarray(scaled.values, np.float64) * np.float64(scaled.scale)


def distance(ours, expected) -> float:
    """Root mean square of the difference, of the expected."""
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)


def rounding(dtype) -> float:
    """Relative, root mean square, of numbers spread evenly over octaves: step^2 / 12 at most, and
    less by the mean of 1 / x^2 over an octave."""
    return STEP[dtype] * np.sqrt(3 / 8 / np.log(2) / 12)


def product_rounding(*dtypes) -> float:
    """Of a sum of products of independent numbers."""
    return np.sqrt(sum(rounding(dtype) ** 2 for dtype in dtypes))


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_numbers_go_to_the_nearest_of_all_256_codes(dtype):
    x = np.exp2(RNG.uniform(-12, 3, 4000)) * RNG.choice([-1, 1], 4000)
    scaled = fp8.quantise(jnp.asarray(x, jnp.float32), dtype)
    codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    codes = codes[np.isfinite(codes)] * np.float64(scaled.scale)
    assert np.isclose(codes.max(), np.abs(x).max(), rtol=1e-6)
    nearest = np.abs(x[:, None] - codes).min(axis=1)
    error = np.abs(x - exact(scaled))
    np.testing.assert_array_less(error, nearest + 1e-6 * np.abs(x))
    normal = np.abs(x) > np.abs(x).max() * 2**-6
    measured = np.sqrt(np.mean((error / x)[normal] ** 2))
    assert measured == pytest.approx(rounding(dtype), rel=0.05)


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_nothing_overflows_and_nothing_divides_by_zero(dtype):
    zeros = fp8.quantise(jnp.zeros(4), dtype)
    assert not np.any(exact(zeros)) and zeros.scale > 0
    for size in (1e-44, 1e-37, 1e-9, 1e9, 3e38):
        scaled = fp8.quantise(jnp.array([size, -size, size / 2, 0.0]), dtype)
        assert np.all(np.isfinite(exact(scaled)))
        if size > 1e-37:  # below, float32 itself has few bits left
            np.testing.assert_allclose(exact(scaled), [size, -size, size / 2, 0], rtol=1e-6)
    saturated = fp8.quantise(jnp.array([1.0, -5.0, 900.0]), dtype, amax=jnp.float32(2))
    np.testing.assert_allclose(exact(saturated), [1, -2, 2], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    """The training step refuses an update that is not finite, so it must be able to see it."""
    x = draw(4, 16).at[2, 3].set(bad)
    out = fp8.dot(x, fp8.quantise(draw(16, 16), fp8.E4M3), draw(16, 16))
    assert not np.any(np.isfinite(out[2]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_and_gradients_are_those_of_the_rounded_numbers(dtype):
    """Against float64 sums of what the 8 bits stand for; then against the unrounded numbers, from
    which they are as far as the formats say."""
    x, kernel, dy = draw(4, 64, 256).astype(dtype), draw(256, 192) / 16, draw(4, 64, 192)
    dy = dy.astype(dtype) * jnp.asarray(1e-6, dtype)  # as small as a mean over a batch makes it
    weight = fp8.quantise(kernel, fp8.E4M3)
    y, pull = jax.vjp(lambda x, kernel: fp8.dot(x, weight, kernel), x, kernel)
    dx, dkernel = pull(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, jnp.float32)
    rounded = (exact(fp8.quantise(x, fp8.E4M3)), exact(weight), exact(fp8.quantise(dy, fp8.E5M2)))
    unrounded = tuple(np.asarray(a, np.float64) for a in (x, kernel, dy))
    backward = product_rounding(fp8.E4M3, fp8.E5M2)
    for (x, w, g), wants in (
        (rounded, (0, 0, 0)),
        (unrounded, (product_rounding(fp8.E4M3, fp8.E4M3), backward, backward)),
    ):
        expected = x @ w, g @ w.T, np.einsum("bti,bto->io", x, g)
        for ours, want, one in zip(expected, wants, (y, dx, dkernel), strict=True):
            eps = float(jnp.finfo(one.dtype).eps)
            assert distance(one, ours) == pytest.approx(want, rel=0.1, abs=eps), want


def test_only_eight_bits_of_x_are_kept_for_the_backward_pass():
    x, kernel = draw(8, 32, 64).astype(jnp.bfloat16), draw(64, 48)
    weight = fp8.quantise(kernel, fp8.E4M3)
    _, pull = jax.vjp(lambda x, kernel: fp8.dot(x, weight, kernel), x, kernel)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert sorted(leaf.shape for leaf in kept) == [(8, 32, 64), (64, 48)]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(fp8.E4M3)}


def test_cross_entropy_with_the_head_in_fp8():
    """Loss and gradients beside the exact ones of the head's rounded numbers; every tile rounds x
    and the logits' gradients by itself, and the head's gradient comes in the kernel's place."""
    B, T, D, V, vocab = 4, 32, 64, 128, 120
    x, kernel = draw(B, T, D).astype(jnp.bfloat16), draw(D, V) / 2
    targets = np.where(RNG.random((B, T)) < 0.3, -1, RNG.integers(vocab, size=(B, T)))
    targets, weights = jnp.asarray(targets, jnp.int32), draw(B, T) * 1e-6
    head = fp8.quantise(kernel, fp8.E4M3)

    def ours(x, kernel):
        return cross_entropy_sum(x, fp8.Weight(kernel, head), targets, weights, vocab, 8)

    def naive(x, kernel):
        return jnp.sum(cross_entropy_naive(x, kernel, targets, vocab) * weights)

    loss, (dx, dkernel) = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, kernel)
    rounded = jnp.asarray(exact(head), jnp.float32)
    want, (want_x, want_kernel) = jax.value_and_grad(naive, (0, 1))(x.astype(jnp.float32), rounded)
    assert float(loss) == pytest.approx(float(want), abs=0.01 * float(jnp.abs(weights).sum()))
    assert dkernel.dtype == jnp.float32 and not np.any(dkernel[:, vocab:])
    # Rounding of the logits moves the probabilities too, which adds to that of the last product.
    assert product_rounding(fp8.E5M2) * 0.5 < distance(dx, want_x) < 0.12
    assert product_rounding(fp8.E5M2) * 0.5 < distance(dkernel, want_kernel) < 0.12
    np.testing.assert_allclose(jax.jit(ours)(x, kernel), loss, rtol=1e-5)


BFLOAT16 = GPTConfig(128, 2, 64, 4, num_kv_heads=2, seq_len=16, compute_dtype="bfloat16")
FP8 = replace(BFLOAT16, fp8_layers=("attn", "mlp", "head"))
ROWS = 16
TX, SLOW = optax.adam(3e-3), pytest.mark.slow


def make_step(owners, device_batch_size=ROWS):
    tile = 8 * device_batch_size
    return make_train_step(owners, TX, device_batch_size=device_batch_size, tile_tokens=tile)


def lower(config, device_batch_size=ROWS, mesh=None):
    mesh, ids = mesh or one_device(), jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    with jax.set_mesh(mesh):
        step = make_step(owners := Owners(config, mesh), device_batch_size)
        return step.trace(abstract_state(owners, TX), {"inputs": ids, "targets": ids})


def fp8_kernels(config=FP8) -> list[tuple[int, int]]:
    shapes = param_shapes(config).items()
    return sorted(shape.shape for path, shape in shapes if path.endswith("kernel"))


def test_every_matmul_with_a_weight_has_fp8_operands():
    """In the program as the compiler gets it: forward, both gradients, fast and full accumulation;
    and nothing is turned back from fp8 to be multiplied."""
    program = lower(FP8, 4).lower().as_text()
    dots = re.findall(r"precision = \[(\w+), \w+\] : \(\S+x(\w+)>, \S+x(\w+)>\)", program)
    found = Counter(dot for dot in dots if "f8" in "".join(dot))
    count = len(fp8_kernels())
    assert found == {
        ("DEFAULT", "f8E4M3FN", "f8E4M3FN"): count,
        ("HIGHEST", "f8E5M2", "f8E4M3FN"): count,
        ("HIGHEST", "f8E4M3FN", "f8E5M2"): count,
    }
    assert not re.search(r"stablehlo.convert .*f8E\w+>\) ->", program)
    assert "f8" not in lower(BFLOAT16).lower().as_text()


def quantised(jaxpr):
    """(whether inside a loop, shape) of every conversion to e4m3 in a program."""
    for eqn, in_loop in equations(jaxpr):
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == fp8.E4M3:
            yield in_loop, eqn.outvars[0].aval.shape


def test_weights_are_quantised_once_a_step():
    """With four microbatches: every weight before the loop over them, activations inside it."""
    found = Counter(quantised(lower(FP8, ROWS // 4).jaxpr.jaxpr))
    outside = sorted(shape for in_loop, shape in found.elements() if not in_loop)
    inside = [shape for in_loop, shape in found.elements() if in_loop]
    assert outside == fp8_kernels()
    assert inside and all(len(shape) == 3 for shape in inside)


def test_scales_need_no_communication():
    """Each device scales its own rows: rows over eight devices, and what is sent is as ever."""

    def sent(config):
        program = lower(config, 1, make_mesh(data=8)).lower().as_text()
        return Counter(re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", program))

    assert sent(FP8) == sent(BFLOAT16) and sent(FP8)["reduce_scatter"] > 0


def test_layers_are_chosen_by_name_and_odd_shapes_stay():
    shapes = param_shapes(replace(BFLOAT16, extras=True))  # with gates, tables and scalars
    ones = {path: jnp.ones(leaf.shape, jnp.bfloat16) for path, leaf in shapes.items()}
    chosen = {layer: list(fp8.quantise_weights(ones, (layer,))) for layer in fp8.LAYERS}
    block, attn, mlp = "blocks.{}.{}.{}.kernel", ("c_k", "c_proj", "c_q", "c_v"), ("c_fc", "c_proj")
    assert chosen == {
        "attn": [block.format(layer, "attn", name) for layer in range(2) for name in attn],
        "mlp": [block.format(layer, "mlp", name) for layer in range(2) for name in mlp],
        "head": ["lm_head.kernel"],
    }
    odd = {"blocks.0.mlp.c_fc.kernel": jnp.ones((64, 24)), "lm_head.kernel": jnp.ones((64, 64))}
    assert list(fp8.quantise_weights(odd, ("mlp", "head"))) == ["lm_head.kernel"]
    assert fp8.quantise_weights(ones, ()) == {}


def test_evaluation_and_inference_are_in_bfloat16():
    """The same program, whatever the recipe trains in."""
    ids, params = jax.ShapeDtypeStruct((2, 16), jnp.int32), param_shapes(FP8)

    def program(config):
        return jax.jit(lambda params, ids: bind(config, params)(ids)).lower(params, ids).as_text()

    assert program(FP8) == program(BFLOAT16) and "bf16" in program(FP8)


def losses(config, mesh, num_steps, device_batch_size=ROWS):
    """Of text that can be learnt: each id is followed by the next, now and then by one more."""
    rng, owners, found = np.random.default_rng(0), Owners(config, mesh), []
    state, step = create_state(owners, TX, seed=0), make_step(owners, device_batch_size)
    with jax.set_mesh(mesh):
        for _ in range(num_steps):
            skips = 1 + (rng.integers(5, size=(ROWS, 17)) == 0)
            ids = (rng.integers(128, size=(ROWS, 1)) + skips.cumsum(axis=1)) % 128
            ids = ids.astype(np.int32)
            batch = put_batch({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, mesh)
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    return np.array(found)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [((1, 1), 4), pytest.param((8, 1), 1, marks=SLOW), pytest.param((4, 2), 4, marks=SLOW)],
    ids=["accumulated", "data", "tensor"],
)
def test_training_stays_near_bfloat16(layout, rows):
    data, tensor = layout
    mesh = make_mesh(data=data, tensor=tensor, devices=jax.devices()[: data * tensor])
    expected = losses(BFLOAT16, one_device(), 20)
    off = losses(FP8, mesh, 20, device_batch_size=rows) - expected
    assert expected[-1] < expected[0] - 2  # it did learn, so the comparison means something
    assert 0 < np.abs(off).max() < 0.02 and abs(off[-10:].mean()) < 0.01


def test_only_training_is_refused_without_the_hardware(tmp_path, monkeypatch):
    """Before any work, with one line; whoever evaluates, or has nothing to train, may go on."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    keys = {"run.name": "fp8", "model.fp8_layers": '("attn", "mlp")'}
    recipe = config.load(config.CONFIGS / "tiny.py", keys)
    with pytest.raises(UserError, match="fp8_layers"):
        train_stage(recipe, Base)
    assert not (tmp_path / "data").exists()
    assert start(recipe).model.fp8_layers == ("attn", "mlp")
