"""Curves of a stage as SVG: transparent, readable on light and dark, the same bytes every time."""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from nanochat_jax.report.read import Points, Stage

INK = "#768191"  # of text and frames: the grey that stands out from white as much as from black
COLOURS = ("#4c86e0", "#d98324", "#2f9e77", "#b05fc9", "#d4526e", "#8a8f2a", "#1f9bb5", "#9a6b4f")
STYLE: dict[Any, Any] = {"svg.hashsalt": "nanochat_jax", "svg.fonttype": "none", "font.size": 9}
STYLE |= {f"{key}.color": INK for key in ("text", "xtick", "ytick", "grid")}
STYLE |= {f"axes.{key}color": INK for key in ("edge", "label")} | {"grid.alpha": 0.25}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
STYLE |= {"path.simplify_threshold": 0.5}  # pixels; a long curve stays small, with every spike
STYLE |= {"text.parse_math": False}  # names of runs are text

# Name of the file -> title, and the curves by their keys in metrics.jsonl.
CURVES = {
    "loss": ("Training loss", {"loss": "each step", "loss_ema": "moving average"}),
    "val_bpb": ("Validation, bits per byte", {"val_bpb": ""}),
    "core": ("CORE", {"core": "CORE", "core_partial": "mean of some tasks"}),
    "reward": ("Mean reward", {"reward": ""}),
    "pass_at_k": ("pass@k on validation questions", {f"pass@{k}": f"pass@{k}" for k in (1, 4, 8)}),
    "solved_frac": (
        "Share of questions",
        {"solved_frac": "solved", "mixed_frac": "right and wrong"},
    ),
    "answer_tokens": ("Tokens of an answer", {"answer_tokens": ""}),
    "grad_norm": ("Gradient norm", {"grad_norm": ""}),
    "lr": ("Learning rate, share of the highest", {"lr_mult": ""}),
    "speed": ("Tokens per second", {"tokens_per_sec": ""}),
}


def charts(stage: Stage, draw: Callable[..., str]) -> Iterator[tuple[str, str, str]]:
    """(name of the file, title, <svg>) of what the stage has at least two points of."""
    for name, (title, keys) in CURVES.items():
        found = {label: stage.curves.get(key, []) for key, label in keys.items()}
        if curves := {label: points for label, points in found.items() if len(points) > 1}:
            yield f"{stage.name}_{name}", title, draw(title, curves)


def compared(stages: list[Stage], draw: Callable) -> Iterator[tuple[str, str, str]]:
    """The same of one stage of several runs, each in its colour."""
    for name, (title, keys) in CURVES.items():
        for key, label in keys.items():
            if key == "loss":  # several are hard to tell apart: the moving average will do
                continue
            found = [stage.curves.get(key, []) for stage in stages]
            if any(len(points) > 1 for points in found):
                whole = f"{title}, {label}" if label else title
                yield name, whole, draw(whole, dict(enumerate(found)), legend=False)


def draw(title: str, curves: Mapping[Any, Points], legend: bool = True) -> str:
    import matplotlib  # only the report needs it, and it takes a moment to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.add_axes((0.13, 0.165, 0.85, 0.735), xlabel="step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_title(title, loc="left", fontsize=10)
        for colour, (label, points) in zip(COLOURS, curves.items(), strict=False):
            marker, width = (".", 1.4) if len(points) <= 40 else ("", 0.8)
            if points:
                axes.plot(*np.array(points).T, c=colour, lw=width, marker=marker, label=label)
        # The first steps may leave the frame at the top: without them the rest is easier to read.
        settled = [value for points in curves.values() for _, value in points[len(points) // 30 :]]
        low, high = axes.dataLim.intervaly[0], np.nanmax(settled)
        air = 0.05 * ((high - low) or abs(high) or 1.0)
        axes.set_ylim(low - air, high + air)
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if high > 1e4 else "{x:g}")
        if legend and len(curves) > 1:
            axes.legend(frameon=False)
        file = io.StringIO()
        undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
    # Without ids that nothing refers to: they would be the same in each chart of a page.
    return re.sub(r' id="[a-zA-Z2.]+_\d+"', "", "<svg" + file.getvalue().partition("<svg")[2])
