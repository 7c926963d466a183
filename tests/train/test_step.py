"""The step: the same result however it is split, and nothing lost when a number is not finite."""

import re
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch

CLASSIC = GPTConfig(
    vocab_size=120, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=4, seq_len=16
)
MODERN = GPTConfig(
    vocab_size=120,
    num_layers=2,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    seq_len=16,
    window_pattern="SL",
    qk_scale=1.2,
    extras=True,
)
ROWS = 16


def optimizer(config: GPTConfig):
    recipe = OptimConfig(
        recipe="modern" if config.extras else "classic",
        embed_lr=0.03,
        unembed_lr=0.004,
        matrix_lr=0.02,
        scalar_lr=0.05,
        smear_lr=0.02,
        ns_dtype=config.compute_dtype,
    )
    return build_optimizer(
        param_shapes(config),
        config.model_dim,
        recipe,
        lr_multiplier=lambda step: 1.0,
        momentum=lambda step: 0.95,
        weight_decay=lambda step: 0.1,
    )


def batches(config: GPTConfig, count: int) -> list[dict[str, np.ndarray]]:
    """Text that can be learnt: each id is followed by the next one, most of the time."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        start = rng.integers(config.vocab_size, size=(ROWS, 1))
        noise = rng.integers(5, size=(ROWS, config.seq_len + 1)) == 0
        ids = (start + np.arange(config.seq_len + 1) + noise) % config.vocab_size
        made.append(
            {"inputs": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32)}
        )
    return made


def generic(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Away from the fresh model, whose blocks add nothing.

    There the last norm undoes any scale of the residual, so the exact gradients of the residual
    scalars are 0, the computed ones rounding noise, and Adam's first step their mere sign: a coin
    toss, here and upstream, that no two reduction orders agree on.
    """
    return {
        name: value + 0.1
        if name.endswith("lambda")
        else value + 0.05 * jnp.sin(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
        if "c_proj" in name
        else value
        for name, value in params.items()
    }


def train(config: GPTConfig, mesh: Mesh, data, *, device_batch_size: int = ROWS, grad_clip=1.0):
    tx = optimizer(config)
    owners = Owners(config, mesh)
    state = owners.to_paths(create_state(owners, tx, seed=0))
    state = owners.to_owned(state._replace(params=generic(state.params)))
    step = make_train_step(
        owners, tx, device_batch_size=device_batch_size, tile_tokens=64, grad_clip=grad_clip
    )
    losses = []
    with jax.set_mesh(mesh):
        for batch in data:
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return np.array(losses), owners.to_paths(state), step


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("config", "layout"),
    [(CLASSIC, (8, 1, 1)), (CLASSIC, (1, 8, 1)), (CLASSIC, (1, 1, 8)), (MODERN, (2, 2, 2))],
    ids=["data", "fsdp", "tensor", "modern-mixed"],
)
def test_eight_devices_give_the_losses_of_one(config, layout):
    data = batches(config, 20)
    expected, _, _ = train(config, one_device(), data)
    mesh = make_mesh(data=layout[0], fsdp=layout[1], tensor=layout[2])
    losses, state, _ = train(config, mesh, data, device_batch_size=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.5  # it did learn, so the comparison means something


COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def sent(hlo: str) -> dict[str, list[tuple[int, ...]]]:
    """{operation: shapes of its results} of a compiled module; none may hide in a loop.

    A computation's name starts its first line; only the entry's operations run once a call.
    """
    found, computation = defaultdict(list), ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            computation = line.split()[0]
        elif match := re.search(r" = (.*?) " + COLLECTIVES, line):
            assert computation == "ENTRY", f"in {computation}: {line}"
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found[match[2]] += [tuple(map(int, filter(None, s.split(",")))) for s in shapes]
    return {name: sorted(shapes) for name, shapes in found.items()}


@pytest.mark.parametrize(
    ("config", "layout"),
    [(CLASSIC, (8, 1)), (CLASSIC, (1, 8)), (MODERN, (2, 4))],
    ids=["data", "fsdp", "modern-mixed"],
)
def test_a_step_gathers_once_and_scatters_once(config, layout):
    mesh, tx = make_mesh(data=layout[0], fsdp=layout[1]), optimizer(config)
    owners = Owners(config, mesh)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=8, grad_clip=1.0)
    state, ids = abstract_state(owners, tx), jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    with jax.set_mesh(mesh):
        hlo = step.lower(state, {"inputs": ids, "targets": ids}).compile().as_text()
    assert len(re.findall(r" while\(", hlo)) >= 2  # over microbatches, over tiles of the loss
    found, small = sent(hlo), owners.everywhere
    whole = [leaf for name, leaf in state.params.items() if name not in small]
    assert found.pop("all-gather") == sorted(leaf.shape for leaf in whole)
    assert found.pop("reduce-scatter") == sorted(
        (leaf.shape[0] // mesh.size, *leaf.shape[1:]) for leaf in whole
    )
    sums = found.pop("all-reduce")
    numbers = {state.params[name].shape for name in small} | {()}
    assert set(sums) <= numbers and not found


def test_weights_travel_in_the_compute_dtype_and_gradients_in_float32():
    """Asked of the program before compiling: XLA for CPUs widens every bfloat16 collective."""
    config, mesh = replace(CLASSIC, compute_dtype="bfloat16"), make_mesh(data=8)
    tx, ids = optimizer(config), jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    owners = Owners(config, mesh)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=8)
    with jax.set_mesh(mesh):
        state = abstract_state(owners, tx)
        program = step.lower(state, {"inputs": ids, "targets": ids}).as_text()
    gathered = re.findall(r"stablehlo.all_gather.*-> tensor<[\dx]+x(\w+)>", program)
    scattered = re.findall(r"reduce_scatter\".*?-> tensor<[\dx]+x(\w+)>", program, re.DOTALL)
    assert gathered == ["bf16"] * len(state.params)
    assert scattered == ["f32"] * len(state.params)


