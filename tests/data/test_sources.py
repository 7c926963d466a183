"""Shards as they should be, and as they should not."""

from pathlib import Path

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
    assert [corpus.read(i) for i in range(4)] == [list(t) for t in ("ab", "c", "def", "gh")]
    assert [group.first_document for group in corpus.row_groups] == [0, 2, 3, 6]
    assert corpus.num_documents == 8
    assert corpus.name(3, 1) == "shard_00007:1:1"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_nulls_are_empty_and_other_columns_ignored(tmp_path, kind):
    columns = {"source": [0] * 3, "text": pa.array(["good", None, "ä"], kind)}
    pq.write_table(pa.table(columns), tmp_path / "shard.parquet")
    assert Corpus([tmp_path / "shard.parquet"]).read(0) == ["good", "", "ä"]


BAD_UTF8 = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())


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


def broken_pages(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + bytes(len(raw) // 2) + raw[4 + len(raw) // 2 :])


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        broken_pages,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"<html>no</html>"),
        lambda path: path.write_bytes(b""),
        lambda path: pq.write_table(pa.table({"body": ["a"]}), path),
        lambda path: pq.write_table(pa.table({"text": [1]}), path),
        lambda path: pq.write_table(pa.table({"text": BAD_UTF8}), path),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(tmp_path, damage):
    path = tmp_path / "shard_00003.parquet"
    texts = [f"{i} {'text ' * 50}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    damage(path)
    with pytest.raises(UserError, match=r"shard_00003\.parquet"):
        list(Corpus([path]).texts())
