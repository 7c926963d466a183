"""The whole comparison: green on the goldens, and a miss that is named for whatever is changed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.parity.folder import compare_files, compare_folder
from nanochat_jax.parity.model import (
    MAX_ROUNDED_SIGNS,
    compare_groups,
    read_case,
    settle_signs,
)
from nanochat_jax.parity.reference import Reference, Row, collect, read
from scripts import parity as script

GOLDENS = Path(__file__).parents[1] / "goldens"


def misses(rows) -> dict[tuple[str, str], Row]:
    return {(row.file, row.what): row for row in rows if not row.ok}


@pytest.mark.slow
def test_the_goldens_are_green_and_all_of_them_is_accounted_for(capsys):
    assert script.main([str(GOLDENS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0] for line in lines[1:-2]}
    assert told == {path.name for path in GOLDENS.iterdir()} - {"README.md"}
    for what in ("logits", "grad/*, tiled", "bpb", "greedy_long_tokens", "lm_own_items: correct"):
        assert any(what in line and " ok" in line for line in lines), what


def test_each_change_is_a_miss_that_is_named(tmp_path):
    arrays = dict(np.load(GOLDENS / "classic.npz"))
    arrays["logits"][0, 3, 5] += 2e-5
    arrays["rl_grad/lm_head.weight"][7, 1] -= 2e-5
    arrays["opt/param2/transformer.h.1.mlp.c_fc.weight"][3, 4] += 5e-5
    arrays["greedy_tokens"][-1] += 1
    arrays["trajectory_loss"][5] = np.nan
    arrays["new_array"] = np.zeros(3)
    del arrays["bpb"]
    np.savez(tmp_path / "classic.npz", **arrays)
    settings = json.loads((GOLDENS / "classic.json").read_text())
    settings["config"]["new_size"] = 3
    settings["optimizer"]["adam_eps"] = 1e-8
    (tmp_path / "classic.json").write_text(json.dumps(settings))
    (tmp_path / "modern.npz").write_bytes(b"not an archive")
    (tmp_path / "more.json").write_text("{}")
    rows, not_covered = compare_folder(tmp_path, None)
    assert not_covered == []
    missed = misses(rows)
    assert set(missed) == {
        ("tokenizer.json", "all"),
        ("classic.npz", "logits"),
        ("classic.npz", "rl_grad/*"),
        ("classic.npz", "opt/param2/*"),
        ("classic.npz", "greedy_tokens"),
        ("classic.npz", "trajectory_loss"),
        ("classic.npz", "new_array"),
        ("classic.npz", "compare_losses"),  # bpb is not there
        ("classic.json", "config.new_size"),
        ("classic.json", "optimizer.adam_eps"),
        ("modern.npz", "all"),
        ("classic_scaling.json", "all"),
        ("modern_scaling.json", "all"),
        ("core_model.npz", "all"),
        ("more.json", "all"),
    }
    assert missed["classic.npz", "logits"].difference == pytest.approx(2e-5, rel=0.1)
    assert missed["classic.npz", "greedy_tokens"].difference == 1
    assert "blocks.1.mlp.c_fc.kernel" in missed["classic.npz", "opt/param2/*"].note


def test_missing_folders_are_errors_and_missing_files_misses(tmp_path):
    for args in ([tmp_path / "nowhere"], [tmp_path, f"--core-data={tmp_path}/nowhere"]):
        with pytest.raises(UserError, match="nowhere"):
            script.main([str(arg) for arg in args])
    assert script.main([str(tmp_path)]) == 1


@pytest.fixture(scope="module")
def modern_arrays() -> Reference:
    return read(GOLDENS / "modern.npz")


@pytest.mark.parametrize(
    "change, what, note",
    [
        (lambda groups: groups[2].update(lr_after_dim_scaling=0.7), "lr", "group 2"),
        (lambda groups: groups[3].update(betas=[0.8, 0.9]), "settings", "group 3 (resid).betas"),
        (lambda groups: groups[8].update(ns_steps=6), "settings", "ns_steps: got 5, reference 6"),
        (lambda groups: groups[7].update(momentum=0.9), "settings", "momentum"),
        (lambda groups: groups.pop(5), "members", ""),
        (lambda groups: groups[4]["params"].append(groups[3]["params"].pop()), "", ""),
    ],
)
def test_optimizer_groups_are_compared_to_the_last_setting(modern_arrays, change, what, note):
    case = read_case(modern_arrays, read(GOLDENS / "modern.json"), "modern")
    change(case.settings["param_groups"])
    missed = misses(collect("modern.json", "param_groups ", compare_groups(case)))
    assert list(missed) == [("modern.json", f"param_groups {what}")]
    assert note in missed["modern.json", f"param_groups {what}"].note


def test_scaling_misses_are_named(tmp_path):
    table = json.loads((GOLDENS / "classic_scaling.json").read_text())
    table["models"] = table["models"][3:5]
    table["models"][1]["params"] += 1
    table["models"][0]["new_column"] = 1
    rows = table["schedules_1000_iterations"]["rows"]
    rows[4]["muon_momentum"] *= 1 + 1e-8
    rows[-1]["mid_lr_multiplier_at_progress"] = 1e-13  # as good as the 0 it is
    table["more"] = 2
    (tmp_path / "classic_scaling.json").write_text(json.dumps(table))
    missed = misses(compare_files(tmp_path, ("classic_scaling.json",)))
    assert {what for _, what in missed} == {
        *("models: params", "models: new_column", "schedules_1000_iterations.muon_momentum"),
        "more",
    }


def test_a_few_cautious_signs_may_differ_by_the_decay_and_by_nothing_else():
    path, theirs = "blocks.0.mlp.c_fc.kernel", np.zeros((10, 1), np.float32)
    before = np.full((10, 1), 2.0, np.float32)

    def settled(ours, lr_decay=5e-4, path=path):
        return settle_signs({path: before}, {path: jnp.asarray(ours)}, {path: theirs}, lr_decay)

    rounded = theirs.copy()
    rounded[:MAX_ROUNDED_SIGNS, 0] = [1e-3, -1e-3, 1e-3]
    params, note = settled(rounded)
    np.testing.assert_array_equal(params[path], theirs)  # so that they do not carry over
    assert note
    one_more = rounded.copy()
    one_more[5] = 1e-3
    for same, lr_decay in ((one_more, 5e-4), (rounded / 2, 5e-4), (rounded, 0.0)):
        params, note = settled(same, lr_decay)
        np.testing.assert_array_equal(params[path], same)
        assert not note
    np.testing.assert_array_equal(settled(rounded, path="wte.table")[0]["wte.table"], rounded)


@pytest.mark.parametrize(
    "ours, theirs, tolerance, difference",
    [
        ({"a": np.ones(3), "b": 2.0}, {"a": np.ones(3), "b": 2.5}, 1.0, 0.5),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, 1.0, np.inf),
        ({"a": np.array([0.0, np.nan]), "b": 3.0}, {"a": np.zeros(2), "b": 0.0}, 10.0, np.inf),
        (np.ones((2, 1)), np.ones(2), 1.0, np.inf),
        (np.ones(0), np.ones(0), 1.0, np.inf),  # nothing was compared
        ([1, 2, 3], [1, 5], 0.0, 2),
        ({}, {}, 0.0, np.inf),
        (np.array([0.0, np.nan]), np.array([0.5, np.nan]), 1.0, 0.5),  # an empty span on both
    ],
)
def test_the_difference_of_a_comparison(ours, theirs, tolerance, difference):
    row = Reference("f", {}).compare("x", ours, theirs, tolerance)
    assert row.difference == difference and row.ok == (difference <= tolerance)


def test_relative_differences():
    file = Reference("f", {})
    assert file.compare("x", 0.0, 2.2e-16, 1e-9, relative=True).ok
    assert not file.compare("x", 1e12, 1e12 + 2e3, 1e-9, relative=True).ok


def test_a_reference_remembers_what_nobody_read():
    reference = Reference("f", {"a/x": 1, "a/y": 2, "b": 3, "c.d.e": 4})
    assert reference["a"] == {"x": 1, "y": 2} and "b" in reference and "c.d" in reference
    assert [(row.what, row.ok) for row in reference.unread()] == [("b", False), ("c.d.e", False)]
    assert reference["c"] == {"d.e": 4} and reference.get("b") == 3
    assert reference.unread() == []
    with pytest.raises(KeyError):
        reference["a/"]


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError):
        read(tmp_path / "f.npz")