def test_muon_divides_its_work_among_the_devices():
    """Per device the matmuls of the matrices it owns, by the closed form, and nothing sent."""
    mesh, tx = make_mesh(data=2, fsdp=4), optimizer(CLASSIC)
    state = abstract_state(Owners(CLASSIC, mesh), tx)
    update = jax.jit(lambda grads, state: tx.update(grads, state.opt_state, state.params))
    with jax.numpy_dtype_promotion("standard"):
        compiled = update.lower(state.params, state).compile()
    assert sent(compiled.as_text()) == {}
    shapes = {name: leaf.shape for name, leaf in state.params.items() if "blocks" in name}
    # 2 layers of 4 square matrices; 2 of each MLP shape, padded to one for each device
    assert shapes == {name: (8, *map(int, name[7:].split("x"))) for name in shapes}
    flops = 0
    for stack, *matrix in shapes.values():
        m, n = sorted(matrix)
        flops += stack // mesh.size * 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    counted = compiled.cost_analysis()["flops"]
    assert flops < counted < 1.1 * flops


def test_accumulation_does_not_change_the_result():
    data = batches(CLASSIC, 5)
    expected, whole, _ = train(CLASSIC, one_device(), data)
    for device_batch_size in (1, 4):
        losses, state, _ = train(CLASSIC, one_device(), data, device_batch_size=device_batch_size)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        for name, value in state.params.items():
            np.testing.assert_allclose(value, whole.params[name], atol=3e-5, err_msg=name)


def test_loss_is_the_mean_over_trained_tokens_of_the_whole_batch():
    (batch,) = batches(CLASSIC, 1)
    batch["targets"][:3] = -1  # with one row at a time, whole microbatches have nothing to train
    batch["targets"][5, 4:] = -1
    split, _, _ = train(CLASSIC, one_device(), [batch], device_batch_size=1)
    whole, _, _ = train(CLASSIC, one_device(), [batch])
    np.testing.assert_allclose(split, whole, rtol=1e-6)
    kept = {name: rows[3:] for name, rows in batch.items()}
    without, _, _ = train(CLASSIC, one_device(), [kept])
    np.testing.assert_allclose(whole, without, rtol=1e-6)


