"""The stages after pretraining: each starts where the one before ended, and survives anything.

One base model is trained for all tests, and mid, SFT and RL once on top of it; every test works on
a copy.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME, UserError, read_json, run_dir, write_json
from nanochat_jax.eval import chat
from nanochat_jax.model.gpt import bind
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.stages import chain as stages
from nanochat_jax.stages import evals as stages_eval
from nanochat_jax.stages import train as stages_train
from nanochat_jax.tasks.arithmetic import Arithmetic
from nanochat_jax.train import checkpoint as ck

ROOT = cfg.CONFIGS.parent
RUN = {"mid": stages.run_mid, "sft": stages.run_sft, "rl": stages.run_rl}
SCRIPT = {"mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py"}
PARENT = {"mid": "base", "sft": "mid", "rl": "sft"}
STEPS = {"mid": 6, "sft": 6, "rl": 4}


def arguments(**overrides) -> dict[str, str]:
    keys = {
        "run.name": "run",
        "data.name": "local",
        "data.local_dir": "text",
        "data.buffer_docs": 16,
        "tokenizer.vocab_size": 320,
        "model.seq_len": 128,
        "base.num_steps": 4,
        "base.total_batch_tokens": 1024,
        "base.device_batch_size": 1,
        "base.eval_every": 0,
        "base.sample_every": 0,
        "base.save_every": 0,
        "mid.num_steps": STEPS["mid"],
        "mid.batch_rows": 8,
        "mid.device_batch_size": 1,
        "sft.num_steps": STEPS["sft"],
        "eval.val_tokens": 1024,
        "eval.device_batch_size": 1,
        "eval.prompts": '("The cat",)',
        "eval.sample_tokens": 2,
    }
    keys |= {k.replace("__", "."): v for k, v in overrides.items()}
    return {k: str(v) for k, v in keys.items()}


def recipe(**overrides):
    return cfg.load(cfg.CONFIGS / "tiny.py", arguments(**overrides))


def by_length(_, answers) -> list[bool]:
    """A verdict that even a model of noise gets right half the time."""
    return [len(said) % 2 == 0 for _, said in answers]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch):
    monkeypatch.setattr(Arithmetic, "grade", by_length)


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory) -> Path:
    """NANOCHAT_BASE_DIR with a base model of text with enough rhythm to learn from."""
    folder = tmp_path_factory.mktemp("base")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for number in range(200):
        words = [
            rng.choice("the cat sees a boat and 12 + 7 dogs paint it".split()) for _ in "x" * 60
        ]
        (folder / "text" / f"{number:03d}.txt").write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.chdir(folder)
        assert stages.run_base(recipe()) == 0
    return folder


@pytest.fixture(scope="module")
def trained(trained_base, tmp_path_factory) -> Path:
    """With mid, SFT and RL on top of it."""
    folder = tmp_path_factory.mktemp("all") / "base"
    shutil.copytree(trained_base, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(Arithmetic, "grade", by_length)
        for run in RUN.values():
            assert run(recipe()) == 0
    return folder


@pytest.fixture
def after(trained_base, trained, tmp_path, monkeypatch):
    """after("mid"): a folder of its own with a run that is complete up to there."""

    def copy(stage: str) -> Path:
        folder = tmp_path / f"after_{stage}"
        shutil.copytree(trained_base, folder)
        order = [*RUN]
        for done in order[: order.index(stage) + 1 if stage in order else 0]:
            shutil.copytree(trained / "runs" / "run" / done, folder / "runs" / "run" / done)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
        return folder

    return copy


def lines(folder: Path, stage: str) -> list[dict]:
    """metrics.jsonl without the clock."""
    raw = (folder / "runs" / "run" / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_secs")} for line in raw]


def losses(folder: Path, stage: str) -> list[float]:
    return [line["loss"] for line in lines(folder, stage) if line["kind"] == "train"]


def last_params(folder: Path, stage: str) -> dict[str, jax.Array]:
    checkpoints = folder / "runs" / "run" / stage / "checkpoints"
    return ck.restore_params(checkpoints, ck.list_steps(checkpoints)[-1])


def same_run(ours: Path, theirs: Path, stage: str) -> None:
    assert lines(ours, stage) == lines(theirs, stage)
    assert ck.digest(last_params(ours, stage)) == ck.digest(last_params(theirs, stage))


def interrupt_at(monkeypatch, batch_number: int, action) -> None:
    """Do `action` while the training batch of that number goes to the devices."""
    put, seen = stages_train.put_batch, []

    def wrapped(batch, mesh):
        seen.append(1)
        if len(seen) == batch_number:
            action()
        return put(batch, mesh)

    monkeypatch.setattr(stages_train, "put_batch", wrapped)


def first_batch(monkeypatch, stage: str, **overrides) -> dict:
    """What the stage would train on first; it stops there."""
    caught = []

    def catch(batch, mesh):
        caught.append(batch)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(stages_train, "put_batch", catch)
        with pytest.raises(InterruptedError):
            RUN[stage](recipe(**overrides))
    return caught[0]


@pytest.mark.parametrize("stage", RUN)
def test_metrics_and_checkpoints_of_each_stage(trained, stage):
    metrics = lines(trained, stage)
    train = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(STEPS[stage]))
    assert all(np.isfinite(line["loss"]) for line in train)
    falls = {"mid": 0.2, "sft": 1.0, "rl": 1.0}[stage]
    n = STEPS[stage]
    expected = [min(1.0, (n - step) / round(falls * n)) for step in range(n)]
    np.testing.assert_allclose([line["lr_mult"] for line in train], expected)
    folder = trained / "runs" / "run" / stage
    assert (
        ck.list_steps(folder / "checkpoints")[-1]
        == n
        == read_json(folder / "result.json", "")["step"]
    )
    if stage == "rl":
        assert [line["step"] for line in metrics if line.get("name") == "pass_at_k"] == [0, 2, 4]
        rewards = [line["reward"] for line in train]
        assert 0 < np.mean(rewards) < 1 and any(line["mixed_frac"] > 0 for line in train)
        assert any(line["grad_norm"] > 0 for line in train)
    else:
        scores = [line["val_bpb"] for line in metrics if line["kind"] == "eval"]
        assert len(scores) == 2 and scores[1] < scores[0]


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_the_first_loss_is_the_parents_mean_over_trained_tokens(after, trained, monkeypatch, stage):
    """Against a plain forward pass of the parent's parameters and a mean, one row at a time."""
    folder = after(PARENT[stage])
    batch = first_batch(monkeypatch, stage)
    config = recipe()
    stages_train.recipe.resolve(config, platform="cpu", num_devices=8)
    model = stages_train.recipe.gpt_config(config)
    params = last_params(folder, PARENT[stage])
    total, count = 0.0, 0
    forward = jax.jit(lambda ids: bind(model, params).hidden(ids))
    for ids, targets in zip(batch["inputs"], batch["targets"], strict=True):
        hidden = forward(ids[None])
        nll = cross_entropy_naive(hidden, params["lm_head.kernel"], targets[None], model.vocab_size)
        total += float(nll.sum())
        count += int((targets >= 0).sum())
    assert 0 < count <= batch["targets"].size
    assert losses(trained, stage)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stage", RUN)
