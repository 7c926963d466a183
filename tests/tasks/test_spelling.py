"""Generated spelling and counting, against str.count and against words taken apart by hand."""

import re

import pytest
import regex

from nanochat_jax.data.demo import is_decent
from nanochat_jax.tasks.base import SPLITS, split_of
from nanochat_jax.tasks.spelling import WORDS, SimpleSpelling, SpellingBee
from nanochat_jax.tokenizer.bpe import SPLIT_PATTERN


@pytest.mark.parametrize("split", SPLITS)
def test_counts_are_right(split):
    counts = []
    for conversation in SpellingBee(split)[:1_000]:
        question, parts = (message["content"] for message in conversation["messages"])
        assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
        spelled, call, output, last = (part["text"] for part in parts)
        word, letter = re.fullmatch(r'"([a-z]+)"\.count\("([a-z])"\)', call).groups()
        count = sum(char == letter for char in word)
        assert output == str(count)
        assert re.search(rf"(?<!\d){count}(?!\d).*\n#### {count}$", last)
        assert ("1 time " in last) == ("1 times " not in last and count == 1 and "appears" in last)
        assert word in question.lower() and letter in question.lower().replace(word, "", 1)
        # By hand: the word again without the numbers, and as many numbers as the count.
        heading, _, letters = spelled.partition(": ")
        assert heading == word and re.sub(r"[0-9\s]", "", letters) == word
        numbered = [(letter, str(i)) for i in range(1, count + 1)]
        assert re.findall(r"([a-z])(\d+)", letters) == numbered
        # Whatever the tokenizer learns, it joins nothing across these pieces.
        pieces = ['"' + word, '".', "count", '("', letter, '")']
        assert regex.findall(SPLIT_PATTERN, call) == pieces
        counts.append(count)
    assert {0, 1, 2, 3} <= set(counts)
    assert 100 < counts.count(0) < 200


@pytest.mark.parametrize("split", SPLITS)
def test_words_are_spelled(split):
    for conversation in SimpleSpelling(split)[:500]:
        question, answer = (message["content"] for message in conversation["messages"])
        word, _, letters = answer.partition(": ")
        assert letters.split(" ") == list(word)
        assert word in question.lower() and split_of(word) == split


def test_the_word_list_is_clean():
    assert sorted(set(WORDS)) == WORDS and len(WORDS) > 3_000
    assert all(re.fullmatch("[a-z]{3,12}", word) and is_decent(word) for word in WORDS)
