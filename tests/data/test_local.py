"""Your own text: every kind of file, the bad ones, and folders that are shards already."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.common import UserError, write_json
from nanochat_jax.data import datasets, local
from nanochat_jax.data.sources import Corpus


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def ensure(folder, **options):
    return datasets.ensure("local", num_shards=1, local_dir=str(folder), **options)


def texts_of(paths):
    return list(Corpus(paths).texts())


def all_texts(folder):
    train, validation = ensure(folder)
    return texts_of([*train, validation])


def test_every_kind_of_file(folder, write_parquet, capsys):
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("plain text")
    (folder / "sub" / "b.MD").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\nmarked")
    (folder / "c.jsonl").write_text('{"text": "json é", "id": 1}\n\n{"text": "two\\nlines"}\n')
    (folder / "f.jsonl").write_text('{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    write_parquet(folder / "d.parquet", ["column", None])
    (folder / "e.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text(" \n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("secret")
    expected = ["plain text", "# Title\n\nmarked", "json é", "two\nlines", "column", "caf�"]
    assert sorted(all_texts(folder)) == sorted([*expected, "half �", "\U0001f600"])
    printed = capsys.readouterr().out
    for told in ("files 7", "documents 10", "empty documents 2", "repaired documents 2"):
        assert told in printed


def test_long_files_are_cut_and_records_are_not(folder):
    paragraphs = [f"Paragraph {i}. {'word ' * 60}".strip() for i in range(100)]
    (folder / "book.txt").write_text("\n\n".join(paragraphs))
    (folder / "long.jsonl").write_text(json.dumps({"text": "x" * 20_000}) + "\n")
    texts = all_texts(folder)
    assert max(len(t) for t in texts if t[0] == "P") <= local.MAX_FILE_CHARS
    assert sorted("\n\n".join(t for t in texts if t[0] == "P").split("\n\n")) == sorted(paragraphs)
    assert "x" * 20_000 in texts


@given(st.text("ab \n", max_size=400), st.integers(4, 60))
def test_cut_pieces_are_the_text_but_for_white_space(text, max_chars):
    pieces = local.split_text(text, max_chars)
    assert all(len(piece) <= max_chars for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    if len(text) <= max_chars:
        assert pieces == [text]


@pytest.mark.parametrize("line", ['{"text": ', '{"body": "x"}', '["x"]', '{"text": 3}'])
def test_bad_lines_are_named(folder, line):
    (folder / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        ensure(folder)


def test_bad_files_and_folders(folder, tmp_path):
    for wrong in (folder, tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="local_dir"):
            ensure(wrong)
    (folder / "bad.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        ensure(folder)


def test_packed_once_and_again_on_demand(folder):
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    first = ensure(folder)
    before = {path: path.stat().st_mtime_ns for path in [*first[0], first[1]]}
    (folder / "new.txt").write_text("added later")
    assert ensure(folder) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    train, validation = ensure(folder, again=True)
    assert "added later" in texts_of([*train, validation])


def test_what_an_earlier_version_recorded_of_shards_in_place_is_packed(folder, write_parquet):
    for i in range(2):
        write_parquet(folder / f"shard_{i:05d}.parquet", [f"{i} a", f"{i} b"])
    record = {"source": str(folder), "in_place": True, "validation": "shard_00001.parquet"}
    write_json(local.dataset_directory(str(folder)) / "dataset.json", record)
    assert sorted(all_texts(folder)) == ["0 a", "0 b", "1 a", "1 b"]


def test_folders_of_one_name_do_not_share_shards(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "text").mkdir(parents=True)
        for i in range(5):
            (tmp_path / parent / "text" / f"{i}.txt").write_text(f"{parent} {i}")
    for parent in ("one", "two", "one"):
        assert all(text.startswith(parent) for text in all_texts(tmp_path / parent / "text"))
