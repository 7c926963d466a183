"""Recipes: typed, locked, and errors that tell what to write instead."""

import re

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError

ALL = sorted(p.name for p in cfg.CONFIGS.glob("*.py"))
SECTIONS = ["run", "mesh", "tokenizer", "data", "model", "optim", "base", "mid", "sft", "rl"]
SECTIONS += ["eval", "serve"]


def load(name: str, **overrides: str):
    return cfg.load(cfg.CONFIGS / name, {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_resolves_and_has_exactly_the_default_keys(name):
    config = load(name)
    assert set(cfg.flatten(config)) == set(cfg.flatten(load("default.py")))
    recipe.resolve(config, platform="gpu", num_devices=8)
    assert recipe.gpt_config(config).model_dim % config.model.num_heads == 0
    assert None not in cfg.flatten(config).values()


def test_sections_stand_in_the_order_of_the_pipeline():
    lines = (cfg.CONFIGS / "default.py").read_text().splitlines()
    sections = [line.split(".")[1] for line in lines if line.startswith("    c.")]
    sections = list(dict.fromkeys(s.split(" ")[0] for s in sections))
    assert sections == [s for s in SECTIONS if s in sections]
    assert set(sections) == set(load("default.py"))


def test_overrides_take_the_type_of_their_key():
    config = load(
        "d20.py",
        base__num_steps="1e3",
        optim__matrix_lr="1",
        run__compile_cache="false",
        run__name="123",
        eval__prompts='["a", "b"]',
    )
    assert config.base.num_steps == 1000 and type(config.base.num_steps) is int
    assert config.optim.matrix_lr == 1.0 and type(config.optim.matrix_lr) is float
    assert config.run.compile_cache is False
    assert config.run.name == "123"
    assert config.eval.prompts == ("a", "b")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base.num_step", "2", "unknown key config.base.num_step; .* config.base.num_steps"),
        ("modle.depth", "2", "the nearest is config.model.depth"),
        ("base.num_steps", "many", "got 'many', expected a value of type int"),
        ("base.num_steps", "2.5", "got '2.5', expected a value of type int"),
        ("base.num_steps", "True", "expected a value of type int"),
        ("run.compile_cache", "1", "expected a value of type bool"),
        ("eval.prompts", "Hello", "expected a value of type tuple"),
    ],
)
def test_bad_overrides_are_named(key, value, message):
    with pytest.raises(UserError, match=message):
        cfg.load(cfg.CONFIGS / "d20.py", {key: value})


def test_the_command_line():
    path, overrides, rest = cfg.parse_argv(
        ["--config=a.py", "--config.run.name", "x=y", "--config.model.depth=4", "list"], ""
    )
    assert str(path) == "a.py"
    assert overrides == {"run.name": "x=y", "model.depth": "4"}
    assert rest == ["list"]
    with pytest.raises(UserError, match="unknown argument '--depth=4'"):
        cfg.load_from_argv("", ["--depth=4"])
    with pytest.raises(UserError, match="no recipe at nowhere.py.*d20.py"):
        cfg.load_from_argv("", ["--config=nowhere.py"])
    with pytest.raises(UserError, match="needs a value"):
        cfg.load_from_argv("", ["--config"])


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        cfg.load_from_argv("What this does.", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("What this does.")
    for name in cfg.flatten(load("default.py")):
        assert f"    {name.split('.')[1]} " in text, name
    assert "derived(" not in text


def test_every_key_has_a_comment_and_help_shows_it():
    source = (cfg.CONFIGS / "default.py").read_text()
    comments = dict(re.findall(r"^    c\.(\w+\.\w+) = .*?  # (.+)$", source, re.MULTILINE))
    assert set(cfg.flatten(load("default.py"))) == set(comments)
    shown = iter(cfg.help_text("").splitlines())
    for name, comment in comments.items():  # both in the order of the file
        line = next(line for line in shown if line.startswith(f"    {name.split('.')[1]} "))
        assert line.endswith(f" {comment}"), line


def test_a_typo_in_a_recipe_file_is_named(tmp_path):
    start = "from configs import default\ndef get_config():\n    c = default.get_config()\n"
    for number, (line, message) in enumerate(
        [("c.model.detph = 3", "detph.*expected keys"), ("c.model.depth = '3'", "expected keys")]
    ):
        path = tmp_path / f"typo{number}.py"
        path.write_text(f"{start}    {line}\n    return c\n")
        with pytest.raises(UserError, match=f"(?s){path.name}.*{message}"):
            cfg.load(path)


def test_a_recipe_file_without_get_config_says_so(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="has no get_config"):
        cfg.load(tmp_path / "empty.py")


def test_locked():
    config = load("d20.py")
    with pytest.raises(AttributeError):
        config.model.width = 3
    with pytest.raises(TypeError):
        config.model.depth = "20"
