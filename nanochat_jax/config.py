"""Recipes: configs/default.py (every key) -> configs/<recipe>.py (its differences) -> command line.

A recipe is a Python file with `get_config() -> ConfigDict`. Keys are locked and typed. One that is
None is derived from others by `recipe.resolve`.
"""

import ast
import difflib
import re
import runpy
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import config_dict

from nanochat_jax.common import UserError, run_main

# A ConfigDict: its keys are checked when it is loaded, a type checker cannot know them.
Recipe: TypeAlias = Any
CONFIGS = Path(__file__).parents[1] / "configs"
REMOVED = {  # keys that older recipes may have, and what takes their place
    "data.num_workers": "batches are always made in a thread, which is enough for eight GPUs",
    "eval.trigram_tokens": "the comparison with trigram models was removed",
}


def load(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """Read the recipe at `path` and apply `overrides` ({"section.key": text})."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.py")))
        raise UserError(f"no recipe at {path}; expected one like configs/d20.py (there: {known})")
    if str(CONFIGS.parent) not in sys.path:  # for `from configs import default` in recipes
        sys.path.insert(0, str(CONFIGS.parent))
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UserError(f"{path} has no get_config(); a recipe returns its ConfigDict from there")
    try:
        config = get_config()
    except (AttributeError, KeyError, TypeError) as error:
        what = f"expected keys of configs/default.py, typed as there (removed: {[*REMOVED]})"
        raise UserError(f"{path}: {error}; {what}") from error
    for name, text in (overrides or {}).items():
        _override(config, name, text)
    return config.lock()


def run_stage(stage: Callable[[Recipe], int | None], doc: str | None) -> None:
    """A stage script: run `stage` with the recipe of the command line; `doc` is for --help."""
    run_main(lambda: stage(load_from_argv(doc)))


def load_from_argv(doc: str | None, argv: list[str] | None = None) -> Recipe:
    """The recipe of a command line `--config=FILE [--config.section.key=value ...]`."""
    path, overrides, rest = parse_argv(sys.argv[1:] if argv is None else argv, doc)
    if rest:
        what = "expected --config=FILE and --config.section.key=value (--help lists the keys)"
        raise UserError(f"unknown argument {rest[0]!r}; {what}")
    return load(path, overrides)


def parse_argv(argv: list[str], doc: str | None) -> tuple[Path, dict[str, str], list[str]]:
    """(recipe path, overrides, other words) of a command line; `--help` prints and exits."""
    path, overrides, rest = CONFIGS / "default.py", {}, []
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            print(help_text(doc or ""))
            raise SystemExit(0)
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(word)
            continue
        value = value if equals else next(words, None)
        if value is None:
            raise UserError(f"{name} needs a value; write {name}=VALUE")
        if name == "--config":
            path = Path(value)
        else:
            overrides[name.removeprefix("--config.")] = value
    return path, overrides, rest


def parse_options(words: list[str], *, flags: Sequence[str] = (), **defaults: Any) -> Namespace:
    """A script's own options: --name=VALUE of the type of its default (a tuple of words: one of
    them, the first if not given), and flags. UserError for what is none of them."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in flags:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    for name, default in defaults.items():
        choices = default if isinstance(default, tuple) else None
        default = choices[0] if choices else default
        option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        kind = str if default is None else type(default)
        parser.add_argument(option, dest=name, type=kind, default=default, choices=choices)
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:
            raise ArgumentError(None, f"unknown argument {unknown[0]!r}")
    except ArgumentError as error:
        raise UserError(f"{error}; --help shows what there is") from None
    return args


def help_text(doc: str) -> str:
    """The script's own docstring, then every key of configs/default.py with default and comment."""
    lines = [doc.strip(), "", "Keys (--config.section.key=value), with their defaults:"]
    default, source = load(CONFIGS / "default.py"), (CONFIGS / "default.py").read_text()
    # Lines like `c.run.seed = 42  # of the weights`; keys that sections share are written to `s`.
    written = re.findall(r"^    (?:c\.)?(\w+)\.(\w+) = .*?  # (.+)$", source, re.MULTILINE)
    for section in dict.fromkeys(re.findall(r"^    c\.(\w+)", source, re.MULTILINE)):
        lines += ["", f"  {section}"]
        own, shared = ({k: text for s, k, text in written if s == name} for name in (section, "s"))
        for key, comment in (own | shared | own).items():
            if key in default[section]:
                value = "derived" if default[section][key] is None else repr(default[section][key])
                lines.append(f"    {key:<24} {value:<18} {comment}")
    return "\n".join(lines)


def flatten(config: Recipe) -> dict[str, Any]:
    """{"section.key": value} of a recipe."""
    return {f"{s}.{k}": v for s, keys in config.to_dict().items() for k, v in keys.items()}


def derived(kind: type) -> Any:
    """A key that is worked out from others unless given: None now, `kind` later."""
    return config_dict.placeholder(kind)


def _override(config: Recipe, name: str, text: str) -> None:
    known = list(flatten(config))
    if name not in known:
        if name in REMOVED:
            raise UserError(f"config.{name} was removed, leave it out: {REMOVED[name]}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key config.{name}; the nearest is config.{near}")
    section, key = name.split(".")
    config[section][key] = _parse(name, text, config[section].get_type(key))


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(value, float) and value.is_integer() and kind is int:  # 5e5 tokens
        value = int(value)
    if (kind, type(value)) in ((float, int), (tuple, list)):
        value = kind(value)
    if type(value) is not kind:
        raise UserError(f"config.{name} got {text!r}, expected a value of type {kind.__name__}")
    return value
