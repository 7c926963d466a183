"""Shards as they should be, and as they should not."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.data.sources import Corpus


def test_row_groups_of_all_shards_are_one_list(tmp_path, write_parquet):
    paths = [
        write_parquet(tmp_path / "shard_00000.parquet", ["a", "b", "c"], rows=2),
        write_parquet(tmp_path / "shard_00007.parquet", ["d", "e", "f", "g", "h"], rows=3),
    ]
    corpus = Corpus(paths)
    assert [corpus.read(i).texts for i in range(4)] == [
        ["a", "b"],
        ["c"],
        ["d", "e", "f"],
        list("gh"),
    ]
    assert [group.first_document for group in corpus.row_groups] == [0, 2, 3, 6]
    assert corpus.num_documents == 8
    assert corpus.name(3, 1) == "shard_00007:1:1"


def test_other_columns_are_ignored_and_nulls_are_empty(tmp_path):
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"source": [1, 2], "text": ["a", None]}), path)
    assert Corpus([path]).read(0).texts == ["a", ""]


def test_large_strings_are_text_too(tmp_path):
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": pa.array(["ä", "b"], pa.large_string())}), path)
    assert Corpus([path]).read(0).texts == ["ä", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_bad_utf8_is_replaced_and_counted(tmp_path, write_parquet, kind):
    binary = pa.binary() if kind == pa.string() else pa.large_binary()
    texts = pa.array([b"good", b"caf\xe9 au lait", b"also good", b"\xff"], binary).view(kind)
    write_parquet(tmp_path / "shard.parquet", texts)
    texts, repaired = Corpus([tmp_path / "shard.parquet"]).read(0)
    assert texts == ["good", "caf\ufffd au lait", "also good", "\ufffd"]
    assert repaired == {1, 3}


def test_fingerprint_tells_shards_apart_but_not_folders(tmp_path, write_parquet):
    def fingerprint(folder, names, rows=2):
        (tmp_path / folder).mkdir()
        paths = [write_parquet(tmp_path / folder / name, ["a", "b", "c"], rows) for name in names]
        return Corpus(paths).fingerprint

    same = fingerprint("one", ["shard_00000.parquet"])
    assert fingerprint("two", ["shard_00000.parquet"]) == same
    assert fingerprint("three", ["shard_00001.parquet"]) != same
    assert fingerprint("four", ["shard_00000.parquet", "shard_00001.parquet"]) != same
    assert fingerprint("five", ["shard_00000.parquet"], rows=3) != same


def test_no_shards():
    with pytest.raises(UserError, match=r"got no data shards.*scripts/data\.py"):
        Corpus([])


def test_missing_shard(tmp_path):
    with pytest.raises(UserError, match=r"shard_00003\.parquet does not exist; run .*download"):
        Corpus([tmp_path / "shard_00003.parquet"])


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_shard_with_a_broken_footer(tmp_path, write_parquet, damage):
    path = write_parquet(tmp_path / "shard_00000.parquet", ["some text"] * 50)
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[: len(raw) // 2], "text": b"<html>no</html>", "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be read.*delete it"):
        Corpus([path])


def test_shard_with_broken_pages(tmp_path):
    path = tmp_path / "shard_00000.parquet"
    texts = [f"{i} {'text ' * 50}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[4:400] = bytes(396)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be read.*delete it"):
        Corpus([path]).read(0)


@pytest.mark.parametrize("columns", [{"body": ["a"]}, {"text": [1]}])
def test_shard_without_text(tmp_path, columns):
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match="expected a string column named 'text'"):
        Corpus([path])
