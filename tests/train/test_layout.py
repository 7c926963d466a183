"""Layouts in their order, and what a stage remembers of them."""

import json

import jax
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.train.layout import (
    Layout,
    LayoutRecord,
    OutOfMemory,
    candidates,
    in_the_step,
    note_too_large,
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
    again.take(Layout(4, "names"), 600)
    assert note_too_large(path) == Layout(4, "names")
    again = LayoutRecord(path, MADE_FOR, LAYOUTS)
    assert named(again.left()) == "names2 full4 full2 full1"
    assert sorted(again.too_large.values()) == [600, 700]


def test_what_ran_out_is_not_taken_again_though_its_bytes_are_unknown(tmp_path):
    path = tmp_path / "layout.json"
    LayoutRecord(path, MADE_FOR, LAYOUTS).take(LAYOUTS[0], 0)
    note_too_large(path)
    assert LayoutRecord(path, MADE_FOR, LAYOUTS).left() == LAYOUTS[1:]


def test_a_record_made_for_something_else_says_nothing(tmp_path):
    path = tmp_path / "layout.json"
    LayoutRecord(path, MADE_FOR, LAYOUTS).take(LAYOUTS[3], 700)
    for made_for, layouts in (
        (MADE_FOR | {"mesh": {"data": 4}}, LAYOUTS),
        (MADE_FOR, candidates(4, 2, 4_096, "auto")),
        (MADE_FOR, candidates(4, 4, 4_096, "names")),
    ):
        record = LayoutRecord(path, made_for, layouts)
        assert record.taken is None and record.left() == layouts
    assert LayoutRecord(path, MADE_FOR, LAYOUTS).taken == LAYOUTS[3]


def test_a_broken_record_says_what_to_do(tmp_path):
    path = tmp_path / "layout.json"
    LayoutRecord(path, MADE_FOR, LAYOUTS).take(LAYOUTS[3], 700)
    assert json.loads(path.read_text())["taken"] == {"rows": 2, "remat": "names", "bytes": 700}
    path.write_text("{")
    with pytest.raises(UserError, match="layout.json is not valid JSON .*; delete"):
        LayoutRecord(path, MADE_FOR, LAYOUTS)
    for text in ("[]", "null", '{"taken": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match="expected made_for, taken, too_large; delete"):
            LayoutRecord(path, MADE_FOR, LAYOUTS)


@pytest.mark.parametrize(
    "said, expected",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore", True),
        ("INTERNAL: Failed to capture graph: CUDA_ERROR_OUT_OF_MEMORY", True),
        ("INTERNAL: NCCL: Cuda failure 2 'out of memory'", True),
        ("INTERNAL: another thing", False),
    ],
)
def test_out_of_memory_has_many_words(said, expected):
    kind = OutOfMemory if expected else jax.errors.JaxRuntimeError
    with pytest.raises(kind) as caught, in_the_step():
        raise jax.errors.JaxRuntimeError(said)
    assert str(caught.value) == said.partition("\n")[0]
