"""Shards of random words to read from, and the simplest way to write one by hand."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORDS = "the river ran past old mill and seven boats went by in the morning she counted".split()


@pytest.fixture(scope="session")
def write_parquet():
    """Write texts as a shard with row groups of a given size."""

    def write(path: Path, texts, rows: int = 5) -> Path:
        table = pa.table({"text": texts if isinstance(texts, pa.Array) else list(texts)})
        pq.write_table(table, path, row_group_size=rows)
        return path

    return write


@pytest.fixture(scope="session")
def corpus_paths(tmp_path_factory, write_parquet):
    """Two shards of 57 documents each in row groups of 5; document i of shard s starts `s i`."""
    rng = random.Random(7)
    folder = tmp_path_factory.mktemp("corpus")
    paths = []
    for shard in range(2):
        texts = [
            f"{shard} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for i in range(57)
        ]
        paths.append(write_parquet(folder / f"shard_{shard:05d}.parquet", texts))
    return paths
