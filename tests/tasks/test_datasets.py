"""ARC, MMLU, GSM8K and your own conversations: what is asked, what is right."""

import json

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.base import messages
from nanochat_jax.tasks.gsm8k import GSM8K, extract_answer
from nanochat_jax.tasks.multiple_choice import ARC, MMLU
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tasks.sources import read_conversations
from nanochat_jax.tokenizer.chat import render_conversation, render_for_completion


def arc_row(labels, key):
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"question": "Which one?", "choices": choices, "answerKey": key}


@pytest.mark.parametrize(
    "labels, key, letter", [("ABCD", "D", "D"), ("1234", "2", "B"), ("123", "1", "A")]
)
def test_arc_has_a_letter_for_each_choice(tiny_tokenizer, labels, key, letter):
    (conversation,) = ARC([arc_row(labels, key)])
    assert "".join(conversation["letters"]) == "ABCD"[: len(labels)]
    question, answer = (message["content"] for message in conversation["messages"])
    assert answer == letter and f"- choice {key}={letter}\n" in question
    # The answer is the one token after the prompt, where the letters' probabilities are read.
    prompt = render_for_completion(tiny_tokenizer, conversation)
    (token,) = tiny_tokenizer.encode(letter)
    ids, _ = render_conversation(tiny_tokenizer, conversation)
    assert ids == [*prompt, token, tiny_tokenizer.special_id("<|assistant_end|>")]


def test_mmlu():
    (conversation,) = MMLU([{"question": "Bees make?", "choices": ["silk", "honey"], "answer": 1}])
    text = "Choose the right answer.\n\nBees make?\n- silk=A\n- honey=B\n\n"
    expected = messages(text + "Reply with its letter alone.", "B")
    assert conversation == expected | {"letters": ("A", "B")}


def test_wrong_rows_are_told():
    with pytest.raises(UserError, match="'E'.*Which one.* A, B, C, D"):
        ARC([arc_row("ABCD", "E")])[0]
    for choices, answer in ((["a"], 0), (["a", "b"], 2), (["a", "b"], -1), (["a"] * 27, 0)):
        with pytest.raises(UserError, match="Which?"):
            MMLU([{"question": "Which?", "choices": choices, "answer": answer}])[0]
    with pytest.raises(UserError, match="seven"):
        GSM8K([{"question": "?", "answer": "seven"}]).grade([(0, "seven")])


def test_goldens_of_gsm8k(goldens):
    """The conversation of the goldens that has tool calls, from its row; and extracted answers."""
    golden = json.loads((goldens / "text.json").read_text())
    solution = "She earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10"
    question = "Weng earns $12 an hour. How much for 50 minutes?"
    (conversation,) = GSM8K([{"question": question, "answer": solution}])
    assert conversation in [case["conversation"] for case in golden["conversations"]]
    for row in golden["gsm_extract"]:
        assert extract_answer(row["text"]) == row["out"]


def test_gsm8k_is_graded_by_the_number_after_the_marks():
    solutions = ("It is <<2*500=1000>>1000.\n#### 1,000", "#### -7")
    task = GSM8K([{"question": "?", "answer": solution} for solution in solutions])
    said = [(0, "so #### 1000"), (0, "1000"), (0, "#### 1000.0"), (1, "#### -7"), (1, "#### 7")]
    said += [(0, "#### 1,000 eggs"), (0, "#### $1000"), (0, "####  1000"), (0, "")]
    assert task.grade(said) == [True, False, False, True, False, True, False, False, False]


HI = messages("Hi", "Hello.")["messages"]
PARTS = messages("2+2", [{"type": "python", "text": "2+2"}])["messages"]


def test_own_conversations_in_both_forms(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [json.dumps({"messages": PARTS, "source": "me"}), "", json.dumps(HI)]
    path.write_text("\n".join(lines))
    assert [conversation["messages"] for conversation in read_conversations(path)] == [PARTS, HI]


NO_ANSWER = (HI[:1], HI[::-1], [HI[0], {"role": "assistant"}])
BAD_LINES = ('{"messages": []}', '"Hi"', "{'messages': 1}", *map(json.dumps, NO_ANSWER))


@pytest.mark.parametrize("line", BAD_LINES)
def test_own_conversations_are_checked_when_opened(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(HI)}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        list(read_conversations(path))
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_a_file_of_no_conversations(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n \n")
    for name in ("own.jsonl", "none.jsonl"):
        with pytest.raises(UserError, match=name):
            open_task(f"json {tmp_path / name}")