def test_crash_and_signal_change_nothing(after, trained, monkeypatch, capsys, stage):
    folder = after(PARENT[stage])

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt_at(patch, STEPS[stage], crash)
        with pytest.raises(RuntimeError, match="power cut"):
            RUN[stage](recipe())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert RUN[stage](recipe()) == EXIT_RESUME_ME
    assert RUN[stage](recipe()) == 0
    assert f"{stage}: continuing from the checkpoint at step" in capsys.readouterr().out
    same_run(folder, trained, stage)


@pytest.mark.parametrize("stage", RUN)
def test_neither_mesh_nor_microbatches_change_a_stage(after, trained, stage):
    folder = after(PARENT[stage])
    split = {"mid": 2, "sft": 1, "rl": 1}[stage]
    keys = {"mesh__fsdp": 2, "mesh__tensor": 2, f"{stage}__device_batch_size": split}
    assert RUN[stage](recipe(**keys)) == 0
    np.testing.assert_allclose(losses(folder, stage), losses(trained, stage), rtol=1e-5, atol=1e-6)


def test_the_first_step_takes_the_stages_learning_rate(after, monkeypatch):
    """AdamW's first step from fresh moments is the learning rate itself, whatever the gradient."""
    folder = after("mid")
    stages.run_sft(recipe(sft__num_steps=1, sft__lr_frac=0.25))
    before, now = last_params(folder, "mid")["wte.table"], last_params(folder, "sft")["wte.table"]
    moved = np.abs(np.asarray(now) - np.asarray(before))
    lr = 0.25 * 0.2 * (32 / 768) ** -0.5  # sft.lr_frac, sft.embed_lr, the width
    assert 0.02 < (moved > 0).mean() < 1
    np.testing.assert_allclose(np.median(moved[moved > 0]), lr, rtol=1e-4)
    assert moved.max() <= lr * (1 + 1e-4)


