"""Evaluations of a run: nothing is asked twice, nothing found is lost."""

import pytest

from nanochat_jax import config as cfg
from nanochat_jax.common import UserError, read_json, run_dir
from nanochat_jax.eval import chat
from nanochat_jax.stages.base import Base
from nanochat_jax.stages.chat import SFT
from nanochat_jax.stages.evals import run_base_eval, run_chat_eval, task_score
from nanochat_jax.stages.train import train_stage
from tests.stages.parts import with_overrides

KEYS = {
    "run.name": "run",
    "data.name": "local",
    "tokenizer.vocab_size": "320",
    "base.num_steps": "1",
    "base.total_batch_tokens": "512",
    "base.device_batch_size": "1",
    "mid.mixture": "()",
    "sft.mixture": '("arithmetic train[:32]",)',
    "sft.num_steps": "1",
    "eval.val_tokens": "512",
    "eval.device_batch_size": "1",
    "eval.chat_stage": "sft",
}


def recipe(**overrides):
    return cfg.load(cfg.CONFIGS / "tiny.py", with_overrides(KEYS, overrides))


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory):
    """A NANOCHAT_BASE_DIR with a base and an SFT model of one step each."""
    folder = tmp_path_factory.mktemp("evals")
    for number in range(60):
        words = " ".join(str(n * number) for n in range(200))
        (folder / f"{number}.txt").write_text(f"{words} boats on the river")
    KEYS["data.local_dir"] = str(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        assert train_stage(recipe(), Base) == 0 == train_stage(recipe(), SFT)
        yield folder


@pytest.fixture
def out():
    path = run_dir("run") / "eval" / "sft_chat.json"
    path.unlink(missing_ok=True)
    for aside in path.parent.glob("replaced/*"):
        aside.unlink()
    return path


def test_chat_eval_keeps_what_it_has_found(out):
    asked = []

    def killed_at_the_second(*args):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return task_score(*args)

    with pytest.raises(KeyboardInterrupt):
        run_chat_eval(recipe(), killed_at_the_second)
    half = read_json(out, "")
    assert list(half["tasks"]) == ["arithmetic test"]
    run_chat_eval(recipe(), killed_at_the_second)
    assert len(asked) == 3  # the first task was not asked again
    whole = read_json(out, "")
    assert whole["tasks"]["arithmetic test"] == half["tasks"]["arithmetic test"]
    assert list(whole["tasks"]) == ["arithmetic test", "simple_spelling test"]
    assert whole["tasks"]["arithmetic test"]["num_problems"] == 8
    assert whole["arithmetic"] == whole["tasks"]["arithmetic test"]["accuracy"]
    assert [answer["prompt"] for answer in whole["answers"]] == [*recipe().eval.chat_prompts]
    before = out.stat().st_mtime_ns
    run_chat_eval(recipe(), killed_at_the_second)
    assert len(asked) == 3 and out.stat().st_mtime_ns == before
    # Other settings are another result.
    keys = {"eval__chat_problems": 2, "eval__chat_tasks": '("arithmetic test",)'}
    run_chat_eval(recipe(**keys))
    assert read_json(out, "")["tasks"]["arithmetic test"]["num_problems"] == 2
    (aside,) = (out.parent / "replaced").iterdir()  # and the earlier one is not lost
    assert aside.name == f"sft_chat-{before}.json" and read_json(aside, "") == whole


def test_base_eval_keeps_the_earlier_result():
    path = run_dir("run") / "eval" / "base.json"
    run_base_eval(recipe())
    first = read_json(path, "")
    run_base_eval(recipe(eval__sample_tokens=3))
    (aside,) = (path.parent / "replaced").glob("base-*.json")
    assert read_json(aside, "") == first
    assert read_json(path, "")["settings"]["eval.sample_tokens"] == 3


def test_core_that_is_not_there_is_told_before_the_first_evaluation(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        run_base_eval(recipe(eval__core=True, eval__core_dir=tmp_path))


def test_named_scores_are_those_of_the_tasks_asked(out):
    numbers = {"arithmetic test": 3, "arithmetic test[:1]": 10, "simple_spelling test": 5}

    def named(*specs) -> dict:
        def score(run, tokenizer, params, spec, task):
            return chat.Score(numbers[spec], 10, seconds=1.0)

        run_chat_eval(recipe(eval__chat_tasks=repr(specs)), score)
        values = read_json(out, "")
        return {name: values.get(name) for name in ("arithmetic", "simple_spelling", "eval_secs")}

    whole = {"arithmetic": 0.3, "simple_spelling": 0.5, "eval_secs": 2.0}
    assert named("arithmetic test", "simple_spelling test") == whole
    part = {"arithmetic": 1.0, "simple_spelling": None, "eval_secs": 3.0}
    assert named("arithmetic test[:1]") == part
    assert named("arithmetic test", "simple_spelling test") == whole | {"eval_secs": 3.0}
    assert set(read_json(out, "")["tasks"]) == set(numbers)


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ((), "config.eval.chat_tasks"),
        (("arithmetic test", "arithmetic test[:1]"), "config.eval.chat_tasks"),
        (("arithmetic test", "arithmetic test"), "config.eval.chat_tasks"),
        (("arithmetic test", "identity test"), "'identity test'"),
        (("arithmetic",), "'arithmetic'"),
    ],
)
def test_chat_tasks_that_cannot_be_scored_are_told_before_the_first(out, specs, named):
    with pytest.raises(UserError, match=named) as error:
        run_chat_eval(recipe(eval__chat_tasks=repr(specs)), lambda *_: pytest.fail("asked a model"))
    assert "\n" not in str(error.value)
