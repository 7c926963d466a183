"""The calculator as the engine calls it."""

import pytest

from nanochat_jax.inference.tools import make_tool


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("12/60", "0.2"), ("1,000*3", "3000"), ("'strawberry'.count('r')", "3")],
)
def test_a_value_is_framed_as_in_training(expression, answer, tiny_tokenizer):
    tool = make_tool("calculator", tiny_tokenizer)
    forced = tool.run(tiny_tokenizer.encode(expression))
    assert forced[0] == tiny_tokenizer.special_id("<|output_start|>")
    assert forced[-1] == tiny_tokenizer.special_id("<|output_end|>")
    assert tiny_tokenizer.decode(forced[1:-1]) == answer
    assert tool.start_id == tiny_tokenizer.special_id("<|python_start|>")
    assert tool.end_id == tiny_tokenizer.special_id("<|python_end|>")


@pytest.mark.parametrize("expression", ["", "2**100", "open('x')", "1/0"])
def test_what_has_no_value_forces_nothing(expression, tiny_tokenizer):
    assert make_tool("calculator", tiny_tokenizer).run(tiny_tokenizer.encode(expression)) == []