def test_width_and_filling_do_not_matter():
    """Columns and rows of padding, whole microbatches of it; and the loss is the naive mean."""
    (batch,) = batches(CLASSIC, 1)
    batch["targets"][:, 9:] = -1
    batch["targets"][::3, :4] = -1
    narrow = {name: rows[:, :9] for name, rows in batch.items()}
    more = ((0, ROWS), (0, 0))
    filled = {
        n: np.pad(rows, more, constant_values=-(n == "targets")) for n, rows in narrow.items()
    }
    wide, _, _ = train(CLASSIC, one_device(), [batch, batch])
    padded, _, _ = train(CLASSIC, make_mesh(data=8), [filled, filled], device_batch_size=2)
    owners = Owners(CLASSIC, one_device())
    params = generic(owners.by_path(create_state(owners, optimizer(CLASSIC), seed=0).params))
    model = bind(CLASSIC, params)
    logits = jax.jit(lambda ids: model.logits(model.hidden(ids)))(narrow["inputs"])
    log_probs, targets = jax.nn.log_softmax(logits), narrow["targets"]
    said = np.take_along_axis(np.asarray(log_probs), np.maximum(targets, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(wide[0], -said[targets >= 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(padded, wide, rtol=1e-5)


def test_weights_of_a_batch_stand_in_for_the_mean():
    """Signed ones too, however the batch is split; equal ones are the mean, zeros teach nothing."""
    (batch,) = batches(CLASSIC, 1)
    rng, shape = np.random.default_rng(0), batch["targets"].shape
    even = np.full(shape, 1 / batch["targets"].size, np.float32)
    signed = even * rng.standard_normal(shape).astype(np.float32)
    weighted = [batch | {"weights": w} for w in (even, signed, signed, 0 * even, 0 * even)]
    losses, _, _ = train(CLASSIC, one_device(), weighted)
    plain, _, _ = train(CLASSIC, one_device(), [batch])
    np.testing.assert_allclose(losses[0], plain[0], rtol=1e-6)
    assert losses[2] < losses[1] - 1e-3 and losses[3] == losses[4] == 0
    split, _, _ = train(CLASSIC, make_mesh(data=4, fsdp=2), weighted, device_batch_size=1)
    np.testing.assert_allclose(split, losses, rtol=1e-5, atol=1e-6)


def test_a_batch_without_targets_changes_no_loss_to_nan():
    (batch,) = batches(CLASSIC, 1)
    batch["targets"][:] = -1
    losses, state, _ = train(CLASSIC, one_device(), [batch])
    assert losses[0] == 0 and int(state.step) == 1
    assert all(np.isfinite(value).all() for value in state.params.values())


def test_gradient_clipping_bounds_what_the_optimizer_sees():
    data = batches(CLASSIC, 3)
    free, _, _ = train(CLASSIC, one_device(), data, grad_clip=0.0)
    loose, _, _ = train(CLASSIC, one_device(), data, grad_clip=1e9)
    np.testing.assert_array_equal(free, loose)
    # Muon and Adam forget the gradient's size over time, but not between unequal gradients.
    tight, _, _ = train(CLASSIC, one_device(), data, grad_clip=1e-4)
    assert not np.array_equal(free, tight)


def test_a_not_finite_step_leaves_the_state_as_it_was():
    mesh, (batch,) = one_device(), batches(CLASSIC, 1)
    tx, owners = optimizer(CLASSIC), Owners(CLASSIC, mesh)
    step = make_train_step(owners, tx, device_batch_size=ROWS, tile_tokens=64)
    state = create_state(owners, tx, seed=0)
    broken = state.params["blocks.256x64"].at[1, 0, 0].set(jnp.nan)
    state = state._replace(params=state.params | {"blocks.256x64": broken})
    before = jax.tree.map(np.array, state)
    with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(batch, mesh))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)


def test_the_step_compiles_once():
    _, _, step = train(CLASSIC, one_device(), batches(CLASSIC, 4))
    assert step._cache_size() == 1


def test_initial_parameters_do_not_depend_on_the_layout():
    tx = optimizer(MODERN)
    one, many = (
        owners.to_paths(create_state(owners, tx, seed=3)).params
        for mesh in (one_device(), make_mesh(data=2, fsdp=2, tensor=2))
        for owners in [Owners(MODERN, mesh)]
    )
    for name, value in one.items():
        np.testing.assert_array_equal(value, many[name], err_msg=name)


def test_layouts_that_do_not_fit_say_so():
    with pytest.raises(UserError, match=r"3 x 2 x 1 needs 6 devices, got 8"):
        make_mesh(data=3, fsdp=2)
    narrow = GPTConfig(
        vocab_size=100, num_layers=1, model_dim=20, num_heads=1, num_kv_heads=1, seq_len=8
    )
    with pytest.raises(UserError, match="cannot be split 8 ways over mesh axis 'fsdp'"):
        param_shardings(make_mesh(fsdp=8), param_shapes(narrow))
