"""Have a dataset ready: download it, pack it or build it when it is not there, else do nothing.

`ensure` is what the stages and `scripts/data.py` call.
"""

from pathlib import Path

from nanochat_jax.common import locked, log
from nanochat_jax.data import demo, local
from nanochat_jax.data.datasets import DATASETS, Dataset, get, read_manifest

Shards = tuple[list[Path], Path]  # training shards in order, validation shard


def ensure(name: str, *, num_shards: int, local_dir: str = "", again: bool = False) -> Shards:
    """Shards of the dataset `name`, made or downloaded first when missing (or when `again`).

    `num_shards` counts the training shards of a downloaded dataset; of `local` and `demo` all are
    used. Processes that ask at once wait for the one that works.
    """
    with locked(dataset_directory(name, local_dir)):
        ready = None if again else find(name, num_shards=num_shards, local_dir=local_dir)
        if ready is None:
            _make(name, num_shards=num_shards, local_dir=local_dir)
            ready = find(name, num_shards=num_shards, local_dir=local_dir)
    assert ready is not None
    if name == "local":
        _note_changes(local_dir)
    return ready


def find(name: str, *, num_shards: int, local_dir: str = "") -> Shards | None:
    """The shards on disk; None when some are missing or have another size than recorded."""
    dataset = get(name)
    if name == "local":
        return local.shard_paths(local_dir)
    manifest = read_manifest(dataset.directory)
    if manifest is None:
        return None
    names = dataset.train_names(num_shards) if dataset.repo_id else manifest["train"]
    validation = dataset.validation if dataset.repo_id else manifest["validation"]
    for shard in [*names, validation]:
        path = dataset.directory / shard
        known = manifest["shards"].get(shard)
        if known is None or not path.exists() or path.stat().st_size != known["bytes"]:
            return None
    return [dataset.directory / shard for shard in names], dataset.directory / validation


def _make(name: str, *, num_shards: int, local_dir: str) -> None:
    dataset = get(name)
    if name == "local":
        local.prepare(local_dir)
    elif name == "demo":
        demo.build(dataset.directory)
    else:
        # Not at the head: the hub's client takes a second to import, and only this needs it.
        from nanochat_jax.data.hub import download

        names = [*dataset.train_names(num_shards), dataset.validation]
        download(dataset.repo_id, names, dataset.directory)


def dataset_directory(name: str, local_dir: str = "") -> Path:
    return local.dataset_directory(local_dir) if name == "local" else get(name).directory


def _note_changes(local_dir: str) -> None:
    source = Path(local_dir).expanduser().resolve()
    manifest = read_manifest(local.dataset_directory(local_dir))
    assert manifest is not None
    if manifest["in_place"]:
        return
    if manifest["files"] != local.fingerprint(local.find_files(source), source):
        log(
            f"local: files in {source} changed since they were packed; the packed text is used. "
            "`python scripts/data.py pack` with the same --config packs them again"
        )


def table(local_dir: str = "") -> str:
    """What there is and what of it is on the disk, for people."""
    rows = [("name", "what", "size", "shards on disk", "validation", "licence")]
    for dataset in DATASETS.values():
        size = (
            f"{dataset.num_shards * dataset.shard_bytes / 1e9:,.0f} GB" if dataset.repo_id else ""
        )
        on_disk, validation = _on_disk(dataset, local_dir)
        rows.append((dataset.name, dataset.description, size, on_disk, validation, dataset.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _on_disk(dataset: Dataset, local_dir: str) -> tuple[str, str]:
    """How many shards of how many are there, and the name of the validation shard."""
    if dataset.name == "local":
        found = local.shard_paths(local_dir) if local_dir else None
    elif dataset.repo_id:
        manifest = read_manifest(dataset.directory) or {"shards": {}}
        there = sum((dataset.directory / name).exists() for name in manifest["shards"])
        return f"{there:,} of {dataset.num_shards:,}", dataset.validation
    else:
        found = find(dataset.name, num_shards=0)
    if found is None:
        return "none yet", ""
    train, validation = found
    return f"{len(train) + 1} of {len(train) + 1}", validation.name
