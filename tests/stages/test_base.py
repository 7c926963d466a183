"""Pretraining on a tiny recipe: what it leaves, and that no interruption changes it."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME, UserError, run_dir
from nanochat_jax.launch.provenance import only_one
from nanochat_jax.stages.base import Base
from nanochat_jax.stages.evals import run_base_eval
from nanochat_jax.stages.run import start
from nanochat_jax.stages.train import ran_out, train_stage
from nanochat_jax.train import checkpoint as ck
from nanochat_jax.train.layout import LayoutRecord, candidates
from nanochat_jax.train.loop import Evaluation
from nanochat_jax.train.memory import OutOfMemory
from tests.stages.parts import (
    OUT,
    Script,
    assert_same,
    interrupted,
    kill_three_times,
    last_params,
    lines,
    power_cut,
    runs_out,
    sends,
    with_overrides,
)

STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of small texts with enough rhythm to learn from."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    who, does = ["The cat", "A dog", "My aunt"], ["sees", "likes", "paints"]
    for number in range(300):
        sentences = (
            f"{rng.choice(who)} {rng.choice(does)} {rng.choice(['a boat', 'rain'])}." for _ in "12"
        )
        (folder / f"{number:03d}.txt").write_text("\n".join([*sentences] * 6))
    return folder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """One NANOCHAT_BASE_DIR for all: text is packed once, runs differ in their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder := tmp_path_factory.mktemp("base")))
        yield folder


def arguments(text: Path, name: str, **overrides) -> dict[str, str]:
    keys = {
        "run.name": name,
        "data.name": "local",
        "data.local_dir": text,
        "data.buffer_docs": 16,
        "tokenizer.vocab_size": 320,
        "model.seq_len": 32,
        "base.num_steps": STEPS,
        "base.total_batch_tokens": 512,
        "base.device_batch_size": 2,
        "base.eval_every": 4,
        "base.sample_every": 0,
        "base.save_every": 3,
        "eval.val_tokens": 512,
        "eval.device_batch_size": 1,
        "eval.prompts": '("The cat", "My")',
        "eval.sample_tokens": 4,
    }
    return with_overrides(keys, overrides)


@pytest.fixture(scope="module")
def recipe(base_dir, text):
    return lambda name, **keys: cfg.load(cfg.CONFIGS / "tiny.py", arguments(text, name, **keys))


@pytest.fixture(scope="module")
def straight(recipe) -> str:
    """The name of a run that nothing has interrupted."""
    assert train_stage(recipe("straight"), Base) == 0
    return "straight"


def layout_file(name: str) -> dict:
    return json.loads((run_dir(name) / "base" / "layout.json").read_text())


def test_base_from_text_to_evaluation(recipe, straight, capsys):
    metrics = lines(straight)
    train = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(STEPS))
    assert train[-1]["loss"] < train[0]["loss"] - 1
    scores = [line["val_bpb"] for line in metrics if line.get("name") == "bpb"]
    assert len(scores) == 3 and scores[-1] < scores[0]
    run_base_eval(recipe(straight))
    out = run_dir(straight) / "eval" / "base.json"
    result = json.loads(out.read_text())
    assert result["val_bpb"] == pytest.approx(scores[-1], rel=1e-6)
    assert [s["prompt"] for s in result["samples"]] == ["The cat", "My"]
    assert len(result["answers"]) == 4
    # All know that they are complete.
    files = [run_dir(straight) / "base" / "metrics.jsonl", out]
    before = [file.stat().st_mtime_ns for file in files]
    assert train_stage(recipe(straight), Base) == 0
    run_base_eval(recipe(straight))
    assert [file.stat().st_mtime_ns for file in files] == before


def test_what_was_derived_is_told_once_in_a_run(recipe, straight, capsys):
    start(recipe(straight))
    (line,) = capsys.readouterr().out.splitlines()
    assert "derived.txt" in line
    start(recipe(straight, model__attention="xla"))
    assert "attention: xla" in capsys.readouterr().out


def test_crash_and_signal_change_nothing(recipe, straight):
    with pytest.raises(RuntimeError, match="power cut"):
        train_stage(recipe("broken"), interrupted(Base, {8: power_cut}))
    stage = interrupted(Base, {2: sends(signal.SIGTERM)})
    assert train_stage(recipe("broken"), stage) == EXIT_RESUME_ME
    assert train_stage(recipe("broken"), Base) == 0
    assert_same("broken", straight)


