"""The stages after pretraining: each starts where the one before ended, and survives anything.

One base model is trained for all tests, and mid, SFT and RL once on top of it; every test works on
a copy.
"""

import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe as recipes
from nanochat_jax.common import EXIT_RESUME_ME, UserError, read_json, run_dir, write_json
from nanochat_jax.model.gpt import bind
from nanochat_jax.model.loss import cross_entropy_naive
from nanochat_jax.stages.base import Base
from nanochat_jax.stages.chat import SFT, Mid
from nanochat_jax.stages.rl import RL
from nanochat_jax.stages.train import train_stage
from nanochat_jax.train import checkpoint as ck
from tests.stages.parts import (
    Script,
    interrupted,
    kill_three_times,
    last_params,
    lines,
    losses,
    power_cut,
    sends,
    with_overrides,
)


class ByLength(RL):
    """A verdict that even a model of noise gets right half the time."""

    def __init__(self, run):
        super().__init__(run)
        for task in (self.task, self.val_task):
            task.grade = lambda answers: [len(said) % 2 == 0 for _, said in answers]


STAGES = {"mid": Mid, "sft": SFT, "rl": ByLength}
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
    return with_overrides(keys, overrides)


def recipe(**overrides):
    return cfg.load(cfg.CONFIGS / "tiny.py", arguments(**overrides))


