"""Making shards: nothing lost, nothing on both sides, the same every time."""

import errno
import hashlib
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.data.shards import write_shards


def read(path):
    return pq.read_table(path)["text"].to_pylist()


def sides(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    train = [text for name in manifest["train"] for text in read(folder / name)]
    return train, read(folder / manifest["validation"]), manifest


def write(texts, folder, about_chars=None, **options):
    chars = about_chars or sum(map(len, texts))
    made = {"made": "here"}
    write_shards(((t, t) for t in texts), folder, about_chars=chars, manifest=made, **options)
    return sides(folder)


two_texts = st.lists(st.text("abc é", min_size=1, max_size=6), max_size=40).filter(
    lambda texts: len(set(texts)) > 1
)


@settings(max_examples=25)
@given(texts=two_texts)
def test_all_documents_and_none_on_both_sides(tmp_path_factory, texts):
    train, validation, manifest = write(texts, tmp_path_factory.mktemp("out"))
    assert Counter(train) + Counter(validation) == Counter(texts)
    assert train and validation and not set(train) & set(validation)
    assert manifest["made"] == "here" and manifest["validation"] not in manifest["train"]


def test_order_is_shuffled_and_the_same_every_time(tmp_path):
    texts = [f"document {i}" for i in range(500)]
    first, validation, _ = write(texts, tmp_path / "a")
    again, _, _ = write(texts, tmp_path / "b")
    assert first == again
    assert first != sorted(first, key=texts.index)
    assert 20 <= len(validation) <= 80  # a tenth, of so little text
    name = "shard_00001.parquet"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_document_never_changes_sides_when_others_are_added(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    _, before, _ = write(texts, tmp_path / "a", about_chars=10_000_000)
    _, after, _ = write([*texts[::-1], "one more", "and more"], tmp_path / "b", 10_000_000)
    assert set(before) == set(after) & set(texts)


def test_documents_cut_from_one_text_stay_together(tmp_path):
    pieces = [(f"book {i // 9}", f"page {i}") for i in range(90)]
    write_shards(pieces, tmp_path, about_chars=900, manifest={})
    train, validation, _ = sides(tmp_path)
    books = dict((page, book) for book, page in pieces)
    assert not {books[page] for page in train} & {books[page] for page in validation}
    assert len(train) + len(validation) == 90 and validation


def test_many_shards_through_the_disk(tmp_path):
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    train, validation, manifest = write(texts, tmp_path, shard_chars=2_000)
    assert len(manifest["train"]) == 6  # 12,800 characters in shards of 2,000
    assert sorted(train + validation) == sorted(texts)
    for name in [*manifest["train"], manifest["validation"]]:
        assert manifest["shards"][name]["bytes"] == (tmp_path / name).stat().st_size
        assert manifest["shards"][name]["documents"] == len(read(tmp_path / name))
    assert not list(tmp_path.glob(".making*"))


@pytest.mark.parametrize("texts", [[], ["alone"], ["twice", "twice"]])
def test_too_few_documents(tmp_path, texts):
    with pytest.raises(UserError, match="at least two"):
        write(texts, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_shards(tmp_path):
    old = write([f"old {i}" for i in range(20)], tmp_path)

    def no_space():
        yield from ((f"new {i}", f"new {i}") for i in range(20))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_shards(no_space(), tmp_path, about_chars=200, manifest={})
    assert sides(tmp_path) == old
    assert not list(tmp_path.glob(".making*"))
