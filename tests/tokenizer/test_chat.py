"""Rendered conversations against upstream's and against their plain-text template."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import (
    cut_at_turn,
    render_conversation,
    render_for_completion,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXT = json.loads((GOLDENS / "text.json").read_text())
TOKENIZER = Tokenizer.load(GOLDENS)
END = TOKENIZER.special_id("<|assistant_end|>")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("row", TEXT["conversations"])
def test_goldens(row):
    ids, mask = render_conversation(TOKENIZER, row["conversation"])
    assert ids[: row["max_tokens"]] == row["ids"]
    assert mask[: row["max_tokens"]] == row["mask"]
    assert render_for_completion(TOKENIZER, row["conversation"]) == row["for_completion"]


text = st.text(max_size=12) | st.sampled_from(["<|assistant_end|>", "<|bos|>", "2+2"])
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output"]), "text": text}
)
content = text | st.lists(part, max_size=4)
turns = st.lists(st.tuples(text, content), min_size=1, max_size=3)
WRAPPED = {
    "text": "{}",
    "python": "<|python_start|>{}<|python_end|>",
    "python_output": "<|output_start|>{}<|output_end|>",
}


def template(said):
    """(all of it, the trained part of it) of an assistant's content, as text."""
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
    whole = [WRAPPED[part["type"]].replace("{}", part["text"], 1) for part in parts]
    trained = [
        text for text, part in zip(whole, parts, strict=True) if part["type"] != "python_output"
    ]
    return "".join(whole), "".join(trained) + "<|assistant_end|>"


@settings(max_examples=60, deadline=None)
@given(turns, st.none() | text)
def test_ids_and_mask_say_what_the_template_says(turns, system):
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    expected, trained = "<|bos|>", ""
    for number, (asked, said) in enumerate(turns):
        if number == 0 and system is not None:
            asked = f"{system}\n\n{asked}"
        whole, learned = template(said)
        prompt = f"{expected}<|user_start|>{asked}<|user_end|><|assistant_start|>"
        expected = f"{prompt}{whole}<|assistant_end|>"
        trained += learned
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    ids, mask = render_conversation(TOKENIZER, {"messages": messages})
    assert TOKENIZER.decode(ids) == expected
    assert len(mask) == len(ids) and set(mask) <= {0, 1}
    assert TOKENIZER.decode([i for i, m in zip(ids, mask, strict=True) if m]) == trained
    # Special ids mark the turns and nothing else, whatever the text spells out.
    assert ids.count(TOKENIZER.bos_id) == 1 and ids.count(END) == len(turns)

    before = json.dumps(messages)
    completion = render_for_completion(TOKENIZER, {"messages": messages})
    assert TOKENIZER.decode(completion) == prompt
    assert render_for_completion(TOKENIZER, {"messages": messages[:-1]}) == completion
    assert json.dumps(messages) == before


@settings(max_examples=60, deadline=None)
@given(turns, st.integers(0, 80))
def test_a_long_conversation_is_cut_at_the_last_turn_that_fits(turns, limit):
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    ids, mask = render_conversation(TOKENIZER, {"messages": messages})
    shorter = [
        render_conversation(TOKENIZER, {"messages": messages[: 2 * count]})
        for count in range(1, len(turns) + 1)
    ]
    fitting = [whole for whole in shorter if len(whole[0]) <= limit]
    cut = cut_at_turn(ids, mask, limit, END)
    if fitting:
        assert cut == fitting[-1]
    elif any(mask[:limit]):
        assert cut == (ids[:limit], mask[:limit])  # the beginning of the first answer
    else:
        assert cut == ([], [])


def system(content):
    return {"role": "system", "content": content}


MALFORMED = [
    (None, ""),
    ([], ""),
    ("hi", ""),
    (["hi"], 0),
    ([{"role": "user"}], 0),
    ([assistant("a")], 0),
    ([user("a"), user("b")], 1),
    ([system("s")], ""),
    ([system(1), user("a")], 0),
    ([system("s"), assistant("a")], 1),
    ([user([{"type": "text", "text": "a"}])], 0),
    ([user("a"), assistant(None)], 1),
    ([user("a"), assistant([{"type": ["text"], "text": ""}])], 1),
    ([user("a"), assistant([{"type": "text", "text": 3}])], 1),
    ([user("a"), assistant(["x" * 10**6])], 1),
]


@pytest.mark.parametrize("messages, number", MALFORMED)
def test_a_malformed_conversation_is_told_in_one_short_line(messages, number):
    for render in (render_conversation, render_for_completion):
        with pytest.raises(UserError, match=f"message.*{number}") as caught:
            render(TOKENIZER, {"messages": messages})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
