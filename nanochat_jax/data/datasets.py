"""The datasets we know by name, where their shards lie, and how they come there.

    $NANOCHAT_BASE_DIR/data/<name>/shard_00000.parquet ...   and dataset.json, what is known of them

Which shard is validation is fixed by name and never depends on what else is on the disk.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.common import UserError, aligned, data_dir, locked
from nanochat_jax.data import demo, hub, local
from nanochat_jax.data.shards import SHARD_CHARS, Shards, is_recorded, read_manifest, shard_name


@dataclass(frozen=True)
class Dataset:
    """A dataset by name. Without `repo_id` its shards are made on this machine."""

    name: str
    description: str
    licence: str
    repo_id: str = ""  # of a dataset on the Hugging Face hub
    num_shards: int = 0  # of the whole dataset, validation included
    shard_chars: int = SHARD_CHARS  # about; for planning
    shard_bytes: int = 100_000_000  # about; for planning

    @property
    def validation(self) -> str:
        """Name of the validation shard of a downloaded dataset: the last of the whole dataset."""
        return shard_name(self.num_shards - 1)

    def train_names(self, num_shards: int) -> list[str]:
        """Names of the first `num_shards` training shards of a downloaded dataset."""
        if not 1 <= num_shards < self.num_shards:
            raise UserError(
                f"got config.data.num_shards = {num_shards}, expected 1 to {self.num_shards - 1}: "
                f"{self.name} has {self.num_shards} shards, one of them for validation"
            )
        return [shard_name(i) for i in range(num_shards)]


_KNOWN = (
    Dataset(
        name="climbmix",
        description="400B tokens of filtered and clustered web text; the modern recipe's",
        licence="as its source, nvidia/ClimbMix (CC BY-NC 4.0)",
        repo_id="karpathy/climbmix-400b-shuffle",
        num_shards=6_543,
    ),
    Dataset(
        name="fineweb_edu",
        description="100B tokens of web pages chosen for teaching value; the classic recipe's",
        licence="as its source, HuggingFaceFW/fineweb-edu (ODC-By 1.0)",
        repo_id="karpathy/fineweb-edu-100b-shuffle",
        num_shards=1_823,
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
DATASETS = {dataset.name: dataset for dataset in _KNOWN}


def get(name: str) -> Dataset:
    if name not in DATASETS:
        raise UserError(f"got config.data.name = {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def ensure(name: str, *, num_shards: int, local_dir: str = "", again: bool = False) -> Shards:
    """Shards of the dataset `name`, made or downloaded first when missing (or when `again`).

    `num_shards` counts the training shards of a downloaded dataset; of `local` and `demo` all are
    used. Processes that ask at once wait for the one that works.
    """
    dataset, folder = get(name), directory(name, local_dir)
    with locked(folder):
        ready = None if again else find(name, num_shards=num_shards, local_dir=local_dir)
        if ready is None:
            if name == "local":
                local.pack(local_dir, folder)
            elif name == "demo":
                demo.build(folder)
            else:
                names = [*dataset.train_names(num_shards), dataset.validation]
                hub.download(dataset.repo_id, names, folder)
            ready = find(name, num_shards=num_shards, local_dir=local_dir)
    assert ready is not None
    return ready


def find(name: str, *, num_shards: int = 0, local_dir: str = "") -> Shards | None:
    """The shards on disk; None when some are missing or have another size than recorded."""
    dataset, folder = get(name), directory(name, local_dir)
    manifest = read_manifest(folder)
    if manifest is None or "shards" not in manifest:  # earlier versions used some folders in place
        return None
    names = dataset.train_names(num_shards) if dataset.repo_id else manifest["train"]
    validation = dataset.validation if dataset.repo_id else manifest["validation"]
    if not all(is_recorded(folder, manifest, name) for name in [*names, validation]):
        return None
    return [folder / name for name in names], folder / validation


def directory(name: str, local_dir: str = "") -> Path:
    return local.dataset_directory(local_dir) if name == "local" else data_dir() / name


def table(local_dir: str = "") -> str:
    """What there is and what of it is on the disk, for people."""
    rows = [("name", "what", "size", "shards on disk", "licence")]
    for d in DATASETS.values():
        folder = directory(d.name, local_dir) if d.name != "local" or local_dir else None
        manifest = (folder and read_manifest(folder)) or {}
        here = sum((folder / name).exists() for name in manifest.get("shards", ())) if folder else 0
        shards = f"{here:,} of {d.num_shards:,}" if d.repo_id else f"{here:,}"
        size = f"{d.num_shards * d.shard_bytes / 1e9:,.0f} GB" if d.repo_id else ""
        rows.append((d.name, d.description, size, shards, d.licence))
    return "\n".join(aligned(rows, left=range(5)))