def test_a_warm_start_goes_on_with_the_parents_moments(after, monkeypatch):
    """Rows of the embedding that the batch does not hold move by the parent's moments alone."""
    folder = after("mid")
    keys = {"sft__num_steps": 1, "sft__lr_frac": 0.25, "sft__warm_start": True}
    absent = np.setdiff1d(np.arange(320), first_batch(monkeypatch, "sft", **keys)["inputs"])
    stages.run_sft(recipe(**keys))
    before, now = last_params(folder, "mid")["wte.table"], last_params(folder, "sft")["wte.table"]
    moved = (np.asarray(now) - np.asarray(before))[absent]
    arrays = saved_state(folder, "mid")
    (count,) = {
        int(v)
        for k, v in arrays.items()
        if "embed" in k and "unembed" not in k and k.endswith("0/count")
    }
    m = next(v for k, v in arrays.items() if k.endswith("mu/wte.table"))[absent]
    v = next(v for k, v in arrays.items() if k.endswith("nu/wte.table"))[absent]
    assert count == STEPS["mid"]
    m, v = 0.8 * m / (1 - 0.8 ** (count + 1)), 0.95 * v / (1 - 0.95 ** (count + 1))
    expected = -0.25 * 0.2 * (32 / 768) ** -0.5 * m / (np.sqrt(v) + 1e-10)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def saved_state(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """All of a checkpoint but the parameters, by path."""
    import orbax.checkpoint as ocp

    checkpoints = folder / "runs" / "run" / stage / "checkpoints"
    path = ck.step_dir(checkpoints, ck.list_steps(checkpoints)[-1]) / "arrays" / "state"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=one), tree)
        return {k: np.asarray(v) for k, v in checkpointer.restore(path, target).items()}


def test_a_stage_without_validation_still_saves_its_last_step(after):
    folder = after("mid")
    keys = {"sft__val_mixture": "()", "sft__num_steps": 2, "sft__save_every": 0}
    assert stages.run_sft(recipe(**keys)) == 0
    assert ck.list_steps(folder / "runs" / "run" / "sft" / "checkpoints") == [2]
    assert len(losses(folder, "sft")) == 2


def test_a_recipe_without_mid_goes_from_base_to_sft(after, capsys):
    after("base")
    keys = {"mid__mixture": "()", "sft__num_steps": 1}
    assert stages.run_mid(recipe(**keys)) == 0
    assert (
        "mid: this recipe has no such stage (config.mid.mixture is empty)"
        in capsys.readouterr().out
    )
    assert not (run_dir("run") / "mid").exists()
    assert stages.run_sft(recipe(**keys)) == 0
    assert "sft: starting from base, step 4" in capsys.readouterr().out


def test_stages_come_in_order(after):
    after("base")
    with pytest.raises(UserError, match="sft starts from stage mid, which is not complete in") as e:
        stages.run_sft(recipe())
    assert "run scripts/mid_train.py" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="rl starts from stage sft"):
        stages.run_rl(recipe())


def test_complete_stages_say_so_whatever_later_stages_ask(after, capsys):
    after("rl")
    changed = {"sft__lr_frac": 0.5, "sft__mixture": '("identity train",)', "rl__samples": 8}
    for name, run in (("base", stages.run_base), ("mid", stages.run_mid)):
        assert run(recipe(**changed)) == 0
        assert f"{name}: complete" in capsys.readouterr().out
    assert stages.run_sft(recipe(rl__samples=8, sft__eval_every=1)) == 0
    assert "sft: complete" in capsys.readouterr().out
    assert stages.run_rl(recipe(eval__chat_problems=3, rl__slots=8)) == 0
    with pytest.raises(UserError, match="config.sft.lr_frac was 0.02, now 0.5"):
        stages.run_sft(recipe(**changed))