def test_a_damaged_checkpoint_is_made_again(recipe, straight, capsys):
    train_stage(recipe("damaged"), interrupted(Base, {8: sends(signal.SIGTERM)}))
    folder = run_dir("damaged") / "base" / "checkpoints"
    newest = ck.list_steps(folder)[-1]
    victim = ck.step_dir(folder, newest) / "host.json"
    victim.write_text(victim.read_text().replace("loss_ema", "loss_eme"))
    assert train_stage(recipe("damaged"), Base) == 0
    assert str(victim) in capsys.readouterr().out
    assert_same("damaged", straight)
    assert all(ck.damage(folder, step) == [] for step in ck.list_steps(folder))


FAILS = """
from nanochat_jax.stages.base import Base
from nanochat_jax.train.loop import Evaluation
def fail(params): raise RuntimeError('evaluation')
init = Base.__init__
def with_one_that_fails(self, run):
    init(self, run)
    self.evaluations = [Evaluation('bpb', 4, fail)]
Base.__init__ = with_one_that_fails
"""


def test_an_evaluation_that_fails_costs_no_checkpoint(base_dir, text):
    """In a process of its own: a save must outlive the exception that ends the program."""
    run = Script("train.py", arguments(text, "fails"), {}, FAILS)
    assert run.process.wait(300) == 1 and "RuntimeError: evaluation" in run.output.read_text()
    folder = run_dir("fails") / "base" / "checkpoints"
    assert ck.list_steps(folder) == [3, 4] and ck.damage(folder, 4) == []


def test_continuing_on_another_mesh(recipe, straight):
    stage = interrupted(Base, {7: sends(signal.SIGINT)})
    assert train_stage(recipe("moved"), stage) == EXIT_RESUME_ME
    assert train_stage(recipe("moved", mesh__fsdp=2, mesh__tensor=2), Base) == 0
    assert_learned_the_same("moved", straight)


