"""The report of a run: one set of facts, shown by two templates, as a web page and as Markdown.

It can be made at any time; the same files give the same report. `finalize` escapes every value.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape

from nanochat_jax.common import atomic_write
from nanochat_jax.report import plots, tables
from nanochat_jax.report.read import Stage, read_run
from nanochat_jax.train.metrics import format_secs

TEMPLATES = Path(__file__).parent / "templates"
# Control characters, halves of characters, and marks that turn the direction of what follows.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def make_report(run_dir: Path, draw: Callable = plots.draw) -> tuple[Path, Path]:
    """Write report/report.md with its curves, and report/report.html; returns their paths."""
    stages = read_run(run_dir)
    drawn = {name: list(plots.charts(stage, draw)) for name, stage in stages.items()}
    folder, facts = run_dir / "report", report_facts(run_dir.name, stages, drawn)
    for name, _, svg in sum(drawn.values(), []):
        atomic_write(folder / f"{name}.svg", svg)
    atomic_write(folder / "report.md", render("report.md", facts, in_markdown))
    atomic_write(folder / "report.html", render("report.html", facts))
    return folder / "report.md", folder / "report.html"


def report_facts(name: str, stages: dict[str, Stage], charts: dict[str, list]) -> dict[str, Any]:
    """What body.txt shows."""
    views = (tables.scores, tables.prompts, tables.time, tables.training, tables.details)
    facts = {view.__name__: view(stages) for view in views}
    return facts | {"name": name, "stages": stages, "charts": charts}


def shown(value: Any) -> str:
    """A value as a person writes it; a missing one is "-"."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, ChainableUndefined) or value is None or value in ([], ()):
        return "-"
    if isinstance(value, dict):
        value = [f"{key} {part}" for key, part in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
    return UNPRINTABLE.sub("\ufffd", str(value))


def in_markdown(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line."""
    if isinstance(value, Markup):
        return value
    text = str(escape(" ".join(shown(value).split()))).replace("&#39;", "'").replace("&#34;", '"')
    return Markup(re.sub(r"([\\`*|\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", text))


def render(template: str, facts: dict[str, Any], finalize: Callable = shown) -> str:
    return _environment(finalize).get_template(template).render(facts)


@cache
def _environment(finalize: Callable) -> Environment:
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=finalize)
    env.undefined = ChainableUndefined  # a fact of a stage that has not run
    env.loader = FileSystemLoader(TEMPLATES)
    env.filters |= {"amount": tables.amount, "readable": tables.readable, "secs": format_secs}
    return env