@pytest.mark.parametrize("done", ["mid", "sft"])
def test_a_stage_refuses_a_parent_of_another_recipe(after, done):
    """Whether it is complete or was never begun."""
    after(done)
    with pytest.raises(UserError, match=r"config.optim.matrix_lr was 0.02, now 0.03; take these"):
        stages.run_sft(recipe(optim__matrix_lr=0.03))
    with pytest.raises(UserError, match=r"config.model.rope_base was 10000.0, now 500.0"):
        stages.run_sft(recipe(model__rope_base=500))
    with pytest.raises(UserError, match=r"config.mid.num_steps was 6, now 5"):
        stages.run_sft(recipe(mid__num_steps=5))


def test_a_complete_stage_notices_other_files(after, tmp_path, capsys):
    folder = after("mid")
    shutil.copy(cfg.CONFIGS / "persona.toml", tmp_path / "me.toml")
    for keys in ({"data__persona": tmp_path / "me.toml"}, {"data__task_dir": tmp_path}):
        with pytest.raises(UserError, match="mid was made from other files .*; delete .*/mid to"):
            stages.run_mid(recipe(**keys))
    shutil.rmtree(folder / "runs" / "run" / "mid" / "train_conversations")  # to save space
    assert stages.run_mid(recipe(data__task_dir=tmp_path)) == 0
    assert "mid: complete" in capsys.readouterr().out


def test_gradients_are_clipped_in_base_alone(after, monkeypatch):
    clips, folder = [], after("base")
    monkeypatch.chdir(folder)

    def stop(*_, grad_clip, **__):
        clips.append(grad_clip)
        raise InterruptedError

    monkeypatch.setattr(stages_train, "make_train_step", stop)
    with pytest.raises(InterruptedError):
        stages.run_mid(recipe())
    shutil.rmtree(folder / "runs" / "run" / "base")
    with pytest.raises(InterruptedError):
        stages.run_base(recipe())
    assert clips == [0.0, 1.0]  # as configs/default.py has it


@pytest.mark.parametrize("complete", [True, False])
def test_a_parent_trained_again_is_refused(after, monkeypatch, complete):
    folder = after("sft" if complete else "mid")
    if not complete:
        interrupt_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stages.run_sft(recipe()) == EXIT_RESUME_ME
    checkpoint = ck.step_dir(folder / "runs" / "run" / "mid" / "checkpoints", STEPS["mid"])
    host = read_json(checkpoint / "host.json", "")
    host["loop"]["elapsed_secs"] += 1  # as good as trained again
    write_json(checkpoint / "host.json", host)
    sums = read_json(checkpoint / ck.CHECKSUMS, "")
    entry = sums["host.json"]
    entry["sha256"] = ck.sha256_file(checkpoint / "host.json")
    entry["bytes"] = (checkpoint / "host.json").stat().st_size
    write_json(checkpoint / ck.CHECKSUMS, sums)
    with pytest.raises(UserError, match="started from another checkpoint of mid than") as error:
        stages.run_sft(recipe())
    assert str(error.value).endswith("to train it again")


def test_a_damaged_parent_is_refused(after):
    folder = after("mid")
    victim = (
        ck.step_dir(folder / "runs" / "run" / "mid" / "checkpoints", STEPS["mid"]) / "host.json"
    )
    victim.write_text(victim.read_text()[:-1])
    with pytest.raises(UserError, match=r"host.json: .* bytes, expected .*; delete .*result.json"):
        stages.run_sft(recipe())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rl__pass_rows": 3}, "rl.pass_rows got 3, expected a divisor of config.rl.samples"),
        ({"rl__temperature": 0.0}, "rl.temperature got 0.0, expected more than 0"),
        ({"rl__questions_per_step": 3, "rl__samples": 2}, "rl: got 6 rows a step, expected a mul"),
        ({"rl__task": "identity train"}, "'identity train'.* generative"),
        ({"rl__val_task": "identity test"}, "'identity test'.* generative"),
    ],
)
def test_practice_that_cannot_be_is_told_in_one_line(after, keys, message):
    after("sft")
    with pytest.raises(UserError, match=message) as error:
        stages.run_rl(recipe(**keys))
    assert "\n" not in str(error.value)
    assert not (run_dir("run") / "rl" / "metrics.jsonl").exists()


