"""The step: the same result however it is split, and nothing lost when a number is not finite."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from nanochat_jax.common import UserError
from nanochat_jax.model.gpt import GPTConfig, bind, param_shapes
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.optim.build import OptimConfig, build_optimizer
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import TrainState, abstract_state, create_state
from nanochat_jax.train.step import make_train_step, put_batch

CLASSIC = GPTConfig(
    vocab_size=120, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=4, seq_len=16
)
MODERN = replace(CLASSIC, num_kv_heads=2, window_pattern="SL", qk_scale=1.2, extras=True)
ROWS, AXES = 16, ("data", "fsdp", "tensor")


def optimizer(config: GPTConfig):
    name, rates = "modern" if config.extras else "classic", (0.03, 0.004, 0.02, 0.05, 0.02)
    recipe = OptimConfig(name, *rates, ns_dtype=config.compute_dtype)
    constants = {"lr_multiplier": 1.0, "momentum": 0.95, "weight_decay": 0.1}
    schedules = {key: lambda step, value=value: value for key, value in constants.items()}
    return build_optimizer(param_shapes(config), config.model_dim, recipe, **schedules)


def batches(config: GPTConfig, count: int) -> list[dict[str, np.ndarray]]:
    """Text that can be learnt: each id is followed by the next one, most of the time."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        start = rng.integers(config.vocab_size, size=(ROWS, 1))
        noise = rng.integers(5, size=(ROWS, config.seq_len + 1)) == 0
        ids = (start + np.arange(config.seq_len + 1) + noise) % config.vocab_size
        ids = ids.astype(np.int32)
        made.append({"inputs": ids[:, :-1], "targets": ids[:, 1:]})
    return made


