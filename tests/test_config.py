"""Recipes: typed, locked, and errors that tell what to write instead."""

import re

import pytest

from nanochat_jax import config as cfg
from nanochat_jax import recipe
from nanochat_jax.common import UserError


def load(name: str, **overrides: str):
    return cfg.load(cfg.CONFIGS / name, {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.mark.parametrize("name", sorted(p.name for p in cfg.CONFIGS.glob("*.py")))
def test_every_recipe_resolves_and_has_exactly_the_default_keys(name):
    config = load(name)
    assert set(cfg.flatten(config)) == set(cfg.flatten(load("default.py")))
    recipe.resolve(config, platform="gpu", num_devices=8)
    assert recipe.gpt_config(config).model_dim % config.model.num_heads == 0
    assert None not in cfg.flatten(config).values()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("base.num_steps", "1e3", 1000),
        ("optim.matrix_lr", "1", 1.0),
        ("run.compile_cache", "false", False),
        ("run.name", "123", "123"),
        ("eval.prompts", '["a", "b"]', ("a", "b")),
    ],
)
def test_overrides_take_the_type_of_their_key(key, text, value):
    got = cfg.flatten(cfg.load(cfg.CONFIGS / "d20.py", {key: text}))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("base.num_step", "2", "config.base.num_steps"),
        ("modle.depth", "2", "config.model.depth"),
        ("base.num_steps", "many", "'many', .* int"),
        ("base.num_steps", "2.5", "'2.5', .* int"),
        ("base.num_steps", "True", "int"),
        ("run.compile_cache", "1", "bool"),
        ("eval.prompts", "Hello", "tuple"),
        ("eval.trigram_tokens", "1", cfg.REMOVED["eval.trigram_tokens"]),  # what takes its place
    ],
)
def test_bad_overrides_are_named(key, value, named):
    with pytest.raises(UserError, match=named):
        cfg.load(cfg.CONFIGS / "d20.py", {key: value})


def test_the_command_line():
    path, overrides, rest = cfg.parse_argv(
        ["--config=a.py", "--config.run.name", "x=y", "--config.model.depth=4", "list"], ""
    )
    assert (str(path), rest) == ("a.py", ["list"])
    assert overrides == {"run.name": "x=y", "model.depth": "4"}
    with pytest.raises(SystemExit, match="0"):
        cfg.load_from_argv("", ["--help"])


@pytest.mark.parametrize(
    ("word", "named"),
    [("--depth=4", "--depth=4"), ("--config=no.py", "no.py.*d20.py"), ("--config", "needs")],
)
def test_bad_words_are_named(word, named):
    with pytest.raises(UserError, match=named):
        cfg.load_from_argv("", [word])


def test_help_shows_every_key_with_default_and_comment():
    sections = re.split(r"\n\n  (\w+)\n", cfg.help_text("What this does."))
    assert sections[0].startswith("What this does.")
    shown = {
        f"{section}.{line.split()[0]}": line
        for section, lines in zip(sections[1::2], sections[2::2], strict=True)
        for line in lines.splitlines()
    }
    config = cfg.flatten(load("default.py"))
    assert shown.keys() == config.keys()
    for key, line in shown.items():
        value = "derived" if config[key] is None else repr(config[key])
        assert re.fullmatch(rf"    \w+ +{re.escape(value)} +\S.+", line), line


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("c = default.get_config(); c.model.detph = 3; return c", "detph"),
        ("c = default.get_config(); c.model.depth = '3'; return c", "depth"),
        ("c = default.get_config(); c.model.update(detph=3); return c", "detph"),
    ],
)
def test_a_mistake_in_a_recipe_file_is_named(tmp_path, lines, named):
    path = tmp_path / "typo.py"
    path.write_text(f"from configs import default\ndef get_config():\n    {lines}\n")
    with pytest.raises(UserError, match=f"(?s)typo.py.*{named}"):
        cfg.load(path)
    path.write_text("")
    with pytest.raises(UserError, match="get_config"):
        cfg.load(path)