def train(stage: str, **overrides) -> int:
    return train_stage(recipe(**overrides), STAGES[stage])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A NANOCHAT_BASE_DIR with all stages; the run "run" stays as it is."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    words = "the cat sees a boat and 12 + 7 dogs paint it".split()
    (folder / "text").mkdir()
    for number in range(200):
        (folder / "text" / f"{number:03d}.txt").write_text(" ".join(rng.choice(words, 60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.chdir(folder)
        assert train_stage(recipe(), Base) == 0
        for stage in STAGES:
            assert train(stage) == 0
        yield folder


@pytest.fixture
def after(trained, tmp_path, monkeypatch):
    """after("mid"): a folder of its own with a run that is complete up to there; "straight" in it
    is the whole run."""

    def copy(last: str) -> Path:
        runs = tmp_path / "base" / "runs"
        shutil.copytree(trained / "runs" / "run" / "tokenizer", runs / "run" / "tokenizer")
        order = ("base", *STAGES)
        for done in order[: order.index(last) + 1]:
            shutil.copytree(trained / "runs" / "run" / done, runs / "run" / done)
        (runs / "straight").symlink_to(trained / "runs" / "run")
        (tmp_path / "base" / "data").symlink_to(trained / "data")
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
        return runs / "run"

    return copy


def assert_as_straight(stage: str) -> None:
    assert lines("run", stage) == lines("straight", stage)
    digests = {ck.digest(last_params(name, stage)) for name in ("run", "straight")}
    assert len(digests) == 1


def first_batch(stage: str, **overrides) -> dict:
    """What the stage would train on first; it stops there."""
    caught = []

    def catch(batch):
        caught.append(batch)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train_stage(recipe(**overrides), interrupted(STAGES[stage], {1: catch}))
    return caught[0]


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_and_checkpoints_of_each_stage(trained, stage):
    metrics, n = lines("run", stage), STEPS[stage]
    train = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(n))
    assert all(np.isfinite(line["loss"]) for line in train)
    falls = {"mid": 0.2, "sft": 1.0, "rl": 1.0}[stage]
    expected = [min(1.0, (n - step) / round(falls * n)) for step in range(n)]
    np.testing.assert_allclose([line["lr_mult"] for line in train], expected)
    folder = run_dir("run") / stage
    assert ck.list_steps(folder / "checkpoints")[-1] == n
    assert read_json(folder / "result.json", "")["step"] == n
    if stage == "rl":
        assert [line["step"] for line in metrics if line.get("name") == "pass_at_k"] == [0, 2, 4]
        rewards = [line["reward"] for line in train]
        assert 0 < np.mean(rewards) < 1 and any(line["mixed_frac"] > 0 for line in train)
        assert any(line["grad_norm"] > 0 for line in train)
    else:
        scores = [line["val_bpb"] for line in metrics if line["kind"] == "eval"]
        assert len(scores) == 2 and scores[1] < scores[0]


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_the_first_loss_is_the_parents_mean_over_trained_tokens(after, stage):
    """Against a plain forward pass of the parent's parameters and a mean, one row at a time."""
    after(PARENT[stage])
    batch = first_batch(stage)
    config = recipe()
    recipes.resolve(config, platform="cpu", num_devices=8)
    model, params = recipes.gpt_config(config), last_params("run", PARENT[stage])
    total, count = 0.0, 0
    forward = jax.jit(lambda ids: bind(model, params).hidden(ids))
    for ids, targets in zip(batch["inputs"], batch["targets"], strict=True):
        head = params["lm_head.kernel"]
        nll = cross_entropy_naive(forward(ids[None]), head, targets[None], model.vocab_size)
        total += float(nll.sum())
        count += int((targets >= 0).sum())
    assert 0 < count <= batch["targets"].size
    assert losses("straight", stage)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_crash_and_signal_change_nothing(after, stage):
    after(PARENT[stage])
    with pytest.raises(RuntimeError, match="power cut"):
        train_stage(recipe(), interrupted(STAGES[stage], {STEPS[stage]: power_cut}))
    asked_to_stop = interrupted(STAGES[stage], {1: sends(signal.SIGTERM)})
    assert train_stage(recipe(), asked_to_stop) == EXIT_RESUME_ME
    assert train(stage) == 0
    assert_as_straight(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_neither_mesh_nor_microbatches_change_a_stage(after, stage):
    after(PARENT[stage])
    split = {"mid": 2, "sft": 1, "rl": 1}[stage]
    keys = {"mesh__fsdp": 2, "mesh__tensor": 2, f"{stage}__device_batch_size": split}
    assert train(stage, **keys) == 0
    ours, theirs = losses("run", stage), losses("straight", stage)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_step_takes_the_stages_learning_rate(after):
    """AdamW's first step from fresh moments is the learning rate itself, whatever the gradient."""
    after("mid")
    train("sft", sft__num_steps=1, sft__lr_frac=0.25)
    before, now = (last_params("run", stage)["wte.table"] for stage in ("mid", "sft"))
    moved = np.abs(np.asarray(now) - np.asarray(before))
    lr = 0.25 * 0.2 * (32 / 768) ** -0.5  # sft.lr_frac, sft.embed_lr, the width
    assert 0.02 < (moved > 0).mean() < 1
    np.testing.assert_allclose(np.median(moved[moved > 0]), lr, rtol=1e-4)
    assert moved.max() <= lr * (1 + 1e-4)


def test_a_warm_start_goes_on_with_the_parents_moments(after):
    """Rows of the embedding that the batch does not hold move by the parent's moments alone."""
    folder = after("mid")
    keys = {"sft__num_steps": 1, "sft__lr_frac": 0.25, "sft__warm_start": True}
    absent = np.setdiff1d(np.arange(320), first_batch("sft", **keys)["inputs"])
    train("sft", **keys)
    before, now = (last_params("run", stage)["wte.table"] for stage in ("mid", "sft"))
    moved = (np.asarray(now) - np.asarray(before))[absent]
    arrays = optimizer_state(folder / "mid")
    embed = [k for k in arrays if "embed" in k and "unembed" not in k and k.endswith("0/count")]
    (count,) = {int(arrays[k]) for k in embed}
    m = next(v for k, v in arrays.items() if k.endswith("mu/wte.table"))[absent]
    v = next(v for k, v in arrays.items() if k.endswith("nu/wte.table"))[absent]
    assert count == STEPS["mid"]
    m, v = 0.8 * m / (1 - 0.8 ** (count + 1)), 0.95 * v / (1 - 0.95 ** (count + 1))
    expected = -0.25 * 0.2 * (32 / 768) ** -0.5 * m / (np.sqrt(v) + 1e-10)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def optimizer_state(stage: Path) -> dict[str, np.ndarray]:
    """All of a checkpoint but the parameters, by path."""
    checkpoints = stage / "checkpoints"
    path = ck.step_dir(checkpoints, ck.list_steps(checkpoints)[-1]) / "arrays" / "state"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=one), tree)
        return {k: np.asarray(v) for k, v in checkpointer.restore(path, target).items()}


def test_a_stage_without_validation_still_saves_its_last_step(after):
    folder = after("mid")
    keys = {"sft__val_mixture": "()", "sft__num_steps": 2, "sft__save_every": 0}
    assert train("sft", **keys) == 0
    assert ck.list_steps(folder / "sft" / "checkpoints") == [2]
    assert len(losses("run", "sft")) == 2


def test_a_recipe_without_mid_goes_from_base_to_sft(after):
    folder = after("base")
    keys = {"mid__mixture": "()", "sft__num_steps": 1}
    assert train("mid", **keys) == 0 and not (folder / "mid").exists()
    assert train("sft", **keys) == 0
    assert read_json(folder / "sft" / "run_info.json", "")["parent"] == "base, step 4"


def test_stages_come_in_order(after):
    after("base")
    with pytest.raises(UserError, match=r"mid_train\.py"):
        train("sft")
    with pytest.raises(UserError, match=r"chat_sft\.py"):
        train("rl")


def test_complete_stages_stay_whatever_later_stages_ask(after):
    after("rl")
    changed = {"sft__lr_frac": 0.5, "sft__mixture": '("identity train",)', "rl__samples": 8}
    assert train_stage(recipe(**changed), Base) == 0 == train("mid", **changed)
    assert train("sft", rl__samples=8, sft__eval_every=1) == 0
    assert train("rl", eval__chat_problems=3, rl__slots=8) == 0
    with pytest.raises(UserError, match="config.sft.lr_frac was 0.02, now 0.5"):
        train("sft", **changed)


@pytest.mark.parametrize("done", ["mid", "sft"])
def test_a_stage_refuses_a_parent_of_another_recipe(after, done):
    """Whether it is complete or was never begun."""
    after(done)
    for key in ("optim.matrix_lr", "model.rope_base", "mid.num_steps"):
        with pytest.raises(UserError, match=f"config.{key} was "):
            train("sft", **{key.replace(".", "__"): 5})


def test_a_complete_stage_notices_other_files(after, tmp_path):
    folder = after("mid")
    shutil.copy(cfg.CONFIGS / "persona.toml", tmp_path / "me.toml")
    for keys in ({"data__persona": tmp_path / "me.toml"}, {"data__task_dir": tmp_path}):
        with pytest.raises(UserError, match="other files .*/mid to train it again"):
            train("mid", **keys)
    shutil.rmtree(folder / "mid" / "train_conversations")  # to save space
    assert train("mid", data__task_dir=tmp_path) == 0


@pytest.mark.parametrize("complete", [True, False])
def test_a_parent_trained_again_is_refused(after, complete):
    folder = after("sft" if complete else "mid")
    if not complete:
        assert train_stage(recipe(), interrupted(SFT, {2: sends(signal.SIGTERM)})) == EXIT_RESUME_ME
    checkpoint = ck.step_dir(folder / "mid" / "checkpoints", STEPS["mid"])
    host = read_json(checkpoint / "host.json", "")
    host["loop"]["elapsed_secs"] += 1  # as good as trained again
    write_json(checkpoint / "host.json", host)
    sums = read_json(checkpoint / ck.CHECKSUMS, "")
    sums["host.json"]["sha256"] = ck.sha256_file(checkpoint / "host.json")
    sums["host.json"]["bytes"] = (checkpoint / "host.json").stat().st_size
    write_json(checkpoint / ck.CHECKSUMS, sums)
    with pytest.raises(UserError, match="another checkpoint of mid"):
        train("sft")


def test_a_damaged_parent_is_refused(after):
    folder = after("mid")
    victim = ck.step_dir(folder / "mid" / "checkpoints", STEPS["mid"]) / "host.json"
    victim.write_text(victim.read_text()[:-1])
    with pytest.raises(UserError, match=r"host.json: .* bytes, expected .* delete .*result.json"):
        train("sft")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rl__pass_rows": 3}, "config.rl.pass_rows got 3"),
        ({"rl__temperature": 0.0}, "config.rl.temperature got 0.0"),
        ({"rl__questions_per_step": 3, "rl__samples": 2}, "rl: got 6 rows"),
        ({"rl__task": "identity train"}, "'identity train'.* generative"),
        ({"rl__val_task": "identity test"}, "'identity test'.* generative"),
    ],
)
def test_practice_that_cannot_be_is_told_in_one_line(after, keys, named):
    folder = after("sft")
    with pytest.raises(UserError, match=named) as error:
        train("rl", **keys)
    assert "\n" not in str(error.value)
    assert not (folder / "rl" / "metrics.jsonl").exists()


