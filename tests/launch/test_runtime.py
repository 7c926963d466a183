"""Which layout of a step is taken, by what the compiler says each needs."""

import jax
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.launch import runtime
from nanochat_jax.train.layout import Layout, LayoutRecord, candidates, note_too_large

GIB = 2**30
HELD = 2  # GiB of weights, gradients and optimizer state
COST = {"none": 4, "names": 2, "full": 0.5}  # GiB a row, besides
OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


class Machine:
    """A device of so many GiB; compiling is looking up what a layout needs."""

    def __init__(self, monkeypatch, tmp_path, gib: float, remat: str = "auto"):
        self.gib, self.compiled, self.dies = gib, [], ()
        self.path, self.layouts = tmp_path / "layout.json", candidates(8, 8, 4_096, remat)
        monkeypatch.setattr(runtime, "compile_step", self._compile)
        monkeypatch.setattr(runtime, "compiled_bytes", lambda step: int(step() * GIB))
        monkeypatch.setattr(runtime, "available_bytes", lambda mesh: self.gib * GIB)
        monkeypatch.setattr(runtime, "_held_bytes", lambda state: HELD * GIB)

    def _compile(self, _step, layout: Layout, state, rows, width, mesh, **kind):
        if width == 64:
            self.compiled.append(f"{layout.remat}{layout.rows}")
        if layout in self.dies:
            raise OUT
        gib = HELD + 1 + COST[layout.remat] * layout.rows
        return lambda *call: (layout, width) if call else gib

    def start(self):
        self.compiled.clear()
        record = LayoutRecord(self.path, {}, self.layouts)
        step = runtime.step_for_widths(lambda layout: layout, record, None, 16, 64, None)
        return record.taken, step


@pytest.mark.parametrize(
    "gib, compiled",
    [
        (40, "none8"),
        # 35 GiB for 8 rows: 4 need 18.5 or more, which is too much, 2 may fit in 10.25 and do not.
        (10.5, "none8 none2 names8 names4 names2"),
        (20, "none8 none4"),
        (6, "none8 names8 full8 full4"),
    ],
)
def test_the_first_that_fits_is_taken_and_the_hopeless_are_not_compiled(
    monkeypatch, tmp_path, capsys, gib, compiled
):
    machine = Machine(monkeypatch, tmp_path, gib)
    taken, step = machine.start()
    assert " ".join(machine.compiled) == compiled and str(taken) in capsys.readouterr().out
    assert f"{taken.remat}{taken.rows}" == machine.compiled[-1]
    fits = [one for one in machine.layouts if HELD + 1 + COST[one.remat] * one.rows <= gib]
    assert taken == fits[0]  # skipping lost nothing
    # Widths that come later are compiled in the same layout, and nobody asks for memory again.
    machine.gib = 0
    assert step(None, {"inputs": np.zeros((16, 32))}) == (taken, 32)


def test_a_restart_takes_the_same_and_one_with_less_memory_the_next(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, 20)
    assert machine.start()[0] == Layout(4, "none")
    machine.gib = 40  # more is free now: another layout would round otherwise
    assert machine.start()[0] == Layout(4, "none") and machine.compiled == ["none4"]
    machine.gib = 15
    assert "rounding only" not in capsys.readouterr().out
    assert machine.start()[0] == Layout(2, "none")
    assert "was 4 rows at once, remat none; from here on losses agree up to rounding only" in (
        capsys.readouterr().out
    )


def test_what_ran_out_sets_the_limit(monkeypatch, tmp_path):
    """What needs more than that is not tried, whatever the device says it has."""
    machine = Machine(monkeypatch, tmp_path, 20)
    for expected in ("none4", "none2", "names4", "names2"):  # 19, 11, 11 and 7 GiB; names8 19
        taken = machine.start()[0]
        assert f"{taken.remat}{taken.rows}" == expected
        note_too_large(machine.path)
        machine.gib = 30


def test_running_out_while_compiling_means_too_large(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, 40)
    machine.dies = (Layout(8, "none"),)
    assert machine.start()[0] == Layout(4, "none")
    machine.path.unlink()
    monkeypatch.setattr(runtime, "is_out_of_memory", lambda error: False)
    with pytest.raises(jax.errors.JaxRuntimeError):
        machine.start()


def test_nothing_fits(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, 3.25)
    with pytest.raises(
        UserError,
        match=r"^with 1 row at once, remat full a step needs 3.50 GiB per device, there are "
        r"3.25 GiB, 256.0 MiB too few; leave --config.model.remat=auto, split",
    ):
        machine.start()
    assert not machine.path.exists()
    machine = Machine(monkeypatch, tmp_path, 100, remat="none")
    for rows in (8, 4, 2, 1):
        assert machine.start()[0] == Layout(rows, "none")
        note_too_large(machine.path)
    with pytest.raises(UserError, match="layout.json says that every layout ran out of memory; "):
        machine.start()


def test_out_of_memory_elsewhere_says_what_to_lower():
    with pytest.raises(UserError, match="9 bytes.*lower --config.eval.device_batch_size or"):
        with runtime.outside_the_step("sft"):
            raise OUT
    with pytest.raises(UserError, match="lower --config.rl.slots"):
        with runtime.outside_the_step("rl"):
            raise OUT
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with runtime.outside_the_step("rl"):
            raise jax.errors.JaxRuntimeError("INTERNAL: other")


def test_remat_saves_memory_on_a_cpu_too():
    """XLA's CPU compiler would undo it; what comes out is the same."""
    weights = [jax.numpy.full((64, 64), 0.01)] * 8
    x = jax.numpy.ones((2_048, 64))

    def loss(weights, block):
        y = x
        for weight in weights:
            y = block(y, weight)
        return y.sum()

    def block(x, weight):
        for _ in range(6):
            x = jax.numpy.sin(x @ weight)
        return x

    sizes, results = [], []
    for kind in (block, jax.checkpoint(block)):
        step = jax.jit(jax.grad(lambda weights, kind=kind: loss(weights, kind)))
        compiled = runtime.compile_lowered(step.lower(weights))
        sizes.append(runtime.compiled_bytes(compiled))
        results.append(compiled(weights))
    assert sizes[1] < 0.5 * sizes[0]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