def test_pass_at_k_of_all_questions(after):
    """0: all, as for the other evaluations."""
    folder = after("sft")
    keys = {"rl__num_steps": 1, "rl__eval_questions": 0, "rl__val_task": "arithmetic test[:5]"}
    assert stages.run_rl(recipe(**keys)) == 0
    score = [line for line in lines(folder, "rl") if line["kind"] == "eval"][-1]
    assert score["pass@1"] * 5 == pytest.approx(round(score["pass@1"] * 5))


def test_chat_eval_keeps_what_it_has_found(after, monkeypatch, capsys):
    folder = after("sft")
    out = folder / "runs" / "run" / "eval" / "sft_chat.json"
    generative, asked = chat.generative, []

    def fails_second(*args, **keys):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generative(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(stages_eval.chat, "generative", fails_second)
        with pytest.raises(KeyboardInterrupt):
            stages_eval.run_chat_eval(recipe())
        half = read_json(out, "")
        assert list(half["tasks"]) == ["arithmetic test"]
        stages_eval.run_chat_eval(recipe())
    assert len(asked) == 3  # the first task was not asked again
    whole = read_json(out, "")
    assert whole["tasks"]["arithmetic test"] == half["tasks"]["arithmetic test"]
    assert list(whole["tasks"]) == ["arithmetic test", "simple_spelling test"]
    assert whole["tasks"]["arithmetic test"]["num_problems"] == 8
    assert whole["arithmetic"] == whole["tasks"]["arithmetic test"]["accuracy"]
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    stages_eval.run_chat_eval(recipe())
    assert f"chat_eval: {out} is there, of sft, step 6" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    # Other settings are another result.
    one = recipe(eval__chat_problems=2, eval__chat_tasks='("arithmetic test",)')
    stages_eval.run_chat_eval(one)
    assert read_json(out, "")["tasks"]["arithmetic test"]["num_problems"] == 2
    (aside,) = (out.parent / "replaced").iterdir()  # and the earlier one is not lost
    assert aside.name == f"sft_chat-{before}.json" and read_json(aside, "") == whole
    assert f"moved to {aside}" in capsys.readouterr().out


def test_base_eval_finds_core_first_and_keeps_the_earlier_result(after, monkeypatch):
    folder, order = after("base"), []
    monkeypatch.chdir(folder)

    def make(name: str, value):
        def made(*_):
            order.append(name)
            return lambda params: value

        monkeypatch.setattr(stages_eval, name, made)

    make("make_core", {"core": 0.25})
    make("text_bpb", 1.5)
    make("make_samples", [])
    out = folder / "runs" / "run" / "eval" / "base.json"
    keys = {"eval__core": True}
    stages_eval.run_base_eval(recipe(**keys))
    assert order == ["make_core", "text_bpb", "text_bpb", "make_samples"]
    first = read_json(out, "")
    assert (first["core"], first["val_bpb"]) == (0.25, 1.5)
    stages_eval.run_base_eval(recipe(**keys, eval__core_per_task=20))
    (aside,) = (out.parent / "replaced").glob("base-*.json")
    assert read_json(aside, "") == first
    assert read_json(out, "")["settings"]["eval.core_per_task"] == 20


def test_named_scores_are_those_of_the_tasks_asked(after, monkeypatch):
    after("sft")
    numbers = {"arithmetic test": 3, "arithmetic test[:1]": 10, "simple_spelling test": 5}

    def score(run, tokenizer, params, spec, task):
        return chat.Score(numbers[spec], 10, seconds=1.0).to_json()

    monkeypatch.setattr(stages_eval, "_chat_score", score)
    out = run_dir("run") / "eval" / "sft_chat.json"

    def named(*specs) -> dict:
        stages_eval.run_chat_eval(recipe(eval__chat_tasks=repr(specs)))
        values = read_json(out, "")
        return {name: values.get(name) for name in ("arithmetic", "simple_spelling", "eval_secs")}

    whole = {"arithmetic": 0.3, "simple_spelling": 0.5, "eval_secs": 2.0}
    assert named("arithmetic test", "simple_spelling test") == whole
    part = {"arithmetic": 1.0, "simple_spelling": None, "eval_secs": 3.0}
    assert named("arithmetic test[:1]") == part
    assert named("arithmetic test", "simple_spelling test") == whole | {"eval_secs": 3.0}
    assert set(read_json(out, "")["tasks"]) == set(numbers)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((), "chat_tasks got no task, expected some"),
        (("arithmetic test", "arithmetic test[:1]"), "expected one of them: both .* as arithmetic"),
        (("arithmetic test", "arithmetic test"), "expected one of them: both are reported as ar"),
        (("arithmetic test", "identity test"), "got 'identity test', which has no right answers"),
        (("arithmetic",), "got 'arithmetic', expected"),
    ],
)
def test_chat_tasks_that_cannot_be_scored_are_told_before_the_first(
    after, monkeypatch, specs, message
):
    after("sft")
    monkeypatch.setattr(stages_eval, "_chat_score", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=message) as error:
        stages_eval.run_chat_eval(recipe(eval__chat_tasks=repr(specs)))
    assert "\n" not in str(error.value)


