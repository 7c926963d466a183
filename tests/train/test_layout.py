"""Layouts in their order, and what a stage remembers of them."""

from functools import partial

import jax
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.train.layout import Layout, LayoutRecord, candidates, choose, note_too_large
from nanochat_jax.train.memory import (
    OutOfMemory,
    compile_lowered,
    compiled_bytes,
    in_the_step,
    outside_the_step,
)


def named(layouts) -> str:
    return " ".join(f"{layout.remat}{layout.rows}" for layout in layouts)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((32, 32, 2_048, "auto"), "none32 none16 none8 none4 names32 names16 names8 names4 "
        "full32 full16 full8 full4 full2 full1"),  # 4 x 2,048 tokens are 8,192
        ((12, 8, 4_096, "auto"), "none6 none4 none3 none2 names6 names4 names3 names2 "
        "full6 full4 full3 full2 full1"),  # divisors of 12
        ((8, 4, 64, "auto"), "none4 names4 full4 full2 full1"),  # all small: only the largest part
        ((8, 8, 1_024, "none"), "none8 none4 none2 none1"),
        ((1, 32, 64, "auto"), "none1 names1 full1"),
    ],
)  # fmt: skip
def test_the_fastest_comes_first(arguments, expected):
    assert named(candidates(*arguments)) == expected


LAYOUTS = candidates(4, 4, 4_096, "auto")  # none4 none2 names4 names2 full4 full2 full1
MADE_FOR = {"mesh": {"data": 8}, "device": "cpu", "width": 4_096}


def test_what_was_taken_is_taken_again_and_what_ran_out_never(tmp_path):
    path = tmp_path / "layout.json"
    record = LayoutRecord(path, MADE_FOR, LAYOUTS)
    assert record.taken is None and record.left() == LAYOUTS
    record.take(LAYOUTS[1], 700)
    again = LayoutRecord(path, MADE_FOR, LAYOUTS)
    assert again.taken == Layout(2, "none") and again.left() == LAYOUTS[1:] and not again.too_large

    assert note_too_large(path) == Layout(2, "none")
    assert note_too_large(path) == Layout(2, "none")  # another process, for the same reason
    again = LayoutRecord(path, MADE_FOR, LAYOUTS)
    assert again.taken is None and again.too_large == {Layout(2, "none"): 700}
    assert named(again.left()) == "names4 names2 full4 full2 full1"  # none4 was refused before
    again.take(Layout(4, "names"), 0)  # the compiler did not tell its bytes
    assert note_too_large(path) == Layout(4, "names")
    again = LayoutRecord(path, MADE_FOR, LAYOUTS)
    assert named(again.left()) == "names2 full4 full2 full1"


def test_a_record_made_for_something_else_says_nothing(tmp_path):
    path = tmp_path / "layout.json"
    LayoutRecord(path, MADE_FOR, LAYOUTS).take(LAYOUTS[3], 700)
    others = candidates(4, 2, 4_096, "auto"), candidates(4, 4, 4_096, "names")
    cases = [(MADE_FOR | {"mesh": {"data": 4}}, LAYOUTS), *((MADE_FOR, other) for other in others)]
    for made_for, layouts in cases:
        record = LayoutRecord(path, made_for, layouts)
        assert record.taken is None and record.left() == layouts
    assert LayoutRecord(path, MADE_FOR, LAYOUTS).taken == LAYOUTS[3]


def test_a_broken_record_says_what_to_do(tmp_path):
    path = tmp_path / "layout.json"
    for text in ("{", "[]", "null", '{"taken": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match="layout.json"):
            LayoutRecord(path, MADE_FOR, LAYOUTS)


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore",
        "INTERNAL: Failed to capture graph: CUDA_ERROR_OUT_OF_MEMORY",
        "INTERNAL: NCCL: Cuda failure 2 'out of memory'",
    ],
)
def test_out_of_memory_has_many_words(said):
    with pytest.raises(OutOfMemory), in_the_step():
        raise jax.errors.JaxRuntimeError(said)


GIB = 2**30
HELD = 2  # GiB of weights, gradients and optimizer state
COST = {"none": 4, "names": 2, "full": 0.5}  # GiB a row, besides
OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


