"""The whole comparison: green on the goldens, and a miss that is named for whatever is changed."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.parity.case import exact_arithmetic, read_case
from nanochat_jax.parity.folder import NOT_COVERED, compare_folder
from nanochat_jax.parity.reference import Reference, close_row, exact_row, guarded, read_arrays
from nanochat_jax.parity.rows import Row
from nanochat_jax.parity.scaling import compare_scaling
from nanochat_jax.parity.updates import (
    MAX_COIN_TOSSES,
    STEP_TOLERANCE,
    compare_groups,
    compare_step,
)
from scripts import parity as script

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"


def run_script(*args) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = script.main([str(arg) for arg in args])
    return code, out.getvalue()


def misses(rows) -> dict[tuple[str, str], Row]:
    return {(row.file, row.what): row for row in rows if not row.ok}


def test_the_goldens_are_green_and_all_of_them_is_accounted_for():
    code, text = run_script(GOLDENS)
    assert code == 0, text
    lines = text.splitlines()
    assert not [line for line in lines if "MISS" in line]
    assert lines[-1].startswith("parity: ")
    assert f"{len(NOT_COVERED)} entries not covered yet" in lines[-1]
    told = {line.split()[0] for line in lines[1:-2]}
    assert told == {path.name for path in GOLDENS.iterdir()} - {"README.md"}
    for what in (
        "logits",
        "grad/*, tiled",
        "rl_grad/*",
        "bpb",
        "greedy_long_tokens",
        "opt/param4/*",
        "lm_own_items: correct",
    ):
        assert any(line.split("  ")[1:] and what in line and " ok" in line for line in lines), what


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A copy of the goldens with a change of each kind, and the rows that come of it."""
    folder = tmp_path_factory.mktemp("goldens")
    for path in GOLDENS.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    arrays = dict(np.load(GOLDENS / "classic.npz"))
    arrays["logits"][0, 3, 5] += 2e-5
    arrays["rl_grad/lm_head.weight"][7, 1] -= 2e-5
    arrays["opt/param2/transformer.h.1.mlp.c_fc.weight"][3, 4] += 5e-5
    arrays["greedy_tokens"][-1] += 1
    arrays["trajectory_loss"][5] = np.nan
    arrays["new_array"] = np.zeros(3)
    del arrays["bpb"]
    np.savez(folder / "classic.npz", **arrays)
    settings = json.loads((GOLDENS / "classic.json").read_text())
    settings["config"]["new_size"] = 3
    settings["optimizer"]["adam_eps"] = 1e-8
    (folder / "classic.json").write_text(json.dumps(settings))
    (folder / "modern.npz").write_bytes(b"not an archive")
    (folder / "modern_scaling.json").unlink()
    (folder / "more.json").write_text("{}")
    return folder, misses(compare_folder(folder)[0])


def test_each_change_is_a_miss_that_is_named(spoilt):
    _, missed = spoilt
    assert set(missed) == {
        ("classic.npz", "logits"),
        ("classic.npz", "rl_grad/*"),
        ("classic.npz", "opt/param2/*"),
        ("classic.npz", "greedy_tokens"),
        ("classic.npz", "trajectory_loss"),
        ("classic.npz", "new_array"),
        ("classic.npz", "bpb"),
        ("classic.npz", "token_bytes"),
        ("classic.json", "config.new_size"),
        ("classic.json", "optimizer.adam_eps"),
        ("modern.npz", "all"),
        ("modern_scaling.json", "all"),
        ("more.json", "all"),
    }
    assert missed["classic.npz", "logits"].difference == pytest.approx(2e-5, rel=0.1)
    assert missed["classic.npz", "greedy_tokens"].difference == 1
    assert "blocks.1.mlp.c_fc.kernel" in missed["classic.npz", "opt/param2/*"].note
    assert "lm_head.kernel" in missed["classic.npz", "rl_grad/*"].note
    assert "not a file of plain arrays" in missed["modern.npz", "all"].note
    assert "not able to compare" in missed["classic.npz", "new_array"].note


