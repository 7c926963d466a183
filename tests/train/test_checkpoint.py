"""Checkpoints: bit for bit, onto any layout, and never half."""

import hashlib
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.train import checkpoint as ck
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state, create_state
from tests.train.test_step import one_device, optimizer

CONFIG = GPTConfig(
    vocab_size=64, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=2, seq_len=8
)


@pytest.fixture(scope="module")
def tx():
    return optimizer(CONFIG)


@pytest.fixture(scope="module")
def state(tx):
    owners = Owners(CONFIG, one_device())
    return owners.to_paths(create_state(owners, tx, seed=0))


def at(state, step: int):
    return state._replace(step=jnp.int32(step))


def save(checkpoints, state, **host):
    checkpoints.save(state, {"step": int(state.step), **host}, {"lanes": {"0": [1, 2]}})
    checkpoints.wait()


def test_a_restored_state_is_the_saved_one_on_any_layout(tmp_path, tx, state):
    checkpoints = ck.Checkpoints(tmp_path, keep=2)
    save(checkpoints, at(state, 7), loop={"loss_ema": 0.1 + 0.2})
    layouts = [one_device(), make_mesh(data=2, fsdp=2, tensor=2), make_mesh(fsdp=8)]
    for mesh in layouts:
        owners = Owners(CONFIG, mesh)
        target = abstract_state(owners, tx)
        restored = checkpoints.restore(owners.on_disk(target), 7)
        owned = owners.to_owned(restored)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(b)), owned, target)
        for again in (restored, owners.to_paths(owned)):
            assert jax.tree.structure(again) == jax.tree.structure(state)
            jax.tree.map(np.testing.assert_array_equal, again, at(state, 7))
        assert restored.params["lm_head.kernel"].sharding.num_devices == mesh.size
    assert ck.read_host(tmp_path, 7)["loop"]["loss_ema"] == 0.1 + 0.2
    assert ck.read_data_states(tmp_path, 7) == [{"lanes": {"0": [1, 2]}}]


def test_parameters_alone_and_their_digest(tmp_path, state):
    save(ck.Checkpoints(tmp_path, keep=1), at(state, 3))
    on_one = ck.restore_params(tmp_path, 3)
    mesh = make_mesh(fsdp=4, tensor=2)
    on_eight = ck.restore_params(tmp_path, 3, param_shardings(mesh, param_shapes(CONFIG)))
    assert ck.digest(on_one) == ck.digest(on_eight) == ck.digest(state.params)
    touched = state.params | {"wte.table": state.params["wte.table"].at[0, 0].add(1e-7)}
    assert ck.digest(touched) != ck.digest(state.params)


def test_the_newest_and_the_best_are_kept(tmp_path, state):
    checkpoints = ck.Checkpoints(tmp_path, keep=2)
    for step, bpb in [(1, 2.0), (2, 1.0), (3, 1.5), (4, 1.4), (5, 1.3)]:
        save(checkpoints, at(state, step))
        checkpoints.record_score(step, bpb)
    assert ck.list_steps(tmp_path) == [2, 4, 5]
    assert ck.best_step(tmp_path) == 2
    assert ck.prune(tmp_path, keep=1) == [4]


def test_a_save_that_never_finished_does_not_count(tmp_path, state):
    for step in (1, 2):
        save(ck.Checkpoints(tmp_path, keep=3), at(state, step))
    (ck.step_dir(tmp_path, 2) / ck.CHECKSUMS).unlink()  # what a kill in the middle leaves
    assert ck.list_steps(tmp_path) == [1]
    checkpoints = ck.Checkpoints(tmp_path, keep=3)
    assert not ck.step_dir(tmp_path, 2).exists()
    assert checkpoints.latest_intact() == 1


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, state, capsys, harm):
    checkpoints = ck.Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, at(state, step))
    folder = ck.step_dir(tmp_path, 2) / "arrays"
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = victim.read_bytes()
    victim.unlink()
    if harm != "delete":
        flipped = raw[:50] + bytes([raw[50] ^ 1]) + raw[51:]
        victim.write_bytes(flipped if harm == "flip" else raw[:-1])
    (line,) = ck.damage(tmp_path, 2)
    assert str(victim) in line
    assert checkpoints.latest_intact() == 1
    assert str(victim) in capsys.readouterr().out
    assert ck.damage(tmp_path, 1) == []


def test_a_save_that_fails_is_told_and_loses_nothing(tmp_path, state, monkeypatch):
    checkpoints = ck.Checkpoints(tmp_path, keep=3)
    save(checkpoints, at(state, 1))

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)  # the last thing that writing a file does
        with pytest.raises(UserError, match="No space left on device"):
            save(checkpoints, at(state, 2))
    assert checkpoints.latest_intact() == 1
    save(checkpoints, at(state, 2))  # once there is room again
    assert checkpoints.latest_intact() == 2


def test_saving_does_not_wait_for_the_disk(tmp_path, state, monkeypatch):
    release, checksum = threading.Event(), hashlib.file_digest

    def slow(file, digest):
        release.wait(10)
        return checksum(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    checkpoints = ck.Checkpoints(tmp_path, keep=3)
    checkpoints.save(at(state, 1), {"step": 1}, {})
    assert ck.list_steps(tmp_path) == []  # save() came back, the disk has not
    release.set()
    checkpoints.wait()
    assert ck.list_steps(tmp_path) == [1]
