"""The parity rows of text: all right on the goldens, and a miss for whatever is changed in them."""

import copy
import json
import math
import random
from pathlib import Path

import pytest

from nanochat_jax.parity.text import compare_text
from nanochat_jax.tokenizer.bpe import train

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENIZER = json.loads((GOLDENS / "tokenizer.json").read_text())
TEXT = json.loads((GOLDENS / "text.json").read_text())


def compare(folder, tokenizer=TOKENIZER, text=TEXT):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "text.json").write_text(json.dumps(text))
    return {(row.file, row.what): row for row in compare_text(folder)}


def test_every_key_of_the_goldens_is_compared_and_equal():
    rows = compare_text(GOLDENS)
    compared = {(row.file, row.what) for row in rows}
    assert compared == {("tokenizer.json", key) for key in TOKENIZER} | {
        ("text.json", key) for key in TEXT
    }
    assert [row for row in rows if not row.ok] == []
    assert [row.what for row in rows if not row.compared] == ["num_docs"]
    counts = {row.what: row.compared for row in rows}
    assert counts["ranks"] == 2 * len(TOKENIZER["ranks"])
    assert counts["conversations"] == 3 * len(TEXT["conversations"])
    assert counts["calculator"] == len(TEXT["calculator"])


def changed(key, change):
    text = copy.deepcopy(TEXT)
    text[key] = change(text[key])
    return text


def changed_field(key, field, value, index=0):
    def change(rows):
        rows[index][field] = value
        return rows

    return changed(key, change)


@pytest.mark.parametrize(
    "key, text",
    [
        ("vocab_size", changed("vocab_size", lambda size: size + 1)),
        ("special_tokens", changed("special_tokens", lambda ids: ids | {"<|bos|>": 0})),
        ("special_tokens", changed("special_tokens", lambda ids: ids | {"<|new|>": 2048})),
        ("first_100_merges", changed("first_100_merges", lambda merges: merges[::-1])),
        ("last_merge", changed("last_merge", lambda merge: merge + "00")),
        ("encode", changed_field("encode", "ids", [1])),
        ("encode_bos", changed_field("encode_bos", "ids", [1])),
        ("conversations", changed_field("conversations", "mask", [])),
        ("conversations", changed_field("conversations", "ids", [])),
        ("conversations", changed_field("conversations", "for_completion", [], index=3)),
        ("sft_collate", changed("sft_collate", lambda batch: batch | {"targets": []})),
        ("sft_collate", changed("sft_collate", lambda batch: batch | {"inputs": []})),
        ("gsm_extract", changed_field("gsm_extract", "out", "11")),
        ("extract_program", changed_field("extract_program", "out", "11")),
        ("extract_imports", changed_field("extract_imports", "out", "11")),
        ("calculator", changed_field("calculator", "out", None)),
        ("mixture", changed("mixture", lambda rows: rows[::-1])),
    ],
)
def test_a_changed_value_is_a_miss_of_its_row_alone(tmp_path, key, text):
    rows = compare(tmp_path, text=text)
    assert [what for (_, what), row in rows.items() if not row.ok] == [key]
    row = rows["text.json", key]
    assert 1 <= row.difference <= row.compared and row.note.startswith("first miss")


@pytest.mark.parametrize(
    "key, text",
    [
        ("surprise", TEXT | {"surprise": [1]}),
        ("calculator", changed_field("calculator", "unit", "m")),
        ("calculator", TEXT | {"calculator": []}),
        ("calculator", TEXT | {"calculator": 5}),
        ("encode", TEXT | {"encode": [{"text": "a"}]}),
        ("conversations", changed_field("conversations", "conversation", {"messages": []})),
        ("mixture", {key: value for key, value in TEXT.items() if key != "mixture"}),
    ],
)
def test_what_cannot_be_compared_is_a_miss(tmp_path, key, text):
    rows = compare(tmp_path, text=text)
    row = rows["text.json", key]
    assert row.difference == math.inf and not row.ok and "not able to compare" in row.note


def test_another_tokenizer_misses(tmp_path):
    ranks = copy.deepcopy(TOKENIZER["ranks"])
    ranks[300][0], ranks[301][0] = ranks[301][0], ranks[300][0]
    rows = compare(tmp_path, TOKENIZER | {"ranks": ranks})
    assert not rows["text.json", "first_100_merges"].ok
    rows = compare(tmp_path, TOKENIZER | {"pattern": r"\S+|\s+"})
    assert not rows["tokenizer.json", "pattern"].ok
    rows = compare(tmp_path, TOKENIZER | {"surprise": 1})
    assert [what for (_, what), row in rows.items() if not row.ok] == ["surprise"]


@pytest.mark.parametrize("name", ["tokenizer.json", "text.json"])
def test_a_missing_or_broken_file_is_a_miss(tmp_path, name):
    compare(tmp_path)
    for content in ("[]", "{", None):
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
        missed = [row for row in compare_text(tmp_path) if not row.ok]
        assert [(row.file, row.what, row.difference) for row in missed] == [(name, "all", math.inf)]


def test_a_folder_of_other_sizes(tmp_path):
    # A byte-level tokenizer, so that every id below can be written down without one.
    tokenizer = train(iter(["ab"]), 265)
    bos, user_start, user_end, assistant_start, assistant_end = range(256, 261)
    pairs = [("z", i) for i in range(4)] + [("m", i) for i in range(3, 9, 3)]
    random.Random(42).shuffle(pairs)
    conversation = {"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]}
    prompt = [bos, user_start, 104, 105, user_end, assistant_start]
    ids = [*prompt, 104, 105, assistant_end]
    text = {
        "vocab_size": 265,
        "special_tokens": tokenizer.special,
        "num_docs": 1,
        "first_100_merges": [],
        "last_merge": "ff",
        "encode": [{"text": "a1", "ids": [97, 49]}],
        "encode_bos": [{"text": "a1", "ids": [bos, 97, 49]}],
        "conversations": [
            {
                "conversation": conversation,
                "max_tokens": 8,
                "ids": ids[:8],
                "mask": [0] * 6 + [1] * 2,
                "for_completion": prompt,
            }
        ],
        "sft_collate": {
            "rows": [0, 0],
            "inputs": [ids[:7]] * 2,
            "targets": [[-1] * 5 + [104, 105]] * 2,
        },
        "gsm_extract": [{"text": "#### 8", "out": "8"}],
        "extract_program": [{"text": "x", "out": "x"}],
        "extract_imports": [{"text": "x", "out": ""}],
        "calculator": [{"expr": "6*7", "out": "42"}],
        "mixture": [list(pair) for pair in pairs],
    }
    rows = compare(tmp_path, json.loads(tokenizer.to_json()), text)
    # Without a single merge there is none to compare, which must not pass for a comparison.
    missed = {what for (_, what), row in rows.items() if not row.ok}
    assert missed == {"first_100_merges", "last_merge"}
