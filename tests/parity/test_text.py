"""The parity rows of text: all right on the goldens, and a miss for whatever is changed in them."""

import copy
import json
from pathlib import Path

import pytest

from nanochat_jax.parity.folder import compare_files

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = ("tokenizer.json", "text.json")
TOKENIZER, TEXT = (json.loads((GOLDENS / file).read_text()) for file in FILES)


def misses(folder, tokenizer=TOKENIZER, text=TEXT) -> list[str]:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "text.json").write_text(json.dumps(text))
    return [row.what for row in compare_files(folder, FILES) if not row.ok]


def test_every_key_of_the_goldens_is_compared_and_equal():
    rows = compare_files(GOLDENS, FILES)
    assert {row.what for row in rows} == {*TOKENIZER, *TEXT}
    assert [row for row in rows if not row.ok] == []
    assert [row.what for row in rows if not row.compared] == ["num_docs"]
    counts = {row.what: row.compared for row in rows}
    assert counts["ranks"] == 2 * len(TOKENIZER["ranks"])
    assert counts["conversations"] == 3 * len(TEXT["conversations"])


def changed(key, change):
    return TEXT | {key: change(copy.deepcopy(TEXT[key]))}


def with_field(key, field, value):
    return changed(key, lambda rows: [rows[0] | {field: value}, *rows[1:]])


@pytest.mark.parametrize(
    "key, text",
    [
        ("special_tokens", changed("special_tokens", lambda ids: ids | {"<|new|>": 2048})),
        ("first_100_merges", changed("first_100_merges", lambda merges: merges[::-1])),
        ("encode", with_field("encode", "ids", [1])),
        ("conversations", with_field("conversations", "mask", [])),
        ("sft_collate", changed("sft_collate", lambda batch: batch | {"targets": []})),
        ("calculator", with_field("calculator", "out", None)),
        ("mixture", changed("mixture", lambda rows: rows[::-1])),
        # What cannot be compared is a miss too.
        ("surprise", TEXT | {"surprise": [1]}),
        ("calculator", with_field("calculator", "unit", "m")),
        ("calculator", TEXT | {"calculator": []}),
        ("mixture", {key: value for key, value in TEXT.items() if key != "mixture"}),
    ],
)
def test_a_changed_value_is_a_miss_of_its_row_alone(tmp_path, key, text):
    assert misses(tmp_path, text=text) == [key]


def test_another_tokenizer_misses(tmp_path):
    ranks = copy.deepcopy(TOKENIZER["ranks"])
    ranks[300][0], ranks[301][0] = ranks[301][0], ranks[300][0]
    assert "first_100_merges" in misses(tmp_path, TOKENIZER | {"ranks": ranks})
    assert "pattern" in misses(tmp_path, TOKENIZER | {"pattern": r"\S+|\s+"})
    assert misses(tmp_path, TOKENIZER | {"surprise": 1}) == ["surprise"]
    assert misses(tmp_path, TOKENIZER | {"ranks": []}) == ["all"]
