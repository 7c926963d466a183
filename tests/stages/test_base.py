"""Whole stages on a tiny recipe: what they leave, and that no interruption changes it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME, UserError, run_dir
from nanochat_jax.launch import runtime
from nanochat_jax.launch.provenance import only_one
from nanochat_jax.stages import chain as stages
from nanochat_jax.stages import evals as stages_eval
from nanochat_jax.stages import text as stages_text
from nanochat_jax.stages import train as stages_train
from nanochat_jax.train import checkpoint as ck
from nanochat_jax.train.layout import LayoutRecord, candidates, in_the_step

ROOT = cfg.CONFIGS.parent
STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of small texts with enough rhythm to learn from."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    who, does, what = (
        ["The cat", "A dog", "My aunt"],
        ["sees", "likes", "paints"],
        ["a boat", "rain"],
    )
    for number in range(300):
        lines = [f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}." for _ in range(12)]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def base_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def arguments(text: Path, name: str = "run", **overrides) -> dict[str, str]:
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
    keys |= {k.replace("__", "."): v for k, v in overrides.items()}
    return {k: str(v) for k, v in keys.items()}


def recipe(text: Path, name: str = "run", **overrides):
    return cfg.load(cfg.CONFIGS / "tiny.py", arguments(text, name, **overrides))


def lines(name: str) -> list[dict]:
    """metrics.jsonl without the clock."""
    raw = (run_dir(name) / "base" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_secs")} for line in raw]


def digest(name: str) -> str:
    folder = run_dir(name) / "base" / "checkpoints"
    return ck.digest(ck.restore_params(folder, ck.list_steps(folder)[-1]))


def interrupt_at(monkeypatch, batch_number: int, action) -> None:
    """Do `action` while the batch of that number goes to the devices."""
    put, seen = stages_train.put_batch, []

    def wrapped(batch, mesh):
        seen.append(1)
        if len(seen) == batch_number:
            action()
        return put(batch, mesh)

    monkeypatch.setattr(stages_train, "put_batch", wrapped)


def test_base_from_text_to_evaluation(base_dir, text, capsys):
    assert stages.run_base(recipe(text)) == 0
    metrics = lines("run")
    train = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(STEPS))
    assert train[-1]["loss"] < train[0]["loss"] - 1
    scores = [line["val_bpb"] for line in metrics if line.get("name") == "bpb"]
    assert len(scores) == 3 and scores[-1] < scores[0]
    out = capsys.readouterr().out
    assert "base.total_batch_tokens" not in out  # given, not derived
    assert f"step {STEPS:05d}/{STEPS:05d} (100.0%) | loss" in out and "tok/s | mfu" in out

    stages_eval.run_base_eval(recipe(text))
    result = json.loads((run_dir("run") / "eval" / "base.json").read_text())
    assert result["val_bpb"] == pytest.approx(scores[-1], rel=1e-6)
    assert [s["prompt"] for s in result["samples"]] == ["The cat", "My"]

    # Both know that they are complete.
    before = (run_dir("run") / "base" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert stages.run_base(recipe(text)) == 0
    stages_eval.run_base_eval(recipe(text))
    out = capsys.readouterr().out
    assert "base: complete" in out and "base_eval:" in out and "is there" in out
    stages_text.run_tok_eval(recipe(text))
    capsys.readouterr()
    stages_text.run_tok_eval(recipe(text))
    assert "tok_eval:" in capsys.readouterr().out
    assert (run_dir("run") / "base" / "metrics.jsonl").stat().st_mtime_ns == before


def test_crash_and_signal_change_nothing(base_dir, text, monkeypatch, capsys):
    stages.run_base(recipe(text, "straight"))

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            stages.run_base(recipe(text, "broken"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stages.run_base(recipe(text, "broken")) == EXIT_RESUME_ME
    assert stages.run_base(recipe(text, "broken")) == 0
    assert "continuing from the checkpoint at step" in capsys.readouterr().out
    assert lines("broken") == lines("straight")
    assert digest("broken") == digest("straight")


def test_a_damaged_checkpoint_is_made_again(base_dir, text, monkeypatch, capsys):
    stages.run_base(recipe(text, "straight"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stages.run_base(recipe(text, "damaged"))
    folder = run_dir("damaged") / "base" / "checkpoints"
    newest = ck.list_steps(folder)[-1]
    victim = ck.step_dir(folder, newest) / "host.json"
    victim.write_text(victim.read_text().replace("loss_ema", "loss_eme"))
    assert stages.run_base(recipe(text, "damaged")) == 0
    assert f"checkpoint at step {newest} is damaged" in capsys.readouterr().out
    assert lines("damaged") == lines("straight")
    assert digest("damaged") == digest("straight")
    assert all(ck.damage(folder, step) == [] for step in ck.list_steps(folder))


def test_an_evaluation_that_fails_costs_no_checkpoint(base_dir, text):
    """In a process of its own: a save must outlive the exception that ends the program."""
    program = (
        "import sys\n"
        "from nanochat_jax import stages, config\n"
        "def fail(*_):\n    raise RuntimeError('evaluation')\n"
        "stages.text_bpb = lambda *_: fail\n"
        "stages.run_base(config.load_from_argv(None))\n"
    )
    keys = [f"--config.{k}={v}" for k, v in arguments(text).items()]
    done = subprocess.run(
        [sys.executable, "-c", program, f"--config={cfg.CONFIGS / 'tiny.py'}", *keys],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "RuntimeError: evaluation" in done.stderr
    folder = run_dir("run") / "base" / "checkpoints"
    assert ck.list_steps(folder) == [3, 4] and ck.damage(folder, 4) == []


def test_continuing_on_another_mesh(base_dir, text, monkeypatch):
    stages.run_base(recipe(text, "straight"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert stages.run_base(recipe(text, "moved")) == EXIT_RESUME_ME
    assert stages.run_base(recipe(text, "moved", mesh__fsdp=2, mesh__tensor=2)) == 0
    for moved, straight in zip(lines("moved"), lines("straight"), strict=True):
        assert moved["step"] == straight["step"]
        if moved["kind"] == "train":
            assert moved["loss"] == pytest.approx(straight["loss"], rel=1e-5)


def test_another_recipe_is_refused_key_by_key(base_dir, text, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stages.run_base(recipe(text))
    info = run_dir("run") / "base" / "run_info.json"
    before = info.read_text()
    with pytest.raises(UserError, match="config.optim.matrix_lr was 0.02, now 0.03; take these"):
        stages.run_base(recipe(text, optim__matrix_lr=0.03, base__save_every=4))
    assert info.read_text() == before  # a refused start leaves no trace
    with pytest.raises(
        UserError, match="tokenizer .* config.tokenizer.vocab_size was 320, now 330"
    ):
        stages.run_base(recipe(text, tokenizer__vocab_size=330))
    assert stages.run_base(recipe(text, base__save_every=4)) == 0
    assert "config.base.save_every was 3, now 4 (allowed)" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(base_dir, text):
    with pytest.raises(UserError) as error:
        stages.run_base(recipe(text, optim__matrix_lr=1.3e18, base__save_every=1))
    message = str(error.value)
    assert "expected finite numbers" in message and "shard_0000" in message
    folder = run_dir("run") / "base" / "checkpoints"
    good = ck.list_steps(folder)[-1]
    assert f"step_{good:06d}" in message
    assert ck.damage(folder, good) == []
    kept = ck.restore_params(folder, good)
    assert all(np.isfinite(value).all() for value in kept.values())


def test_too_little_memory_is_told_before_the_start(base_dir, text, monkeypatch):
    monkeypatch.setattr(runtime, "available_bytes", lambda mesh: 1000)
    with pytest.raises(UserError, match="need .* MiB per device, there are 0.0 MiB, .* too few"):
        stages.run_base(recipe(text))
    assert not (run_dir("run") / "base" / "metrics.jsonl").exists()


OUT = "RESOURCE_EXHAUSTED: Out of memory allocating 1600 bytes."


def run_out(*_):
    raise jax.errors.JaxRuntimeError(OUT)


def layout_file(name: str) -> dict:
    return json.loads((run_dir(name) / "base" / "layout.json").read_text())


def assert_learned_the_same(name: str, expected: str) -> None:
    for ours, theirs in zip(lines(name), lines(expected), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in {"loss", "grad_norm", "val_bpb"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


def test_out_of_memory_in_a_step_changes_the_layout_and_nothing_else(
    base_dir, text, monkeypatch, capsys
):
    stages.run_base(recipe(text, "straight"))
    taken = layout_file("straight")["taken"]
    assert (taken["rows"], taken["remat"]) == (2, "none")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, run_out)  # after the checkpoint at step 6
        assert stages.run_base(recipe(text, "small")) == 0
    out = capsys.readouterr().out
    assert f"base: out of memory with 2 rows at once, remat none ({OUT}); continuing" in out
    assert "base: continuing from the checkpoint at step 6" in out
    record = layout_file("small")
    assert [entry["remat"] for entry in record["too_large"]] == ["none"]
    assert record["taken"]["remat"] == "names" and record["taken"]["rows"] == 2
    assert_learned_the_same("small", "straight")
    assert lines("small")[:7] == lines("straight")[:7]  # what was done before is not done again
    info, plain = (
        json.loads((run_dir(name) / "base" / "run_info.json").read_text())
        for name in ("small", "straight")
    )
    assert info["documents"] == plain["documents"] and info["layout"].endswith("remat names")


@pytest.mark.slow
def test_out_of_memory_twice_before_any_checkpoint(base_dir, text, monkeypatch, capsys):
    """From the beginning each time; a crash later continues in the layout that was found."""
    put, seen = stages_train.put_batch, []

    def put_batch(batch, mesh):
        seen.append(1)
        if len(seen) in (1, 3):
            run_out()
        if len(seen) == 13:
            raise RuntimeError("power cut")
        return put(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(stages_train, "put_batch", put_batch)
        with pytest.raises(RuntimeError, match="power cut"):
            stages.run_base(recipe(text, "cut"))
        assert stages.run_base(recipe(text, "cut")) == 0
    assert capsys.readouterr().out.count("; continuing in a smaller layout") == 2
    assert [entry["remat"] for entry in layout_file("cut")["too_large"]] == ["none", "names"]
    stages.run_base(recipe(text, "straight", model__remat="full"))
    assert lines("cut") == lines("straight") and digest("cut") == digest("straight")


def test_out_of_memory_in_an_evaluation_keeps_the_layout(base_dir, text, monkeypatch):
    monkeypatch.setattr(stages, "text_bpb", lambda *_: run_out)
    with pytest.raises(UserError, match="1600 bytes.*lower --config.eval.device_batch_size"):
        stages.run_base(recipe(text))
    assert layout_file("run")["too_large"] == []


def test_out_of_memory_while_saving_keeps_the_layout(base_dir, text, monkeypatch):
    monkeypatch.setattr(ck.Checkpoints, "save", run_out)
    with pytest.raises(UserError, match="outside the training step .*config.mesh.tensor"):
        stages.run_base(recipe(text))
    assert layout_file("run")["too_large"] == []


def test_one_of_several_processes_notes_it_and_ends(tmp_path, monkeypatch):
    stage = tmp_path / "base"
    layouts = candidates(2, 2, 32, "auto")
    LayoutRecord(stage / "layout.json", {}, layouts).take(layouts[0], 9)
    monkeypatch.setattr(stages_train, "_train", in_the_step()(run_out))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    closed = []
    job = SimpleNamespace(batches=SimpleNamespace(close=lambda: closed.append(1)))
    status = stages_train._train_in_memory(None, stage, lambda run: job, None)  # type: ignore[arg-type]
    assert status == EXIT_RESUME_ME and closed  # what launchers restart
    assert json.loads((stage / "layout.json").read_text())["too_large"][0]["bytes"] == 9


PROGRAM = """
import resource, sys, psutil
from nanochat_jax import config
from nanochat_jax.stages import chain as stages, train as stages_train
put, note = stages_train.put_batch, stages_train.note_too_large
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
def put_batch(batch, mesh):
    stages_train.put_batch = put
    batch = put(batch, mesh)
    little = psutil.Process().memory_info().vms + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (little, hard))
    return batch
