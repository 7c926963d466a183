"""Pieces of tokens read back: against the whole text, looked at character by character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.inference.request import Completion
from nanochat_jax.serve.answers import Answer, add_part, chat_logprobs, text_logprobs, token_text

CALL = ["<|python_start|>", "2*3", "<|python_end|>", "<|output_start|>", "6", "<|output_end|>"]


def ids_of(tokenizer, words):
    """Bytes of each word; a special token's name is that token."""
    ids = []
    for word in words:
        special = tokenizer.special.get(word)
        ids += (
            [tokenizer.ranks[bytes([b])] for b in word.encode()] if special is None else [special]
        )
    return ids


def read(answer, ids, finish, cuts):
    """The deltas of ids handed over in pieces that end at `cuts`."""
    deltas, ends = [], sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)})
    for begin, end in zip([0, *ends], ends, strict=False):
        new = ids[begin:end]
        last = finish if end == len(ids) else ""
        deltas.append(answer.feed(Completion(new, [-1.0] * len(new), [True] * len(new), last)))
        if answer.finish:
            break
    return deltas


def first_stop(text, stops):
    """What is left before the stop string that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(
    text=st.text("abé船", min_size=1, max_size=30),
    stops=st.lists(st.text("abé船", min_size=1, max_size=5), max_size=4),
    cuts=st.sets(st.integers(1, 60), max_size=20),
)
def test_stop_strings_end_the_text_wherever_it_is_cut(tiny_tokenizer, text, stops, cuts):
    expected, stopped = first_stop(text, stops)
    ids = ids_of(tiny_tokenizer, [text])
    deltas = read(Answer(tiny_tokenizer, stops, scored=True), ids, "length", cuts)
    assert "".join(delta.text for delta in deltas) == expected
    assert deltas[-1].finish == ("stop" if stopped else "length")
    assert not any(delta.finish for delta in deltas[:-1])
    sent = ""
    for delta in deltas:  # nothing is sent that a stop string could still take back
        sent += delta.text
        assert expected.startswith(sent)
    scores = [score for delta in deltas for score in delta.scores]
    bytes_sent = tiny_tokenizer.decode_bytes([score.id for score in scores])
    assert bytes_sent == expected.encode()


def test_a_tools_parts_are_no_text(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, ["It is ", *CALL, *CALL, "6é.", "<|assistant_end|>"])
    for cuts in ([], range(len(ids)), [3, 9, 30]):
        answer = Answer(
            tiny_tokenizer, ["2*3", "is6"], scored=True
        )  # nor do stop strings look into them
        deltas = read(answer, ids, "stop", cuts)
        assert "".join(delta.text for delta in deltas) == "It is 6é."
        called = [("python", "2*3"), ("python_output", "6")]
        parts = []
        for part in (part for delta in deltas for part in delta.parts):
            add_part(parts, part)
        shown = [(part["type"], part["text"]) for part in parts]
        assert shown == [("text", "It is "), *called, *called, ("text", "6é.")]
        scores = chat_logprobs(tiny_tokenizer, [s for delta in deltas for s in delta.scores])
        assert "".join(bytes(e["bytes"]).decode("latin-1") for e in scores["content"]) == (
            "It is 6é.".encode().decode("latin-1")
        )


def test_a_completion_is_all_that_is_written(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, ["a", *CALL, "b", "<|bos|>"])
    answer = Answer(tiny_tokenizer, chat=False, scored=True)
    (delta,) = read(answer, ids, "stop", [])
    assert delta.text == "a2*36b" and len(delta.scores) == len(ids) == answer.num_tokens


@pytest.mark.parametrize("cuts", [[], [1], [2], range(9)])
def test_half_a_character_at_the_end_is_one_replacement(tiny_tokenizer, cuts):
    ids = ids_of(tiny_tokenizer, ["船"])[:2]
    deltas = read(Answer(tiny_tokenizer), ids, "length", cuts)
    assert "".join(delta.text for delta in deltas) == "\ufffd"
    assert all(delta.text == "" for delta in deltas[:-1])


def test_tokens_of_the_older_form_are_told_apart(tiny_tokenizer):
    """lm-eval takes the largest value of a dict by token: two tokens must not share a name."""
    names = [token_text(tiny_tokenizer, id) for id in range(tiny_tokenizer.vocab_size + 3)]
    assert len(set(names)) == len(names)
    ids = ids_of(tiny_tokenizer, ["a船"])
    (delta,) = read(Answer(tiny_tokenizer, chat=False, scored=True), ids, "length", [])
    form = text_logprobs(tiny_tokenizer, delta.scores)
    assert form["tokens"] == ["a", *(f"bytes:\\x{byte:02x}" for byte in "船".encode())]
    assert form["text_offset"] == [0, 1, 1, 1]
    assert form["top_logprobs"][0] == {"a": -1.0}