class Machine:
    """A device of so many GiB; compiling is looking up what a layout needs."""

    def __init__(self, tmp_path, gib: float, remat: str = "auto"):
        self.gib, self.compiled, self.error, self.dies = gib, [], OUT, ()
        self.path, self.layouts = tmp_path / "layout.json", candidates(8, 8, 4_096, remat)

    def compile(self, layout: Layout) -> int:
        self.compiled.append(named([layout]))
        if layout in self.dies:
            raise self.error
        return int(GIB * (HELD + 1 + COST[layout.remat] * layout.rows))

    def start(self) -> Layout:
        self.compiled.clear()
        record = LayoutRecord(self.path, {}, self.layouts)
        layout = choose(record, self.compile, HELD * GIB, lambda: self.gib * GIB)
        assert record.taken == layout
        return layout


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
def test_the_first_that_fits_is_taken_and_the_hopeless_are_not_compiled(tmp_path, gib, compiled):
    machine = Machine(tmp_path, gib)
    taken = machine.start()
    assert " ".join(machine.compiled) == compiled
    assert named([taken]) == machine.compiled[-1]
    fits = [one for one in machine.layouts if HELD + 1 + COST[one.remat] * one.rows <= gib]
    assert taken == fits[0]  # skipping lost nothing


def test_a_restart_takes_the_same_and_one_with_less_memory_the_next(tmp_path):
    machine = Machine(tmp_path, 20)
    assert machine.start() == Layout(4, "none")
    machine.gib = 40  # more is free now: another layout would round otherwise
    assert machine.start() == Layout(4, "none") and machine.compiled == ["none4"]
    machine.gib = 15
    assert machine.start() == Layout(2, "none")


def test_what_ran_out_sets_the_limit(tmp_path):
    """What needs more than that is not tried, whatever the device says it has."""
    machine = Machine(tmp_path, 20)
    for expected in ("none4", "none2", "names4", "names2"):  # 19, 11, 11 and 7 GiB; names8 19
        assert named([machine.start()]) == expected
        note_too_large(machine.path)
        machine.gib = 30


def test_running_out_while_compiling_means_too_large(tmp_path):
    machine = Machine(tmp_path, 40)
    machine.dies = (Layout(8, "none"),)
    assert machine.start() == Layout(4, "none")
    machine.path.unlink()
    machine.error = jax.errors.JaxRuntimeError("INTERNAL: another thing")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another thing"):
        machine.start()


def test_nothing_fits(tmp_path):
    machine = Machine(tmp_path, 3.25)
    with pytest.raises(UserError, match=r"3.50 GiB .* 3.25 GiB"):
        machine.start()
    assert not machine.path.exists()
    machine = Machine(tmp_path, 100, remat="none")
    for rows in (8, 4, 2, 1):
        assert machine.start() == Layout(rows, "none")
        note_too_large(machine.path)
    with pytest.raises(UserError, match="layout.json"):
        machine.start()


@pytest.mark.parametrize(("stage", "key"), [("sft", "eval.device_batch_size"), ("rl", "rl.slots")])
def test_out_of_memory_elsewhere_says_what_to_lower(stage, key):
    with pytest.raises(UserError, match=f"9 bytes.*--config.{key}"), outside_the_step(stage):
        raise OUT
    for place in (outside_the_step(stage), in_the_step()):
        with pytest.raises(jax.errors.JaxRuntimeError), place:
            raise jax.errors.JaxRuntimeError("INTERNAL: other")


def test_remat_saves_memory_on_a_cpu_too():
    """XLA's CPU compiler would undo it; what comes out is the same."""
    weights, x = [jax.numpy.full((64, 64), 0.01)] * 8, jax.numpy.ones((2_048, 64))

    def loss(weights, block):
        y = x
        for weight in weights:
            y = block(y, weight)
        return y.sum()

    def block(x, weight):
        for _ in range(6):
            x = jax.numpy.sin(x @ weight)
        return x

    whole, less = (
        compile_lowered(jax.jit(jax.grad(partial(loss, block=kind))).lower(weights))
        for kind in (block, jax.checkpoint(block))
    )
    assert compiled_bytes(less) < 0.5 * compiled_bytes(whole)
    np.testing.assert_allclose(whole(weights), less(weights), rtol=1e-5)