def test_a_miss_is_an_exit_status(tmp_path, monkeypatch):
    rows = [Row("a.npz", "fine", 3, 0.0, 0.0), Row("b.npz", "off", 1_000, 0.5, 1e-5, "in x")]
    monkeypatch.setattr(script, "compare_folder", lambda folder, core_data: (rows, ["hf_nanochat"]))
    code, text = run_script(tmp_path)
    assert code == 1
    header, fine, off, later, _, last = text.splitlines()
    assert header.split("  ")[0] == "file" and off.split() == [
        *("b.npz", "off", "1,000", "0.5", "1e-05", "MISS", "in", "x")
    ]
    assert {len(line[: line.index(word)]) for line, word in ((fine, "ok"), (off, "MISS"))} == {
        header.index("result")
    }
    assert later.endswith("not covered yet")
    assert last.startswith("NO parity: 1 of 2 rows ok") and last.endswith("1 misses in b.npz")


@pytest.mark.parametrize("args", [["{tmp}/nowhere"], ["{tmp}", "--core-data={tmp}/nowhere"]])
def test_a_folder_that_is_not_there_is_said_in_one_line(tmp_path, args):
    with pytest.raises(UserError, match="nowhere, expected a folder"):
        run_script(*(arg.format(tmp=tmp_path) for arg in args))