def generic(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Away from the fresh model, whose blocks add nothing.

    There the exact gradients of the residual scalars are 0 (the last norm undoes any scale), and
    Adam's first step is the sign of their rounding noise, on which no two reduction orders agree.
    """

    def moved(name: str, value: jax.Array) -> jax.Array:
        wave = 0.05 * jnp.sin(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
        return value + (0.1 if name.endswith("lambda") else wave if "c_proj" in name else 0.0)

    return {name: moved(name, value) for name, value in params.items()}


def train(config: GPTConfig, mesh: Mesh, data, *, device_batch_size: int = ROWS, grad_clip=1.0):
    """(losses, the last state, owned)"""
    owners, tx, losses = Owners(config, mesh), optimizer(config), []
    step = make_train_step(
        owners, tx, device_batch_size=device_batch_size, tile_tokens=64, grad_clip=grad_clip
    )
    state = owners.to_owned(first_state(config))
    with jax.set_mesh(mesh):
        for batch in data:
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "it compiles once"
    return np.array(losses), state


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


@cache
def first_state(config: GPTConfig) -> TrainState:
    """By path, in NumPy."""
    owners = Owners(config, one_device())
    state = owners.to_paths(create_state(owners, optimizer(config), seed=0))
    return jax.tree.map(np.asarray, state._replace(params=generic(state.params)))


@cache
def on_one_device(config: GPTConfig, num_steps: int):
    return train(config, one_device(), batches(config, num_steps))


@pytest.mark.parametrize(
    ("config", "layout", "rows", "num_steps"),
    [
        (CLASSIC, (8, 1, 1), 1, 20),
        (CLASSIC, (1, 8, 1), 1, 5),
        (CLASSIC, (1, 1, 8), 8, 5),
        (MODERN, (2, 2, 2), 2, 5),
    ],
    ids=["data", "fsdp", "tensor", "modern-mixed"],
)
def test_eight_devices_give_the_losses_of_one(config, layout, rows, num_steps):
    mesh, data = make_mesh(**dict(zip(AXES, layout, strict=True))), batches(config, num_steps)
    losses, _ = train(config, mesh, data, device_batch_size=rows)
    np.testing.assert_allclose(losses, on_one_device(config, num_steps)[0], rtol=1e-5)
    assert losses[-1] < losses[0] - 0.025 * num_steps  # it did learn


COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def sent(hlo: str) -> dict[str, list[tuple[int, ...]]]:
    """{operation: shapes of its results} of a compiled module; none may be in a loop."""
    found, computation = defaultdict(list), ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            computation = line.split()[0]  # its name, or ENTRY, which runs once a call
        elif match := re.search(r" = (.*?) " + COLLECTIVES, line):
            assert computation == "ENTRY", f"in {computation}: {line}"
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found[match[2]] += [tuple(map(int, filter(None, s.split(",")))) for s in shapes]
    return {name: sorted(shapes) for name, shapes in found.items()}


def lower(config: GPTConfig, mesh: Mesh):
    """(Owners, shapes of the state, the lowered step of one row at once)"""
    owners, tx = Owners(config, mesh), optimizer(config)
    step = make_train_step(owners, tx, device_batch_size=1, tile_tokens=8, grad_clip=1.0)
    state, ids = abstract_state(owners, tx), jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    with jax.set_mesh(mesh):
        return owners, state, step.lower(state, {"inputs": ids, "targets": ids})


@pytest.mark.parametrize(
    ("config", "layout"),
    [(CLASSIC, (8, 1)), (CLASSIC, (1, 8)), pytest.param(MODERN, (2, 4), marks=pytest.mark.slow)],
    ids=["data", "fsdp", "modern-mixed"],
)
def test_a_step_gathers_once_and_scatters_once(config, layout):
    mesh = make_mesh(data=layout[0], fsdp=layout[1])
    owners, state, lowered = lower(config, mesh)
    hlo = lowered.compile().as_text()
    assert len(re.findall(r" while\(", hlo)) >= 2  # over microbatches, over tiles of the loss
    found, small = sent(hlo), owners.everywhere
    whole = [leaf for name, leaf in state.params.items() if name not in small]
    assert found.pop("all-gather") == sorted(leaf.shape for leaf in whole)
    shares = ((leaf.shape[0] // mesh.size, *leaf.shape[1:]) for leaf in whole)
    assert found.pop("reduce-scatter") == sorted(shares)
    sums = found.pop("all-reduce")
    numbers = {state.params[name].shape for name in small} | {()}
    assert set(sums) <= numbers and not found


def test_weights_travel_in_the_compute_dtype_and_gradients_in_float32():
    """Asked of the program before compiling: XLA for CPUs widens every bfloat16 collective."""
    _, state, lowered = lower(replace(CLASSIC, compute_dtype="bfloat16"), make_mesh(data=8))
    program = lowered.as_text()
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


@pytest.mark.parametrize("rows", [1, 4])
def test_accumulation_does_not_change_the_result(rows):
    expected, whole = on_one_device(CLASSIC, 5)
    losses, state = train(CLASSIC, one_device(), batches(CLASSIC, 5), device_batch_size=rows)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, whole.params[name], atol=3e-5, err_msg=name)


def test_loss_is_the_mean_over_trained_tokens_of_the_whole_batch():
    """And 0 of a batch without any."""
    batch, nothing = batches(CLASSIC, 2)
    batch["targets"][:3] = -1  # with one row at a time, whole microbatches have nothing to train
    batch["targets"][5, 4:] = -1
    nothing["targets"][:] = -1
    split, state = train(CLASSIC, one_device(), [batch, nothing], device_batch_size=1)
    whole, _ = train(CLASSIC, one_device(), [batch])
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-6)
    kept = {name: rows[3:] for name, rows in batch.items()}
    without, _ = train(CLASSIC, one_device(), [kept])
    np.testing.assert_allclose(whole, without, rtol=1e-6)
    assert split[1] == 0 and int(state.step) == 2
    assert all(np.isfinite(value).all() for value in state.params.values())


def test_width_and_filling_do_not_matter():
    """Columns and rows of padding, whole microbatches of it; and the loss is the naive mean."""
    (batch,) = batches(CLASSIC, 1)
    batch["targets"][:, 9:] = -1
    batch["targets"][::3, :4] = -1
    narrow = {name: rows[:, :9] for name, rows in batch.items()}
    more = ((0, ROWS), (0, 0))
    filled = {n: np.pad(a, more, constant_values=-(n == "targets")) for n, a in narrow.items()}
    wide, _ = train(CLASSIC, one_device(), [batch, batch])
    padded, _ = train(CLASSIC, make_mesh(data=8), [filled, filled], device_batch_size=2)
    model = bind(CLASSIC, jax.tree.map(jnp.asarray, first_state(CLASSIC).params))
    logits = jax.jit(lambda ids: model(ids))(narrow["inputs"])
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
    losses, _ = train(CLASSIC, one_device(), weighted)
    np.testing.assert_allclose(losses[0], on_one_device(CLASSIC, 5)[0][0], rtol=1e-6)
    assert losses[2] < losses[1] - 1e-3 and losses[3] == losses[4] == 0
    split, _ = train(CLASSIC, make_mesh(data=4, fsdp=2), weighted, device_batch_size=1)
    np.testing.assert_allclose(split, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1e-4])
def test_gradient_clipping_bounds_what_the_optimizer_sees(clip):
    """With plain gradient descent, whose update is the gradient that it sees."""
    mesh, tx, (batch,) = one_device(), optax.sgd(1.0), batches(CLASSIC, 1)
    owners = Owners(CLASSIC, mesh)
    step = make_train_step(owners, tx, device_batch_size=ROWS, tile_tokens=64, grad_clip=clip)
    with jax.set_mesh(mesh):
        _, metrics = step(create_state(owners, tx, seed=0), put_batch(batch, mesh))
    expected = clip or float(metrics["grad_norm"])
    assert float(metrics["update_norm"]) == pytest.approx(expected, rel=1e-5)


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


def test_initial_parameters_do_not_depend_on_the_layout():
    meshes = one_device(), make_mesh(data=2, fsdp=2, tensor=2)
    one, many = (
        owners.to_paths(create_state(owners, optax.identity(), seed=3)).params
        for owners in (Owners(replace(MODERN, num_layers=1), mesh) for mesh in meshes)
    )
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_layouts_that_do_not_fit_say_so():
    with pytest.raises(UserError, match=r"3 x 2 x 1 needs 6 devices, got 8"):
        make_mesh(data=3, fsdp=2)
    narrow = replace(CLASSIC, model_dim=20)
    with pytest.raises(UserError, match="config.mesh.fsdp"):
        param_shardings(make_mesh(fsdp=8), param_shapes(narrow))