# Real scripts, really killed

GRADED = """
from nanochat_jax.stages import rl
from tests.stages.test_chat import ByLength
rl.RL = ByLength
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("mid", marks=pytest.mark.long), "sft", "rl"])
def test_three_kills_change_nothing(after, tmp_path, stage):
    folder = after(PARENT[stage])
    shutil.copytree(base := folder.parents[1], unhurt := tmp_path / "unhurt", symlinks=True)

    def script(base_dir: Path):
        env = {"XLA_FLAGS": "", "NANOCHAT_BASE_DIR": str(base_dir)}
        return Script(SCRIPT[stage], arguments(), env, GRADED if stage == "rl" else "")

    script(unhurt).succeeds()
    metrics = folder / stage / "metrics.jsonl"
    kill_three_times(lambda: script(base), metrics, range(1, STEPS[stage] + 1))
    script(base).succeeds()
    (base / "runs" / "straight").unlink()
    (base / "runs" / "straight").symlink_to(unhurt / "runs" / "run")
    assert_as_straight(stage)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(after, stage):
    after(PARENT[stage])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    keys = {"mesh.coordinator": f"127.0.0.1:{port}", "mesh.num_processes": 2}
    program = GRADED if stage == "rl" else ""
    both = [
        Script(SCRIPT[stage], arguments(**keys, **{"mesh.process_id": i}), env, program)
        for i in (0, 1)
    ]
    for script in both:
        script.succeeds()
    np.testing.assert_allclose(losses("run", stage), losses("straight", stage), rtol=1e-5)
