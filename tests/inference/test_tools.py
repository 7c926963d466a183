"""The calculator as the engine calls it."""

import pytest

from nanochat_jax.inference.tools import make_tools


@pytest.mark.parametrize(
    ("said", "answer"),
    [("12/60", "0.2"), ("1,000*3", "3000"), ("'straw'.count('r')", "1"), ("2**100", ""), ("", "")],
)
def test_a_value_is_framed_as_in_training_and_what_has_none_forces_nothing(
    said, answer, tiny_tokenizer
):
    tool = make_tools(["calculator"], tiny_tokenizer)["calculator"]
    special = tiny_tokenizer.special_id
    assert (tool.start_id, tool.end_id) == (special("<|python_start|>"), special("<|python_end|>"))
    forced = tiny_tokenizer.decode(tool.run(tiny_tokenizer.encode(said)))
    assert forced == (f"<|output_start|>{answer}<|output_end|>" if answer else "")
