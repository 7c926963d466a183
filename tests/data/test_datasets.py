"""Names of datasets, validation by name, and what is told about what is missing."""

import pytest

from nanochat_jax.common import UserError, write_json
from nanochat_jax.data import datasets


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name, last", [("climbmix", "shard_06542.parquet"), ("fineweb_edu", "shard_01822.parquet")]
)
def test_validation_is_never_a_training_shard(name, last):
    dataset = datasets.get(name)
    assert dataset.validation == last
    everything = dataset.train_names(dataset.num_shards - 1)
    assert last not in everything and everything[0] == "shard_00000.parquet"
    assert len(set(everything)) == dataset.num_shards - 1
    for count in (0, -1, dataset.num_shards):
        with pytest.raises(UserError, match=f"num_shards = {count}"):
            dataset.train_names(count)


def record(directory, sizes):
    directory.mkdir(parents=True)
    for name, size in sizes.items():
        (directory / name).write_bytes(bytes(size))
    shards = {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()}
    write_json(directory / "dataset.json", {"shards": shards, "revision": "r", "repo_id": "x"})


def test_found_when_all_shards_are_there_with_their_sizes():
    dataset = datasets.get("fineweb_edu")
    names = [*dataset.train_names(2), dataset.validation]
    record(datasets.directory("fineweb_edu"), dict.fromkeys(names, 10))
    expected = [datasets.directory("fineweb_edu") / name for name in names]
    assert datasets.find("fineweb_edu", num_shards=2) == (expected[:2], expected[2])
    assert datasets.find("fineweb_edu", num_shards=1) == (expected[:1], expected[2])
    assert datasets.find("fineweb_edu", num_shards=3) is None
    expected[2].write_bytes(b"")
    assert datasets.find("fineweb_edu", num_shards=1) is None


def test_table_tells_what_is_on_the_disk():
    dataset = datasets.get("fineweb_edu")
    names = [*dataset.train_names(2), dataset.validation]
    record(datasets.directory("fineweb_edu"), dict.fromkeys(names, 10))
    lines = datasets.table().splitlines()
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert list(by_name) == ["climbmix", "fineweb_edu", "local", "demo"]
    told = {"climbmix": "0 of", "fineweb_edu": "3 of", "local": " 0 ", "demo": " 0 "}
    assert all(told[name] in line for name, line in by_name.items())


def test_broken_record(base_dir):
    (base_dir / "data" / "demo").mkdir(parents=True)
    (base_dir / "data" / "demo" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json"):
        datasets.ensure("demo", num_shards=1)
