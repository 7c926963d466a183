"""The parity rows of text: all right on the goldens, and a miss for whatever is changed in them."""

import copy
import json
import random
from pathlib import Path

import pytest

from nanochat_jax.parity.folder import compare_files
from nanochat_jax.tokenizer.bpe import train

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


def with_field(key, field, value, index=0):
    return changed(
        key, lambda rows: [*rows[:index], rows[index] | {field: value}, *rows[index + 1 :]]
    )


@pytest.mark.parametrize(
    "key, text",
    [
        ("vocab_size", changed("vocab_size", lambda size: size + 1)),
        ("special_tokens", changed("special_tokens", lambda ids: ids | {"<|bos|>": 0})),
        ("special_tokens", changed("special_tokens", lambda ids: ids | {"<|new|>": 2048})),
        ("first_100_merges", changed("first_100_merges", lambda merges: merges[::-1])),
        ("last_merge", changed("last_merge", lambda merge: merge + "00")),
        ("encode", with_field("encode", "ids", [1])),
        ("encode_bos", with_field("encode_bos", "ids", [1])),
        ("conversations", with_field("conversations", "mask", [])),
        ("conversations", with_field("conversations", "for_completion", [], index=3)),
        ("sft_collate", changed("sft_collate", lambda batch: batch | {"targets": []})),
        ("gsm_extract", with_field("gsm_extract", "out", "11")),
        ("extract_program", with_field("extract_program", "out", "11")),
        ("extract_imports", with_field("extract_imports", "out", "11")),
        ("calculator", with_field("calculator", "out", None)),
        ("mixture", changed("mixture", lambda rows: rows[::-1])),
        # What cannot be compared is a miss too.
        ("surprise", TEXT | {"surprise": [1]}),
        ("calculator", with_field("calculator", "unit", "m")),
        ("calculator", TEXT | {"calculator": []}),
        ("calculator", TEXT | {"calculator": 5}),
        ("encode", TEXT | {"encode": [{"text": "a"}]}),
        ("conversations", with_field("conversations", "conversation", {"messages": []}, index=3)),
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


def test_a_folder_of_other_sizes(tmp_path):
    """A byte-level tokenizer, so that every id below can be written down without one."""
    tokenizer = train(iter(["ab"]), 265)
    bos, user_start, user_end, assistant_start, assistant_end = range(256, 261)
    pairs = [("z", i) for i in range(4)] + [("m", i) for i in range(3, 9, 3)]
    random.Random(42).shuffle(pairs)
    conversation = {"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]}
    prompt = [bos, user_start, 104, 105, user_end, assistant_start]
    ids, mask = [*prompt, 104, 105, assistant_end][:8], [0] * 6 + [1] * 2
    rendered = {"conversation": conversation, "max_tokens": 8, "for_completion": prompt}
    batch = {"inputs": [ids[:7]] * 2, "targets": [[-1] * 5 + [104, 105]] * 2}
    text = TEXT | {
        "vocab_size": 265,
        "special_tokens": tokenizer.special,
        "first_100_merges": [],
        "last_merge": "ff",
        "encode": [{"text": "a1", "ids": [97, 49]}],
        "encode_bos": [{"text": "a1", "ids": [bos, 97, 49]}],
        "conversations": [rendered | {"ids": ids, "mask": mask}],
        "sft_collate": {"rows": [0, 0]} | batch,
        "mixture": [list(pair) for pair in pairs],
    }
    # Without a single merge there is none to compare, which must not pass for a comparison.
    missed = misses(tmp_path, json.loads(tokenizer.to_json()), text)
    assert missed == ["first_100_merges", "last_merge"]
