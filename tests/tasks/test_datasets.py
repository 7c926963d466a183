"""ARC, MMLU, GSM8K, SmolTalk and your own conversations: what is asked, what is right."""

import json
from pathlib import Path

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.gsm8k import GSM8K, solution_parts
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tokenizer.chat import render_conversation, render_for_completion

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "text.json").read_text())


def arc_row(labels, key):
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"id": "x", "question": "Which one?", "choices": choices, "answerKey": key}


def test_wording_of_a_multiple_choice_question():
    conversation = multiple_choice("What do bees make?", ["honey", "silk"], 0)
    assert conversation["messages"] == [
        {
            "role": "user",
            "content": "Choose the right answer.\n\nWhat do bees make?\n- honey=A\n- silk=B\n\n"
            "Reply with its letter alone.",
        },
        {"role": "assistant", "content": "A"},
    ]
    assert conversation["letters"] == ("A", "B")


@pytest.mark.parametrize(
    "labels, key, letters, letter",
    [
        ("ABCD", "D", "ABCD", "D"),
        ("1234", "2", "ABCD", "B"),
        ("ABC", "C", "ABC", "C"),
        ("123", "1", "ABC", "A"),
        ("ABCDE", "E", "ABCDE", "E"),
    ],
)
def test_arc_has_as_many_letters_as_choices(labels, key, letters, letter):
    task = ARC([arc_row(labels, key)])
    assert (task.kind, task.chance, len(task)) == ("categorical", 0.25, 1)
    assert task[0]["letters"] == tuple(letters)
    question, answer = (message["content"] for message in task[0]["messages"])
    assert answer == letter
    assert f"- choice {key}={letter}\n" in question
    assert [line[-1] for line in question.splitlines() if line[:1] == "-"] == list(letters)


def test_the_answer_is_one_token_after_the_prompt(tiny_tokenizer):
    """What the letters' probabilities are read from."""
    task = ARC([arc_row("1234", "4"), arc_row("ABC", "B")])
    for index, letter in ((0, "D"), (1, "B")):
        ids, mask = render_conversation(tiny_tokenizer, task[index])
        prompt = render_for_completion(tiny_tokenizer, task[index])
        (token,) = tiny_tokenizer.encode(letter)
        assert ids == [*prompt, token, tiny_tokenizer.special_id("<|assistant_end|>")]
        assert mask == [0] * len(prompt) + [1, 1]


def test_mmlu():
    row = {"question": "2+2?", "subject": "algebra", "choices": list("3456"), "answer": 1}
    task = MMLU([row])
    assert (task.kind, task.chance) == ("categorical", 0.25)
    assert task[0] == multiple_choice("2+2?", list("3456"), 1) | {"subject": "algebra"}
    assert task[0]["messages"][1]["content"] == "B"


def test_wrong_rows_are_told():
    with pytest.raises(UserError, match="got answerKey 'E' .*Which one.*one of A, B, C, D"):
        ARC([arc_row("ABCD", "E")])[0]
    for choices, answer in ((["a"], 0), (["a", "b"], 2), (["a", "b"], -1), (["a"] * 27, 0)):
        with pytest.raises(UserError, match="expected 2 to 26"):
            multiple_choice("?", choices, answer)


def test_golden_gsm8k_parts():
    """The conversation of the goldens that has tool calls, from its row."""
    solution = "She earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10"
    question = "Weng earns $12 an hour. How much for 50 minutes?"
    assert {"messages": GSM8K([{"question": question, "answer": solution}])[0]["messages"]} in [
        case["conversation"] for case in GOLDENS["conversations"]
    ]


@pytest.mark.parametrize(
    "solution, parts",
    [
        (
            "<<1+2=3>><<3*4=12>>12\n#### 12",
            ["python:1+2", "python_output:3", "python:3*4", "python_output:12", "text:12\n#### 12"],
        ),
        ("a<<1=1=1>>b", ["text:a", "python:1=1", "python_output:1", "text:b"]),
        ("1 << 2 and <<2+2=4>>", ["text:1 << 2 and ", "python:2+2", "python_output:4"]),
        ("no call #### 5", ["text:no call #### 5"]),
    ],
)
def test_calculations_become_tool_calls(solution, parts):
    assert [f"{part['type']}:{part['text']}" for part in solution_parts(solution)] == parts


def test_gsm8k_is_graded_by_the_number_after_the_marks():
    task = GSM8K(
        [
            {"question": "?", "answer": "It is <<2*500=1000>>1000.\n#### 1,000"},
            {"question": "?", "answer": "#### -7"},
        ]
    )
    assert task.kind == "generative"
    said = [(0, "so #### 1000"), (0, "1000"), (0, "#### 1000.0"), (1, "#### -7"), (1, "#### 7")]
    said += [(0, "#### 1,000 eggs"), (0, "")]
    assert task.grade(said) == [True, False, False, True, False, True, False]
    with pytest.raises(UserError, match="expected it to end in '#### number'"):
        GSM8K([{"question": "?", "answer": "seven"}]).grade([(0, "seven")])


def test_smoltalk_keeps_the_system_message(tiny_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    task = SmolTalk([{"messages": messages, "source": "x"}])
    assert task[0] == {"messages": messages}
    ids, _ = render_conversation(tiny_tokenizer, task[0])
    joined = [{"role": "user", "content": "Be brief.\n\nHi"}, messages[2]]
    assert ids == render_conversation(tiny_tokenizer, {"messages": joined})[0]


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PARTS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": [{"type": "python", "text": "2+2"}]},
]


def test_own_conversations_in_both_forms(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [json.dumps({"messages": PARTS, "source": "me"}), "", json.dumps(HI)]
    path.write_text("\n".join(lines))
    task = CustomJSON(path)
    assert [task[i]["messages"] for i in range(len(task))] == [PARTS, HI]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": []}', "with at least one message"),
        ('"Hi"', "got 'Hi', expected"),
        ("{'messages': 1}", "not JSON"),
        (json.dumps(HI[:1]), "got no message of the assistant"),
        (json.dumps(HI[::-1]), "message 0 has role 'assistant', expected 'user'"),
        (json.dumps([*HI, HI[1]]), "message 2 has role 'assistant', expected 'user'"),
        (json.dumps([HI[0], {"role": "assistant"}]), "message 1 is"),
        (json.dumps([HI[0], {"role": "assistant", "content": None}]), "message 1 of the assistant"),
    ],
)
def test_own_conversations_are_checked_when_opened(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(HI)}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        CustomJSON(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    assert "expected" in str(error.value) and "correct" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_no_conversations(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="got no conversation"):
        CustomJSON(tmp_path / "own.jsonl")
    with pytest.raises(UserError, match="none.jsonl cannot be read"):
        CustomJSON(tmp_path / "none.jsonl")
