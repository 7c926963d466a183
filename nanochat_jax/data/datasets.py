"""The datasets we know by name, and where their shards lie.

    $NANOCHAT_BASE_DIR/data/<name>/shard_00000.parquet ...   and dataset.json, what is known of them

Which shard is validation is fixed by name: here for what is downloaded, in dataset.json for what is
made on this machine. It never depends on what else is on the disk, and is never a training shard.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.common import UserError, data_dir, read_json

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Dataset:
    """A dataset by name. Without `repo_id` its shards are made on this machine."""

    name: str
    description: str
    licence: str
    repo_id: str = ""  # of a dataset on the Hugging Face hub
    num_shards: int = 0  # of the whole dataset, validation included
    shard_chars: int = 0  # about; for planning
    shard_bytes: int = 0  # about; for planning

    @property
    def validation(self) -> str:
        """Name of the validation shard of a downloaded dataset: the last of the whole dataset."""
        return shard_name(self.num_shards - 1)

    @property
    def directory(self) -> Path:
        return data_dir() / self.name

    def train_names(self, num_shards: int) -> list[str]:
        """Names of the first `num_shards` training shards of a downloaded dataset."""
        if not 1 <= num_shards < self.num_shards:
            raise UserError(
                f"got config.data.num_shards = {num_shards}, expected 1 to {self.num_shards - 1}: "
                f"{self.name} has {self.num_shards} shards, one of them for validation"
            )
        return [shard_name(i) for i in range(num_shards)]


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="climbmix",
            description="400B tokens of filtered and clustered web text; the modern recipe's",
            licence="as its source, nvidia/ClimbMix (CC BY-NC 4.0)",
            repo_id="karpathy/climbmix-400b-shuffle",
            num_shards=6_543,
            shard_chars=250_000_000,
            shard_bytes=100_000_000,
        ),
        Dataset(
            name="fineweb_edu",
            description="100B tokens of web pages chosen for teaching value; the classic recipe's",
            licence="as its source, HuggingFaceFW/fineweb-edu (ODC-By 1.0)",
            repo_id="karpathy/fineweb-edu-100b-shuffle",
            num_shards=1_823,
            shard_chars=250_000_000,
            shard_bytes=100_000_000,
        ),
        Dataset(
            name="local",
            description="your own text: a folder of .parquet (column text), .jsonl, .txt, .md",
            licence="yours",
        ),
        Dataset(
            name="demo",
            description="conversations and documentation that Python packages bring along",
            licence="chitchat-dataset: MIT; docstrings: the licences of their packages",
        ),
    )
}


def get(name: str) -> Dataset:
    if name not in DATASETS:
        raise UserError(f"got config.data.name = {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """dataset.json of a dataset's folder; None before there is one."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    return read_json(path, "delete it and run `python scripts/data.py` again for this dataset")
