"""From the command line to an answer, on a checkpoint of a model that says random things."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import recipe
from nanochat_jax.common import UserError, run_dir
from nanochat_jax.config import CONFIGS, load
from nanochat_jax.model.gpt import param_shapes
from nanochat_jax.train.checkpoint import Checkpoints, step_dir
from nanochat_jax.train.state import TrainState
from scripts import chat_cli as script
from scripts.bench.naive import generate_greedy

NAME = "test_chat_model"
RECIPE = ["--config=configs/tiny.py", f"--config.run.name={NAME}"]


@pytest.fixture(scope="module")
def trained(tiny_tokenizer):
    """A run with a base and an SFT checkpoint: (model, {stage: params})."""
    config = load(CONFIGS / "tiny.py", {"run.name": NAME})
    recipe.resolve(config, platform="cpu", num_devices=8)
    model, params = recipe.gpt_config(config), {}
    tiny_tokenizer.save(run_dir(NAME) / "tokenizer")
    for seed, stage in enumerate(("base", "sft")):
        rng = np.random.default_rng(seed)
        params[stage] = {
            path: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * leaf.shape[0] ** -0.5)
            for path, leaf in param_shapes(model).items()
        }
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


def said(tokenizer, trained, stage, prompt, stops):
    """The text that full forward passes give for 12 new tokens at most."""
    model, params = trained
    [ids] = generate_greedy(model, params[stage], [prompt], 12)
    ids = ids[: next((i for i, token in enumerate(ids) if token in stops), 12)]
    return tokenizer.decode([token for token in ids if token < tokenizer.bos_id]), len(ids)


GREEDY = ("--temperature=0", "--max-new-tokens=12")


def test_the_answer_alone_goes_to_stdout(run, trained, tiny_tokenizer):
    # The latest stage that has a checkpoint.
    status, out, notes = run("-p", "How many boats?", *GREEDY, "--system=Be kind.")
    text = "<|bos|>~<|user_start|>~Be kind.\n\nHow many boats?~<|user_end|>~<|assistant_start|>"
    prompt = []
    for word in text.split("~"):
        special = tiny_tokenizer.special
        prompt += [special[word]] if word in special else tiny_tokenizer.encode(word)
    stops = {tiny_tokenizer.bos_id, tiny_tokenizer.special_id("<|assistant_end|>")}
    expected, length = said(tiny_tokenizer, trained, "sft", prompt, stops)
    assert (status, out) == (0, expected + "\n") and length > 2
    assert f"model: {NAME}, stage sft, step 9\n" in notes
    assert "cut off after 12 tokens" in notes


def test_a_base_model_continues(run, trained, tiny_tokenizer):
    status, out, notes = run("-p", "The river", *GREEDY, "--stage=base")
    prompt = tiny_tokenizer.encode("The river", bos=True)
    expected, length = said(tiny_tokenizer, trained, "base", prompt, {tiny_tokenizer.bos_id})
    assert (status, out) == (0, expected + "\n") and length > 2
    assert "stage base, step 9\n" in notes and "--tool" not in notes


def test_a_base_model_says_that_it_uses_no_tool(run):
    _, out, notes = run("-p=-5+3?", *GREEDY, "--stage=base", "--tool=calculator")
    assert "--tool=calculator has no effect: a base model uses no tool\n" in notes
    assert "--tool" not in out
    assert "--tool" not in run("-p", "x", *GREEDY, "--stage=base", "--tool=none")[2]


def test_a_question_may_start_with_a_dash():
    assert script.arguments(["-p=-5+3?"]).question == "-5+3?"
    assert '-p="-5+3?"' in (script.__doc__ or "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stage=rl"], "no checkpoint of stage rl, only of base, sft"),
        (["--stage=best"], "got stage 'best', expected one of base"),
        (["--config.run.name=other"], "other has no checkpoint; name the run"),
        (["--config.model.depth=3"], "config.model.depth was 2, now 3"),
        (["--config.mesh.tensor=16"], "config.mesh"),
        (["--top-k=many"], "--top-k: invalid int value: 'many'; --help"),
        (["--top-p=1"], "unknown argument '--top-p=1'; --help"),
        (["-p"], "expected one argument; --help"),
        (["--temperature=-1"], "temperature got -1.0, expected"),
        (["--stage=base", "--system=Hi", "-p", "x"], "a base model takes no system message"),
    ],
)
def test_what_cannot_be_done_is_told(run, argv, message):
    with pytest.raises(UserError, match="^[^\n]*" + message.replace("[", r"\[")):
        run(*argv)


def test_damage_and_another_tokenizer_are_refused(run, trained, tiny_tokenizer):
    folder = run_dir(NAME)
    host = step_dir(folder / "sft" / "checkpoints", 9) / "host.json"
    written = host.read_text()
    host.write_text(written.replace("9", "8", 1))
    with pytest.raises(UserError, match="host.json: content differs from its checksum; choose"):
        run("-p", "?")
    host.write_text(written)
    other = type(tiny_tokenizer)({bytes([b]): b for b in range(256)})
    other.save(folder / "tokenizer")
    with pytest.raises(UserError, match="trained with another tokenizer"):
        run("-p", "?")
    tiny_tokenizer.save(folder / "tokenizer")