def note_too_large(path):
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return note(path)
stages_train.put_batch, stages_train.note_too_large = put_batch, note_too_large
sys.exit(stages.run_base(config.load_from_argv(None)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_really_runs_out(base_dir, text):
    """A step of several hundred MiB where there are 64 more: the first step fails in XLA."""
    keys = {"base.num_steps": 3, "base.total_batch_tokens": 4096, "model.seq_len": 256}
    keys |= {"model.aspect_ratio": 128, "base.device_batch_size": 16, "base.eval_every": 0}
    flags = "--xla_backend_optimization_level=0"  # one device
    words = [f"--config.{k}={v}" for k, v in (arguments(text) | keys).items()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--config={cfg.CONFIGS / 'tiny.py'}", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory with 16 rows at once, remat none (RESOURCE_EXHAUSTED: " in done.stdout
    assert [line["step"] for line in lines("run") if line["kind"] == "train"] == [0, 1, 2]
    assert layout_file("run")["taken"]["remat"] == "names"


def test_two_runs_never_share_a_stage(base_dir, text):
    with only_one(run_dir("run") / "base"):
        with pytest.raises(UserError, match="in use by another process"):
            stages.run_base(recipe(text))


class Script:
    """scripts/train.py in a process of its own, its output in a file."""

    def __init__(self, text: Path, name: str, environment: dict[str, str], **overrides):
        keys = arguments(text, name, **overrides)
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config=configs/tiny.py"]
        command += [f"--config.{k}={v}" for k, v in keys.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        self.output = run_dir(f"{name}{time.time_ns()}.log")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def succeeds(self) -> None:
        assert self.process.wait(300) == 0, self.output.read_text()


@pytest.mark.slow
def test_three_kills_change_nothing(base_dir, text):
    keys, one = {"base.num_steps": 40}, {"XLA_FLAGS": ""}
    Script(text, "straight", one, **keys).succeeds()
    path = run_dir("killed") / "base" / "metrics.jsonl"
    goals = sorted(random.Random(seed := time.time_ns()).sample(range(2, 44), 3))
    print(f"killed after {goals} lines, seed {seed}")  # shown when the test fails
    for goal in goals:
        run = Script(text, "killed", one, **keys).process
        while run.poll() is None:
            if path.exists() and path.read_text().count("\n") >= goal:
                run.kill()
            time.sleep(0.001)
    Script(text, "killed", one, **keys).succeeds()
    assert lines("killed") == lines("straight")
    assert digest("killed") == digest("straight")
