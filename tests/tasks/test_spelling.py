"""Generated spelling and counting, against str.count and against words taken apart by hand."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import regex

from nanochat_jax.common import UserError
from nanochat_jax.data.demo import is_decent
from nanochat_jax.tasks.base import SPLITS, split_of
from nanochat_jax.tasks.spelling import (
    WORDS,
    SimpleSpelling,
    SpellingBee,
    number_letter,
    read_words,
)
from nanochat_jax.tokenizer.bpe import SPLIT_PATTERN, Tokenizer
from nanochat_jax.tokenizer.chat import render_conversation

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "goldens")
TASKS = (SpellingBee, SimpleSpelling)


def texts(conversation):
    question, answer = (message["content"] for message in conversation["messages"])
    return question, answer


def said(conversation):
    """An answer as the engine decodes it: all of its parts in a row."""
    answer = conversation["messages"][-1]["content"]
    return answer if isinstance(answer, str) else "".join(part["text"] for part in answer)


@pytest.mark.parametrize("split", SPLITS)
def test_counts_are_right(split):
    task = SpellingBee(split)
    counts = []
    for index in range(1_000):
        question, parts = texts(task[index])
        assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
        spelled, call, output, last = (part["text"] for part in parts)
        word, letter = re.fullmatch(r'"([a-z]+)"\.count\("([a-z])"\)', call).groups()
        count = sum(char == letter for char in word)
        assert output == str(count)
        assert last.endswith(f"\n#### {count}")
        assert re.search(rf"\b{count}\b|[^0-9]{count}[^0-9]", last.split("\n")[1])
        assert word in question.lower() and letter in question.lower().replace(word, "", 1)
        # By hand: the word again without the numbers, and as many numbers as the count.
        heading, _, letters = spelled.partition(": ")
        assert heading == word and re.sub(r"[0-9\s]", "", letters) == word
        assert re.findall(r"([a-z])(\d+)", letters) == [
            (letter, str(i)) for i in range(1, count + 1)
        ]
        counts.append(count)
    assert {0, 1, 2, 3} <= set(counts)
    assert 100 < counts.count(0) < 200


def test_no_call_cuts_its_word():
    """Whatever the tokenizer learns, it joins nothing across these pieces."""
    task = SpellingBee("train")
    for index in range(500):
        call = texts(task[index])[1][1]["text"]
        _, word, _, letter, _ = call.split('"')
        pieces = ['"' + word, '".', "count", '("', letter, '")']
        assert regex.findall(SPLIT_PATTERN, call) == pieces
    assert regex.findall(SPLIT_PATTERN, "'scream'")[:2] == ["'s", "cream"]


def test_letters_are_numbered():
    assert number_letter("strawberry", "r") == "s t r1 a w b e r2 r3 y"
    assert number_letter("fan", "z") == "f a n"


@pytest.mark.parametrize("split", SPLITS)
def test_words_are_spelled(split):
    task = SimpleSpelling(split)
    for index in range(500):
        question, answer = texts(task[index])
        word, _, letters = answer.partition(": ")
        assert letters.split(" ") == list(word)
        assert word in question.lower()


def test_one_time_many_times():
    task = SpellingBee("train")
    sentences = {texts(task[i])[1][-1]["text"].split(" in ")[0].strip() for i in range(300)}
    times = [s for s in sentences if "appears" in s]
    assert times and all(s.endswith("1 time") == ("times" not in s) for s in times)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_word(task):
    words = {
        split: {said(conversation).partition(":")[0] for conversation in task(split)[:1_000]}
        for split in SPLITS
    }
    assert not words["train"] & words["test"]
    assert min(map(len, words.values())) > 300
    assert {split_of(word) for word in words["test"]} == {"test"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_render_and_are_short(task, split):
    lengths = []
    for conversation in task(split)[:200]:
        ids, mask = render_conversation(TOKENIZER, conversation)
        assert sum(mask) > 3 and mask[-1] == 1
        lengths.append(len(ids))
    assert max(lengths) < 200


@pytest.mark.parametrize(
    "task, split, digest",
    [
        (SpellingBee, "train", "ce6abbeb2cbf"),
        (SpellingBee, "test", "a9f6e1c0b97a"),
        (SimpleSpelling, "train", "222168e0a0c0"),
        (SimpleSpelling, "test", "da8062bf334f"),
    ],
)
def test_examples_stay_the_same(task, split, digest):
    first = json.dumps(task(split)[:20])
    assert hashlib.sha256(first.encode()).hexdigest()[:12] == digest
    later = task(split)
    assert later[17] == later[17] == task(split)[-len(later) + 17]


def test_grading_a_count():
    task = SpellingBee("test")
    right = [(i, said(task[i])) for i in range(20)]
    assert all(task.grade(right))
    wrong = [(i, re.sub(r"#### (\d+)", r"#### 9\1", text)) for i, text in right]
    wrong += [(0, ""), (1, right[1][1].replace("####", "")), (2, "3")]
    assert not any(task.grade(wrong))


def test_grading_a_spelling():
    task = SimpleSpelling("test")
    right = [(i, said(task[i])) for i in range(20)]
    assert all(task.grade(right))
    words = [text.partition(":")[0] for _, text in right]
    assert all(task.grade([(i, ",".join(word)) for i, word in enumerate(words)]))
    wrong = [(i, f"{word}: {word}") for i, word in enumerate(words)]
    wrong += [(i, text[:-2]) for i, text in right] + [(i, f"{text} e") for i, text in right]
    assert not any(task.grade([*wrong, (0, "")]))


def test_the_word_list_is_clean():
    words = WORDS.read_text().split()
    assert words == sorted(set(words))
    assert 3_000 <= len(words) <= 5_000
    assert all(re.fullmatch("[a-z]{3,12}", word) and is_decent(word) for word in words)
    assert {"strawberry", "banana", "letter", "together"} <= set(words)
    train, test = (read_words(WORDS, split) for split in SPLITS)
    assert sorted(train + test) == words
    assert 0.08 < len(test) / len(words) < 0.12


def test_words_of_your_own(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"{a}{b}{a}x" for a in "abcdefgh" for b in "klmnop") + "\n")
    assert said(SimpleSpelling("train", path)[0]).split(":")[0] in path.read_text().split()
    path.write_text("fine\nNot Fine\n")
    with pytest.raises(UserError, match="'Not'.*a-z"):
        SpellingBee("train", path)
    path.write_text("")
    with pytest.raises(UserError, match="no word of the train split"):
        SpellingBee("train", path)
    with pytest.raises(UserError, match="cannot read the words"):
        SpellingBee("train", tmp_path / "none.txt")


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_split(task):
    with pytest.raises(UserError, match="'dev'.*train, test"):
        task("dev")
