"""Recipes: load one, apply `--config.section.key=value`, refuse what is not a key.

  configs/default.py (every key) -> configs/<recipe>.py (its differences) -> command line ->
  recipe.resolve

A recipe is a Python file with `get_config() -> ConfigDict`. Keys are locked and typed: an unknown
key or a value of another type is an error that names the nearest key. `None` means "derived": the
key keeps its type (a placeholder) and `recipe.resolve` fills it and prints the formula.
"""

import ast
import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from ml_collections import config_dict

from nanochat_jax.common import UserError

# A ConfigDict: its keys are checked when it is loaded, a type checker cannot know them.
Recipe: TypeAlias = Any
CONFIGS = Path(__file__).parents[1] / "configs"


def load(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """Read the recipe at `path` and apply `overrides` ({"section.key": text}), checked and
    typed."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.py")))
        raise UserError(
            f"no recipe at {path}; expected a file like configs/d20.py (there: {known})"
        )
    try:
        config = _import(path).get_config()
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: {error}; expected keys of configs/default.py, typed as there"
        ) from error
    for name, text in (overrides or {}).items():
        _override(config, name, text)
    return config.lock()


def load_from_argv(doc: str | None, argv: list[str] | None = None) -> Recipe:
    """What every stage script starts with: `--config=FILE [--config.section.key=value ...]`."""
    path, overrides, rest = parse_argv(sys.argv[1:] if argv is None else argv, doc)
    if rest:
        raise UserError(
            f"unknown argument {rest[0]!r}; expected --config=FILE and --config.section.key=value "
            "(--help lists the keys)"
        )
    return load(path, overrides)


def parse_argv(argv: list[str], doc: str | None) -> tuple[Path, dict[str, str], list[str]]:
    """Split a command line into (recipe path, overrides, everything else); `--help` prints and
    exits."""
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
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name} needs a value; write {name}=VALUE")
        if name == "--config":
            path = Path(value)
        else:
            overrides[name.removeprefix("--config.")] = value
    return path, overrides, rest


def help_text(doc: str) -> str:
    """The script's own docstring, then every key of configs/default.py with default and comment."""
    lines = [doc.strip(), "", "Keys (--config.section.key=value), with their defaults:"]
    section = ""
    for line in (CONFIGS / "default.py").read_text().splitlines():
        match = re.match(r"\s*c\.(\w+)\.(\w+) = (.*?)(?:\s+# (.*))?$", line)
        if not match:
            continue
        if match[1] != section:
            section = match[1]
            lines += ["", f"  {section}"]
        default = re.sub(r"derived\(\w+\)", "derived", match[3])
        lines.append(f"    {match[2]:<24} {default:<18} {match[4] or ''}".rstrip())
    return "\n".join(lines)


def flatten(config: Recipe) -> dict[str, Any]:
    """{"section.key": value} of a recipe."""
    return {f"{s}.{k}": v for s, keys in config.to_dict().items() for k, v in keys.items()}


def derived(kind: type) -> Any:
    """A key that is worked out from others unless given: None now, `kind` later."""
    return config_dict.placeholder(kind)


def _import(path: Path) -> ModuleType:
    # Recipes import one another as `from configs import default`; that is the folder beside the
    # package, wherever the program is started from.
    root = str(CONFIGS.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(); a recipe returns its ConfigDict from there")
    return module


def _override(config: Recipe, name: str, text: str) -> None:
    known = list(flatten(config))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key config.{name}; the nearest is config.{near}")
    section, key = name.split(".")
    config[section][key] = _parse(name, text, config[section].get_type(key))


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e5 is how people write token counts
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise UserError(f"config.{name} got {text!r}, expected a value of type {kind.__name__}")
    return value