def assert_learned_the_same(name: str, expected: str) -> None:
    for ours, theirs in zip(lines(name), lines(expected), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in {"loss", "grad_norm", "val_bpb"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


def test_another_recipe_is_refused_key_by_key(recipe):
    train_stage(recipe("other"), interrupted(Base, {5: sends(signal.SIGTERM)}))
    info = run_dir("other") / "base" / "run_info.json"
    before = info.read_text()
    with pytest.raises(UserError, match="config.optim.matrix_lr was 0.02, now 0.03"):
        train_stage(recipe("other", optim__matrix_lr=0.03, base__save_every=4), Base)
    assert info.read_text() == before  # a refused start leaves no trace
    with pytest.raises(UserError, match="config.tokenizer.vocab_size was 320, now 330"):
        train_stage(recipe("other", tokenizer__vocab_size=330), Base)
    # Where and how often may change; what trains is the same.
    assert train_stage(recipe("other", base__save_every=4, run__profile="9:9"), Base) == 0


def test_a_loss_that_is_not_finite_stops_the_run(recipe):
    with pytest.raises(UserError) as error:
        train_stage(recipe("infinite", optim__matrix_lr=1.3e18, base__save_every=1), Base)
    folder = run_dir("infinite") / "base" / "checkpoints"
    good = ck.list_steps(folder)[-1]
    assert f"step_{good:06d}" in str(error.value) and "shard_0000" in str(error.value)
    assert ck.damage(folder, good) == []
    assert all(np.isfinite(value).all() for value in last_params("infinite").values())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"model__depth": 8, "model__aspect_ratio": 4096, "model__head_dim": 16384},
            "GiB per device",
        ),
        ({"run__profile": "5"}, "config.run.profile"),
        ({"model__attention": "cudnn"}, "config.model.attention"),
        ({"optim__weight_decay": 0.1}, "config.optim.weight_decay"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(recipe, keys, named):
    with pytest.raises(UserError, match=named) as error:
        train_stage(recipe("refused", **keys), Base)
    assert "\n" not in str(error.value)
    assert not (run_dir("refused") / "tokenizer").exists()
    assert not (run_dir("refused") / "base" / "metrics.jsonl").exists()


def test_out_of_memory_in_a_step_changes_the_layout_and_nothing_else(recipe, straight, capsys):
    taken = layout_file(straight)["taken"]
    assert (taken["rows"], taken["remat"]) == (2, "none")
    stage = interrupted(Base, {8: runs_out})  # after the checkpoint at step 6
    assert train_stage(recipe("small"), stage) == 0
    assert OUT in capsys.readouterr().out
    record = layout_file("small")
    assert [entry["remat"] for entry in record["too_large"]] == ["none"]
    assert record["taken"]["remat"] == "names" and record["taken"]["rows"] == 2
    assert_learned_the_same("small", straight)
    assert lines("small")[:7] == lines(straight)[:7]  # what was done before is not done again
    info, plain = (
        json.loads((run_dir(name) / "base" / "run_info.json").read_text())
        for name in ("small", straight)
    )
    assert info["documents"] == plain["documents"] and info["layout"].endswith("remat names")


def test_one_of_several_processes_notes_it_and_ends(tmp_path):
    layouts = candidates(2, 2, 32, "auto")
    LayoutRecord(tmp_path / "layout.json", {}, layouts).take(layouts[0], 9)
    assert ran_out("base", tmp_path, OutOfMemory(OUT), num_processes=1) is None  # alone: goes on
    assert json.loads((tmp_path / "layout.json").read_text())["too_large"][0]["bytes"] == 9
    assert ran_out("base", tmp_path, OutOfMemory(OUT), num_processes=2) == EXIT_RESUME_ME


@pytest.mark.slow
def test_out_of_memory_twice_before_any_checkpoint(recipe):
    """From the beginning each time; a crash later continues in the layout that was found."""
    with pytest.raises(RuntimeError, match="power cut"):
        train_stage(recipe("cut"), interrupted(Base, {1: runs_out, 3: runs_out, 13: power_cut}))
    assert train_stage(recipe("cut"), Base) == 0
    assert [entry["remat"] for entry in layout_file("cut")["too_large"]] == ["none", "names"]
    train_stage(recipe("full", model__remat="full"), Base)
    assert_same("cut", "full")


def test_out_of_memory_in_an_evaluation_keeps_the_layout(recipe):
    class Stage(Base):
        def __init__(self, run):
            super().__init__(run)
            self.evaluations = [
                Evaluation("bpb", 1, lambda params: runs_out({})["inputs"].__len__())
            ]

    with pytest.raises(UserError, match="config.eval.device_batch_size"):
        train_stage(recipe("evaluating"), Stage)
    assert layout_file("evaluating")["too_large"] == []


RUNS_OUT = """
import resource, psutil
from nanochat_jax.stages.base import Base
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
init, next_batch, seen = Base.__init__, Base.next_batch, []
def with_all_memory(self, run):
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    init(self, run)
def with_little_memory(self, params):
    batch = next_batch(self, params)
    seen.append(1)
    if len(seen) == 1:
        little = psutil.Process().memory_info().vms + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (little, hard))
    return batch
Base.__init__, Base.next_batch = with_all_memory, with_little_memory
"""


@pytest.mark.slow
def test_memory_that_really_runs_out(base_dir, text):
    """A step of several hundred MiB where there are 64 more: the first step fails in XLA."""
    keys = {"base__num_steps": 3, "base__total_batch_tokens": 4096, "model__seq_len": 256}
    keys |= {"model__aspect_ratio": 128, "base__device_batch_size": 16, "base__eval_every": 0}
    env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    out = Script("train.py", arguments(text, "really", **keys), env, RUNS_OUT).succeeds()
    assert "remat none (RESOURCE_EXHAUSTED: " in out
    assert [line["step"] for line in lines("really") if line["kind"] == "train"] == [0, 1, 2]
    assert layout_file("really")["taken"]["remat"] == "names"


def test_two_runs_never_share_a_stage(recipe):
    with only_one(run_dir("shared") / "base"):
        with pytest.raises(UserError, match="in use by another process"):
            train_stage(recipe("shared"), Base)


@pytest.mark.slow
def test_three_kills_change_nothing(base_dir, text):
    def script(name):
        return Script("train.py", arguments(text, name, base__num_steps=40), {"XLA_FLAGS": ""})

    script("unhurt").succeeds()
    metrics = run_dir("killed") / "base" / "metrics.jsonl"
    kill_three_times(lambda: script("killed"), metrics, range(2, 44))
    script("killed").succeeds()
    assert_same("killed", "unhurt")
