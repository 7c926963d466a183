"""Rows from a folder, and from the hub by way of a repository's copy on this disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tasks.sources import SOURCES, load_rows

ROOT = Path(__file__).parents[2]
GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]
# numpy.random.default_rng(42).permutation(20), the order of datasets.Dataset.shuffle(seed=42)
SHUFFLED = [15, 9, 14, 7, 12, 10, 6, 19, 3, 0, 16, 5, 11, 18, 2, 4, 17, 1, 13, 8]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_a_folder_in_fixed_order(tmp_path, suffix):
    write(tmp_path / f"gsm8k/test.{suffix}", GSM8K)
    rows = load_rows("gsm8k", "test", str(tmp_path))
    assert list(rows) == [GSM8K[i] for i in SHUFFLED]


@pytest.mark.parametrize(
    "name, split, path",
    [
        ("arc_easy", "train", "arc/arc_easy_train.jsonl"),
        ("arc_challenge", "dev", "arc/arc_challenge_validation.jsonl"),  # one split of two names
        ("mmlu", "test", "mmlu/test.jsonl"),
        ("mmlu", "auxiliary_train", "mmlu/auxiliary_train_from_elsewhere.jsonl"),
        ("gsm8k", "train", "gsm8k/train.jsonl"),
        ("humaneval", "test", "humaneval/HumanEval.jsonl"),
        ("smoltalk", "test", "chat/mixture/test.parquet"),
    ],
)
def test_layout_of_the_folder(tmp_path, name, split, path):
    row = dict(SOURCES[name].row)
    write(tmp_path / path, [row | {"more": 1}])
    assert list(load_rows(name, split, str(tmp_path))) == [row]
    assert len(open_task(f"{name} {split}", task_dir=str(tmp_path))) == 1


def test_several_files_are_joined_in_order_of_their_names(tmp_path):
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0} for i in range(20)]
    for part in (2, 0, 3, 1):
        write(tmp_path / f"mmlu/auxiliary_train-{part}.parquet", rows[5 * part : 5 * part + 5])
    assert list(load_rows("mmlu", "auxiliary_train", str(tmp_path))) == [rows[i] for i in SHUFFLED]


def test_a_folder_needs_one_file_for_a_split(tmp_path):
    for suffixes in (("jsonl", "parquet"), ()):  # first there is no file, then there are two
        with pytest.raises(UserError, match=r"gsm8k/test\.jsonl, gsm8k/test\.parquet"):
            load_rows("gsm8k", "test", str(tmp_path))
        for suffix in suffixes:
            write(tmp_path / f"gsm8k/test.{suffix}", GSM8K)


@pytest.mark.parametrize(
    "suffix, damage", [("jsonl", b"[1]"), ("jsonl", b"\xff"), ("parquet", b"no more")]
)
def test_a_damaged_file_is_told(tmp_path, suffix, damage):
    path = tmp_path / f"gsm8k/test.{suffix}"
    write(path, GSM8K[:1])
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(UserError, match=f"{path}:2: " if suffix == "jsonl" else str(path)) as error:
        load_rows("gsm8k", "test", str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "name, column, wrong",
    [("gsm8k", "answer", None), ("mmlu", "answer", "B"), ("arc_easy", "choices", ["a"])],
)
def test_values_of_the_wrong_kind_are_told(tmp_path, suffix, name, column, wrong):
    path = SOURCES[name].files["test"][0]
    write(tmp_path / f"{path}.{suffix}", [SOURCES[name].row | {column: wrong}])
    with pytest.raises(UserError, match=rf"{path}\.{suffix}.*: .*\b{column}\b"):
        load_rows(name, "test", str(tmp_path))


def test_rows_of_a_repository(tmp_path, monkeypatch):
    """`datasets` takes a folder named like a repository for it: configuration, split, order."""
    from datasets import Dataset

    write(tmp_path / "openai/gsm8k/main/test-00000-of-00001.parquet", GSM8K)
    (tmp_path / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: test\n    path: main/test-*\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = load_rows("gsm8k", "test")
    assert list(rows) == Dataset.from_list(GSM8K).shuffle(42).to_list()


def test_no_network(tmp_path):
    """The hub's client reads its settings when it is imported, so a process of its own."""
    program = "from nanochat_jax.tasks.sources import load_rows; load_rows('arc_easy', 'test')"
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=60)
    assert re.search("UserError: allenai/ai2_arc .*config.data.task_dir", done.stderr)
