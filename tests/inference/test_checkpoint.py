"""From the command line to an answer, on a checkpoint of a model that says random things."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import recipe
from nanochat_jax.common import UserError, run_dir
from nanochat_jax.config import CONFIGS, load
from nanochat_jax.train.checkpoint import Checkpoints, step_dir
from nanochat_jax.train.state import TrainState
from scripts import chat_cli as script
from scripts.bench.infer import generate_greedy

NAME = "test_chat_model"
RECIPE = ["--config=configs/tiny.py", f"--config.run.name={NAME}"]


@pytest.fixture(scope="module")
def trained(tiny_tokenizer, random_params):
    """A run with a base and an SFT checkpoint: (model, {stage: params})."""
    config = load(CONFIGS / "tiny.py", {"run.name": NAME})
    recipe.resolve(config, platform="cpu", num_devices=8)
    model, params = recipe.gpt_config(config), {}
    tiny_tokenizer.save(run_dir(NAME) / "tokenizer")
    for stage, turn in (("base", np.asarray), ("sft", np.flip)):
        params[stage] = {k: jnp.asarray(turn(v)) for k, v in random_params(model).items()}
        checkpoints = Checkpoints(run_dir(NAME) / stage / "checkpoints", keep=1)
        state = TrainState(jnp.int32(9), params[stage], {}, jnp.zeros(2, jnp.uint32))
        host = {"config": config.to_dict(), "tokenizer_sha256": tiny_tokenizer.sha256()}
        checkpoints.save(state, host, {})
        checkpoints.wait()
    return model, params


@pytest.fixture
def run(trained, monkeypatch, capsys):
    """Run the script with these arguments: (status, stdout, stderr)."""

    def run(*argv):
        monkeypatch.chdir(CONFIGS.parent)
        monkeypatch.setattr(sys, "argv", ["chat_cli.py", *RECIPE, *argv])
        status = script.main()
        return status, *capsys.readouterr()

    return run


GREEDY = ("--temperature=0", "--max-new-tokens=12")


@pytest.mark.parametrize(
    "stage, options, frame, stop",
    [
        ("sft", ["--system=B."], "<|user_start|>~B.\n\n?~<|user_end|>~<|assistant_start|>",
         "<|assistant_end|>"),
        ("base", ["--stage=base", "--tool=calculator"], "?", "<|bos|>"),
    ],
)  # fmt: skip
def test_the_answer_alone_goes_to_stdout(stage, options, frame, stop, run, trained, tiny_tokenizer):
    """What full forward passes say, of the latest stage that has a checkpoint."""
    status, out, notes = run("-p", "How many boats?", *GREEDY, *options)
    prompt, special = [tiny_tokenizer.bos_id], tiny_tokenizer.special
    for word in frame.replace("?", "How many boats?").split("~"):
        prompt += [special[word]] if word in special else tiny_tokenizer.encode(word)
    model, params = trained
    [ids] = generate_greedy(model, params[stage], [prompt], 12)
    stops = (tiny_tokenizer.bos_id, special[stop])
    ids = ids[: next((i for i, token in enumerate(ids) if token in stops), 12)]
    expected = tiny_tokenizer.decode([token for token in ids if token < tiny_tokenizer.bos_id])
    assert (status, out) == (0, expected + "\n") and len(ids) > 2
    assert f"model: {NAME}, stage {stage}, step 9\n" in notes
    assert ("cut off" in notes) == (stage == "sft")
    assert ("--tool=calculator has no effect" in notes) == (stage == "base")


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--stage=rl"], "checkpoints of base, sft, expected of rl"),
        (["--stage=best"], "'best', expected base, mid"),
        (["--config.run.name=other"], f"other has no checkpoint, .*another run \\({NAME}\\)"),
        (["--config.model.depth=3"], "config.model.depth was 2, now 3"),
        (["--config.mesh.tensor=16"], "config.mesh"),
        (["--top-k=many"], "--top-k"),
        (["--top-p=1"], "--top-p=1"),
        (["-p"], "expected one argument"),
        (["--temperature=-1"], "temperature got -1.0"),
        (["--stage=base", "--system=Hi", "-p", "x"], "system message"),
    ],
)
def test_what_cannot_be_done_is_told(run, argv, named):
    with pytest.raises(UserError, match=f"^[^\n]*{named}"):
        run(*argv)


def test_damage_and_another_tokenizer_are_refused(run, trained, tiny_tokenizer):
    folder = run_dir(NAME)
    host = step_dir(folder / "sft" / "checkpoints", 9) / "host.json"
    written = host.read_text()
    host.write_text(written.replace("9", "8", 1))
    with pytest.raises(UserError, match="host.json"):
        run("-p", "?")
    host.write_text(written)
    type(tiny_tokenizer)({bytes([b]): b for b in range(256)}).save(folder / "tokenizer")
    with pytest.raises(UserError, match="another tokenizer"):
        run("-p", "?")
    tiny_tokenizer.save(folder / "tokenizer")
