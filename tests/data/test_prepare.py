"""Names of datasets, validation by name, and what is told about what is missing."""

import pytest

from nanochat_jax.common import UserError, write_json
from nanochat_jax.data import datasets as registry
from nanochat_jax.data import prepare


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name, last", [("climbmix", "shard_06542.parquet"), ("fineweb_edu", "shard_01822.parquet")]
)
def test_validation_is_never_a_training_shard(name, last):
    dataset = registry.get(name)
    assert dataset.validation == last
    everything = dataset.train_names(dataset.num_shards - 1)
    assert last not in everything and everything[0] == "shard_00000.parquet"
    assert len(set(everything)) == dataset.num_shards - 1
    for count in (0, -1, dataset.num_shards):
        with pytest.raises(UserError, match=f"num_shards = {count}, expected 1 to"):
            dataset.train_names(count)


def test_unknown_name():
    with pytest.raises(
        UserError, match="'pile', expected one of climbmix, fineweb_edu, local, demo"
    ):
        prepare.ensure("pile", num_shards=1)


def record(directory, sizes):
    directory.mkdir(parents=True)
    for name, size in sizes.items():
        (directory / name).write_bytes(bytes(size))
    shards = {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()}
    write_json(directory / "dataset.json", {"shards": shards, "revision": "r", "repo_id": "x"})


def test_found_when_all_shards_are_there_with_their_sizes():
    dataset = registry.get("fineweb_edu")
    names = [*dataset.train_names(2), dataset.validation]
    record(dataset.directory, dict.fromkeys(names, 10))
    expected = [dataset.directory / name for name in names]
    assert prepare.find("fineweb_edu", num_shards=2) == (expected[:2], expected[2])
    assert prepare.find("fineweb_edu", num_shards=1) == (expected[:1], expected[2])
    assert prepare.find("fineweb_edu", num_shards=3) is None
    expected[2].write_bytes(b"")
    assert prepare.find("fineweb_edu", num_shards=1) is None
    expected[2].unlink()
    assert prepare.find("fineweb_edu", num_shards=1) is None


def test_table_tells_what_is_on_the_disk():
    dataset = registry.get("fineweb_edu")
    record(dataset.directory, dict.fromkeys([*dataset.train_names(2), dataset.validation], 10))
    lines = prepare.table().splitlines()
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert list(by_name) == ["climbmix", "fineweb_edu", "local", "demo"]
    assert (
        "3 of 1,823" in by_name["fineweb_edu"] and "shard_01822.parquet" in by_name["fineweb_edu"]
    )
    assert "0 of 6,543" in by_name["climbmix"]
    assert "none yet" in by_name["demo"] and "none yet" in by_name["local"]


def test_broken_record(base_dir):
    (base_dir / "data" / "demo").mkdir(parents=True)
    (base_dir / "data" / "demo" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is not valid JSON.*delete it and run"):
        prepare.ensure("demo", num_shards=1)
