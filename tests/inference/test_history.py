import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.inference.history import AnswerReader, PromptTooLong, fit_prompt
from nanochat_jax.tasks.base import messages
from nanochat_jax.tokenizer.chat import render_conversation, render_for_completion

SYSTEM = {"role": "system", "content": "Be brief."}
SAID = [(f"{number} boats? " * (1 + number % 3), f"Yes, {number}.") for number in range(5)]
TURNS = messages(*sum(SAID, ()))["messages"]


@pytest.mark.parametrize("head", [[], [SYSTEM]], ids=["bare", "system"])
@pytest.mark.parametrize("tail", [TURNS[:9], TURNS], ids=["question", "answered"])
def test_fit_keeps_the_system_message_and_as_many_of_the_newest_turns_as_fit(
    tiny_tokenizer, head, tail
):
    def rendered(dropped):
        kept = [*head, *tail[2 * dropped :]]
        return render_for_completion(tiny_tokenizer, {"messages": kept})

    whole, least = len(rendered(0)), len(rendered(4))
    for budget in range(least, whole + 2):
        dropped = next(n for n in range(5) if len(rendered(n)) <= budget)
        assert fit_prompt(tiny_tokenizer, [*head, *tail], budget) == (rendered(dropped), dropped)
    with pytest.raises(PromptTooLong, match=rf"is {least} tokens .* at most {least - 1}; shorten"):
        fit_prompt(tiny_tokenizer, [*head, *tail], least - 1)


def test_fit_refuses_what_is_no_conversation(tiny_tokenizer):
    with pytest.raises(UserError, match="roles?"):
        fit_prompt(tiny_tokenizer, [{"role": "assistant", "content": "hi"}], 100)


def read(tokenizer, portions):
    """(pieces, content) of an answer fed in these portions."""
    answer = AnswerReader(tokenizer)
    pieces = [piece for ids in portions for piece in answer.feed(ids)]
    return [*pieces, *answer.finish()], answer.content


PARTS = st.lists(
    st.tuples(st.sampled_from(["text", "python", "python_output"]), st.text(min_size=1)), min_size=1
)


@given(PARTS, st.integers(1, 7))
def test_an_answer_reads_back_as_it_was_rendered(tiny_tokenizer, parts, portion):
    joined = []  # neighbouring texts are one
    for kind, text in parts:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if kind == "text" and joined and joined[-1]["type"] == "text":
            joined[-1]["text"] += text
        else:
            joined.append({"type": kind, "text": text})
    ids, _ = render_conversation(tiny_tokenizer, messages("?", joined))
    ids = ids[ids.index(tiny_tokenizer.special_id("<|assistant_start|>")) + 1 :]
    pieces, content = read(
        tiny_tokenizer, [ids[i : i + portion] for i in range(0, len(ids), portion)]
    )
    assert content == (joined[0]["text"] if [p["type"] for p in joined] == ["text"] else joined)
    for kind in ("text", "python", "python_output"):
        shown = "".join(text for shown_kind, text in pieces if shown_kind == kind)
        assert shown == "".join(part["text"] for part in joined if part["type"] == kind)


def test_characters_are_never_shown_by_halves(tiny_tokenizer):
    text = "a船é🚢b"
    ids = [tiny_tokenizer.ranks[bytes([byte])] for byte in text.encode()]
    pieces, content = read(tiny_tokenizer, [[i] for i in ids])
    assert pieces == [("text", character) for character in text] and content == text
    # One that ends too early is one U+FFFD, at the end or where a tool call begins.
    python = tiny_tokenizer.special_id("<|python_start|>")
    assert read(tiny_tokenizer, [ids[:2]]) == ([("text", "a"), ("text", "\ufffd")], "a\ufffd")
    pieces, _ = read(tiny_tokenizer, [[*ids[:2], python]])
    assert pieces == [("text", "a"), ("text", "\ufffd"), ("python", "")]


def test_tokens_that_are_no_text_are_passed_over(tiny_tokenizer):
    hello = tiny_tokenizer.encode("hello")
    noise = [tiny_tokenizer.bos_id, tiny_tokenizer.special_id("<|user_start|>"), 10_000]
    assert read(tiny_tokenizer, [hello[:2], noise, hello[2:]])[1] == "hello"