def test_chat_eval_prints_the_means_it_writes(after, monkeypatch, capsys):
    """ChatCORE of the six tasks, whatever their splits."""
    after("sft")
    score = chat.Score(num_correct=5, num_problems=10, seconds=0.0)
    monkeypatch.setattr(stages_eval, "_chat_score", lambda *_: score.to_json())
    monkeypatch.setattr(stages_eval, "_with_verdict", lambda *_: None)  # no data here
    specs = tuple(f"{name} test[:10]" for name in chat.CHANCE)
    stages_eval.run_chat_eval(recipe(eval__chat_tasks=repr(specs)))
    values = read_json(run_dir("run") / "eval" / "sft_chat.json", "")
    assert values["chatcore"] == pytest.approx((3 * (0.25 / 0.75) + 3 * 0.5) / 6)
    printed = capsys.readouterr().out
    assert f"chatcore {values['chatcore']:.4f}" in printed and "missing" not in printed


# Real scripts, really killed


class Script:
    """A stage's script in a process of its own, its output in a file; verdicts as above."""

    def __init__(self, stage: str, folder: Path, environment: dict[str, str], **overrides):
        program = (
            "import runpy, sys\n"
            "from nanochat_jax.tasks.arithmetic import Arithmetic\n"
            "Arithmetic.grade = lambda _, answers: [len(said) % 2 == 0 for _, said in answers]\n"
            f"runpy.run_path({str(ROOT / 'scripts' / SCRIPT[stage])!r}, run_name='__main__')\n"
        )
        keys = [f"--config.{k}={v}" for k, v in arguments(**overrides).items()]
        environment = (
            os.environ | {"PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(folder)} | environment
        )
        self.output = folder / f"{stage}{time.time_ns()}.log"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, f"--config={cfg.CONFIGS / 'tiny.py'}", *keys],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def succeeds(self) -> None:
        assert self.process.wait(300) == 0, self.output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("mid", marks=pytest.mark.long), "sft", "rl"])
def test_three_kills_change_nothing(after, tmp_path, stage):
    folder, one = after(PARENT[stage]), {"XLA_FLAGS": ""}
    straight = tmp_path / "straight"
    shutil.copytree(folder, straight)
    Script(stage, straight, one).succeeds()
    path = folder / "runs" / "run" / stage / "metrics.jsonl"
    goals = sorted(random.Random(seed := time.time_ns()).sample(range(1, STEPS[stage] + 1), 3))
    print(f"killed after {goals} lines, seed {seed}")  # shown when the test fails
    for goal in goals:
        run = Script(stage, folder, one).process
        while run.poll() is None:
            if path.exists() and path.read_text().count("\n") >= goal:
                run.kill()
            time.sleep(0.001)
    Script(stage, folder, one).succeeds()
    same_run(folder, straight, stage)


@pytest.mark.long
@pytest.mark.parametrize("stage", RUN)
def test_two_processes_train_as_one(after, trained, stage):
    folder = after(PARENT[stage])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    keys = {"mesh.coordinator": f"127.0.0.1:{port}", "mesh.num_processes": 2}
    runs = [Script(stage, folder, two_devices, **keys, **{"mesh.process_id": i}) for i in (0, 1)]
    for run in runs:
        run.succeeds()
    np.testing.assert_allclose(losses(folder, stage), losses(trained, stage), rtol=1e-5)