def test_the_command_fails_from_anywhere(tmp_path):
    """Started as a person does, in another folder; jax is not even asked to compile."""
    command = [sys.executable, ROOT / "scripts" / "parity.py", tmp_path / "nowhere"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: got ")


def test_what_is_not_there_is_a_miss(tmp_path):
    """An empty folder: every file that we compare, none of those that come later."""
    rows, not_covered = compare_folder(tmp_path)
    assert not_covered == []
    assert {row.file for row in rows} == {
        *("tokenizer.json", "classic.npz", "modern.npz"),
        *("classic_scaling.json", "modern_scaling.json", "core_model.npz"),
    }
    assert all(not row.ok for row in rows)
    for name in NOT_COVERED:
        (tmp_path / name).mkdir()
    assert sorted(compare_folder(tmp_path)[1]) == sorted(NOT_COVERED)


def groups_after(change) -> dict[tuple[str, str], Row]:
    case = read_case(GOLDENS, "modern")
    change(case.settings.take("param_groups"))
    return misses(compare_groups(case))


@pytest.mark.parametrize(
    "change, what, note",
    [
        (lambda groups: groups[2].update(lr_after_dim_scaling=0.7), "lr", "group 2"),
        (lambda groups: groups[3].update(betas=[0.8, 0.9]), "settings", "group 3 (resid) betas"),
        (lambda groups: groups[8].update(ns_steps=6), "settings", "ns_steps: got 5, reference 6"),
        (lambda groups: groups[0].update(kind="muon"), "settings", "group 0 (unembed) kind"),
        (lambda groups: groups[7].update(momentum=0.9), "settings", "momentum: got None"),
        (lambda groups: groups[8]["params"].pop(), "members", ""),
        (lambda groups: groups.pop(5), "members", ""),
        (lambda groups: groups[4]["params"].append(groups[3]["params"].pop()), "members", ""),
    ],
)
def test_optimizer_groups_are_compared_to_the_last_setting(change, what, note):
    if note:
        missed = groups_after(change)
        assert list(missed) == [("modern.json", f"param_groups {what}")]
        assert note in missed["modern.json", f"param_groups {what}"].note
    else:
        missed = guarded("modern.json", "groups", lambda: groups_after(change).values())
        assert missed and not any(row.ok for row in missed)


def test_scaling_misses_are_named(tmp_path):
    table = json.loads((GOLDENS / "classic_scaling.json").read_text())
    table["models"] = table["models"][3:5]
    table["models"][1]["params"] += 1
    table["models"][0]["new_column"] = 1
    schedules = table.pop("schedules_1000_iterations")
    schedules["rows"][4]["muon_momentum"] *= 1 + 1e-8
    schedules["rows"][-1]["mid_lr_multiplier_at_progress"] = 1e-13  # as good as the 0 it is
    table["schedules_1000_iterations"] = schedules
    table["more"] = {"of": 1}
    (tmp_path / "classic_scaling.json").write_text(json.dumps(table))
    missed = misses(compare_scaling(tmp_path, "classic"))
    assert {what for _, what in missed} == {
        "models: params",
        "models: new_column",
        "schedules_1000_iterations.muon_momentum",
        "more.of",
    }
    row = missed["classic_scaling.json", "models: params"]
    assert "depth 6" in row.note and row.compared == 2
    del table["models"]
    (tmp_path / "classic_scaling.json").write_text(json.dumps(table))
    assert ("classic_scaling.json", "models") in misses(compare_scaling(tmp_path, "classic"))


def test_other_depths_ratios_and_horizons_are_computed_anew(tmp_path):
    """Nothing is looked up: rows that upstream's formulas give at sizes not in the goldens."""
    table = {
        "note": "seq_len 1024",
        "models": [
            # 3 layers of 192, one head; 12 L D^2 + 2 V D; FLOPs 6 (all - V D) + 12 L D T
            {"vocab": 512, "depth": 3, "n_embd": 192, "n_head": 2, "head_dim": 96}
            | {"params": 12 * 3 * 192**2 + 2 * 512 * 192}
            | {"flops_per_token": 6 * (12 * 3 * 192**2 + 512 * 192) + 12 * 3 * 192 * 1024}
            | {"num_iterations_ratio40": 40 * (12 * 3 * 192**2 + 2 * 512 * 192) // 2**19}
        ],
        "schedules_50_iterations": {
            "base": {"warmup_ratio": 0.0, "warmdown_ratio": 0.5, "final_lr_frac": 0.0},
            "warm": {"warmup_ratio": 0.1, "warmdown_ratio": 0.2, "final_lr_frac": 0.5},
            "rows": [
                {"it": 0, "lr_multiplier": 1.0, "lr_multiplier_warm": 0.2, "muon_momentum": 0.85}
                | {"mid_lr_multiplier_at_progress": 1.0, "sft_rl_lr_multiplier": 1.0},
                {"it": 45, "lr_multiplier": 0.2, "lr_multiplier_warm": 0.75, "muon_momentum": 0.865}
                | {"mid_lr_multiplier_at_progress": 0.5, "sft_rl_lr_multiplier": 0.1},
            ],
        },
    }
    (tmp_path / "classic_scaling.json").write_text(json.dumps(table))
    rows = compare_scaling(tmp_path, "classic")
    assert not misses(rows) and sum(row.compared for row in rows) == 6 + 10


def step_row(ours, reference, decay):
    return compare_step("f", "step", {"w": jnp.asarray(ours)}, {"w": reference}, {"w": decay})


def test_a_few_cautious_signs_may_differ_by_the_decay_and_by_nothing_else():
    reference, decay = np.zeros(10, np.float32), np.full(10, 1e-3, np.float32)
    tossed = reference.copy()
    tossed[:MAX_COIN_TOSSES] = [1e-3, -1e-3, 1e-3]
    row, params = step_row(tossed, reference, decay)
    assert row.ok and row.difference == 0 and "3 of at most 3" in row.note
    np.testing.assert_array_equal(params["w"], reference)  # so that they do not carry over
    one_more = tossed.copy()
    one_more[5] = 1e-3
    assert step_row(one_more, reference, decay)[0].difference == pytest.approx(1e-3)
    assert not step_row(tossed / 2, reference, decay)[0].ok  # off, but not by the decay
    assert not step_row(tossed, reference, 0.0)[0].ok  # not a matrix
    near = np.full(10, STEP_TOLERANCE / 2, np.float32)
    row, params = step_row(near, reference, decay)
    assert row.ok and row.note == ""
    np.testing.assert_array_equal(params["w"], near)  # ours go on, with their rounding


def test_rows_of_closeness():
    good = close_row("f", "x", {"a": np.ones(3), "b": 2.0}, {"a": np.ones(3), "b": 2.5}, 1.0)
    assert good.ok and (good.compared, good.difference, good.note) == (4, 0.5, "")
    lost = close_row("f", "x", {"a": 1.0}, {"a": 1.0, "b": 2.0}, 1.0)
    assert not lost.ok and lost.note == "b is only in the reference"
    extra = close_row("f", "x", {"a": 1.0, "b": 2.0}, {"a": 1.0}, 1.0)
    assert not extra.ok and extra.note == "b is only in our model"
    hidden = {"a": np.array([0.0, np.nan]), "b": 3.0}
    assert not close_row("f", "x", hidden, {"a": np.zeros(2), "b": 0.0}, 10.0).ok
    shape = close_row("f", "x", np.ones((2, 1)), np.ones(2), 1.0)
    assert not shape.ok and shape.note == "shape (2, 1), reference (2,)"
    assert not close_row("f", "x", np.ones(0), np.ones(0), 1.0).ok  # nothing was compared
    assert close_row("f", "x", 0.0, 2.2e-16, 1e-9, relative=True).ok
    assert not close_row("f", "x", 1e12, 1e12 + 2e3, 1e-9, relative=True).ok
    assert exact_row("f", "x", [1, 2, 3], [1, 5]).difference == 2
    assert not exact_row("f", "x", {}, {}).ok


def test_a_reference_remembers_what_nobody_asked_for():
    reference = Reference("f", {"a/x": 1, "a/y": 2, "b": 3, "c_7": 4})
    assert reference.under("a/") == {"x": 1, "y": 2} and "b" in reference
    assert [match[1] for match in reference.matching(r"c_(\d)")] == ["7"]
    assert [row.what for row in reference.leftovers()] == ["b", "c_7"]
    assert not any(row.ok for row in reference.leftovers())
    for key in ("b", "c_7"):
        reference.take(key)
    assert reference.leftovers() == []
    with pytest.raises(KeyError, match="nothing is missing"):
        reference.take("nothing")
    with pytest.raises(KeyError, match=r"z/\* is missing"):
        reference.under("z/")


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="not a file of plain arrays"):
        read_arrays(tmp_path / "f.npz")


def test_arithmetic_is_full_float32_whatever_the_process_is_set_to():
    import jax

    with jax.default_matmul_precision("bfloat16"), jax.enable_x64(True), exact_arithmetic():
        assert jax.config.jax_default_matmul_precision == "highest"
        assert jnp.ones(2).dtype == jnp.float32
        assert jnp.ones(2).devices() == {jax.devices()[0]}


def test_a_second_case_of_other_sizes_is_read_from_its_files(tmp_path):
    """Window pattern, GQA and depth of the files, the generation's own constants of the recipe."""
    sizes = {"sequence_len": 640, "vocab_size": 70, "n_layer": 1, "n_head": 6, "n_kv_head": 2}
    sizes |= {"n_embd": 48, "window_pattern": "sl"}
    (tmp_path / "modern.json").write_text(json.dumps({"config": sizes}))
    ids = np.zeros((3, 14), np.int64)
    np.savez(tmp_path / "modern.npz", idx=ids, targets=ids, **{"state/x0_lambdas": np.ones(1)})
    case = read_case(tmp_path, "modern")
    config = case.config
    assert (config.windows, config.padded_vocab_size, config.head_dim) == ((640,), 128, 8)
    assert (config.window_pattern, config.num_kv_heads) == ("SL", 2)
    assert (config.rope_base, config.qk_scale, config.extras) == (100_000.0, 1.2, True)
    assert 14 % case.tile != 0 and case.ids.dtype == jnp.int32
