"""What a run left behind, as plain facts: a Stage for each part of the run that has begun.

Any file may be missing, as a run may be half done or of older code, and a damaged one is left out
and told. Nothing is locked or written: a run may go on meanwhile. Below runs/<name>/ are read

    <stage>/config.json, run_info.json, metrics.jsonl
    <stage>/train_conversations/conversations.json    how many conversations were trained on
    eval/<stage>.json, <stage>_chat.json
"""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nanochat_jax.common import UserError, read_json
from nanochat_jax.hardware import usd_per_hour

TRAINED = ("base", "mid", "sft", "rl")
Points = list[tuple[int, float]]  # (step, value)
MOST_POINTS = 1_000  # of a curve: more than a screen shows
# The numbers without which a line of metrics.jsonl is damaged, by its kind.
NEEDED = {"train": ("step", "tokens", "step_secs", "elapsed_secs"), "eval": ("step",)}


@dataclass(frozen=True, eq=False)
class Stage:
    """The tokenizer or a training stage, with the evaluations of what it made."""

    name: str
    config: dict[str, Any]
    info: dict[str, Any]  # run_info.json
    curves: dict[str, Points]  # the numbers of metrics.jsonl by their keys
    facts: dict[str, Any]  # every value of these files by its name, the newest; and derived ones
    problems: list[str]  # files that are damaged

    @property
    def answers(self) -> dict[str, str]:  # prompt -> how the model answered or went on
        given = [*self.facts["samples"], *self.facts["answers"]]
        return {answer["prompt"]: answer["text"] for answer in given}


def files(run_dir: Path, name: str) -> dict[str, Path]:
    """What is read of a stage: all that its page depends on."""
    own = {"config": "config.json", "info": "run_info.json", "metrics": "metrics.jsonl"}
    own |= {"counts": "train_conversations/conversations.json"}
    evals = {"eval": f"{name}.json", "chat": f"{name}_chat.json"}
    found = {what: run_dir / name / file for what, file in own.items()}
    return found | {what: run_dir / "eval" / file for what, file in evals.items()}


def begun(run_dir: Path) -> list[str]:
    """The stages that have begun, in order."""
    stages = ((name, files(run_dir, name)) for name in ("tokenizer", *TRAINED))
    return [name for name, at in stages if at["info"].exists() or at["metrics"].exists()]


def read_run(run_dir: Path) -> dict[str, Stage]:
    """The stages that have begun, by name and in order; UserError when there is none."""
    if not (names := begun(run_dir)):
        raise UserError(f"got {run_dir}, expected a run that has begun; run scripts/train.py first")
    return {name: read_stage(run_dir, name) for name in names}


def read_stage(run_dir: Path, name: str, tail_bytes: int | None = None) -> Stage:
    """tail_bytes: how much of metrics.jsonl to read, from its end; None: all of it."""
    paths, problems = files(run_dir, name), []

    def read(what: str) -> dict[str, Any]:
        try:
            value = read_json(paths[what], "delete it") if paths[what].exists() else {}
        except UserError as error:
            value = str(error)
        if not isinstance(value, dict):
            problems.append(value if isinstance(value, str) else f"{paths[what]} is no object")
            return {}
        return value

    config, info, counts = read("config"), read("info"), read("counts").get("counts", {})
    if started := info.pop("started_unix_secs", None):
        info["started"] = f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC"
    evals = read("eval"), read("chat")
    lines = _read_lines(paths["metrics"], tail_bytes, problems)
    if name == "rl":  # the loss of practice says nothing
        lines = [{k: v for k, v in line.items() if "loss" not in k} for line in lines]
    steps = [line for line in lines if line["kind"] == "train"]
    # A batch that is as wide as its longest row has no fixed cost: what counts are trained tokens.
    is_ragged = name == "rl" or config.get(name, {}).get("packing") == "rows"
    for step in [] if is_ragged else steps:
        step["tokens"] = info.get("tokens_per_step", step["tokens"])
    for step in steps[1:]:  # the first one compiles
        step["tokens_per_sec"] = step["tokens"] / step["step_secs"]
    facts: dict[str, Any] = dict(steps_done=0, tasks={}, samples=[], answers=[], usd=None)
    for part in (*lines, counts, info, *evals):
        facts |= part
    facts["eval_steps"] = [found["step"] for found in evals if "step" in found]
    facts["eval_secs"] = sum(found.get("eval_secs", 0.0) for found in evals)
    # After a kill, the clock of the last step is ahead of what the stage recorded.
    train_secs = max([facts.get("wall_secs", 0.0), *(s["elapsed_secs"] for s in steps[-1:])])
    facts["secs"] = train_secs + facts["eval_secs"]
    if machine := info.get("hardware"):
        price = usd_per_hour(machine["device_kind"], machine["platform"])  # None: not known
        facts["usd"] = price and price * machine["num_devices"] * facts["secs"] / 3600
    facts |= _derived(lines, info, is_ragged) if steps else {}
    return Stage(name, config, info, _curves(lines), facts, problems)


def _read_lines(path: Path, tail_bytes: int | None, problems: list[str]) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that is being written is left out."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        cut = 0 if tail_bytes is None else max(0, file.seek(0, 2) - tail_bytes)
        file.seek(cut)
        text = file.read().decode(errors="replace").split("\n")[cut > 0 : -1]
    lines = [(number, _parse(line)) for number, line in enumerate(text, 1) if line]
    if damaged := [number for number, line in lines if line is None]:
        first = "" if cut else f"; the first is line {damaged[0]}"
        problems.append(f"{path} has damaged lines, {len(damaged)} of {len(lines)}{first}")
    return [line for _, line in lines if line]


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        numbers = [line[key] for key in NEEDED[line["kind"]]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return line if all(isinstance(number, int | float) for number in numbers) else None


def _curves(lines: list[dict[str, Any]]) -> dict[str, Points]:
    curves: dict[str, Points] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, []).append((line["step"], value))
    return {key: _thinned(points) for key, points in curves.items()}


def _thinned(points: Points) -> Points:
    """The lowest and the highest of each stretch: few points, and every spike."""
    width = math.ceil(2 * len(points) / MOST_POINTS)
    if width <= 2:
        return points
    stretches = (points[first : first + width] for first in range(0, len(points), width))
    value = itemgetter(1)
    return [p for s in stretches for p in sorted({min(s, key=value), max(s, key=value)})]


def _derived(lines: list[dict[str, Any]], info: dict[str, Any], is_ragged: bool) -> dict[str, Any]:
    steps = [line for line in lines if line["kind"] == "train"]
    speed = median(step["tokens_per_sec"] for step in steps[1:]) if len(steps) > 1 else None
    peak = None if is_ragged else info.get("peak_flops")
    waited = [step["wait_secs"] for step in steps if "wait_secs" in step]
    last_tenth = steps[-math.ceil(len(steps) / 10) :]
    averaged = {"reward", "answer_tokens"} & steps[-1].keys()
    done = steps[-1]["step"] + 1
    # To come: as many seconds a step as the last ones took, and the evaluations' share.
    eval_secs = sum(line.get("eval_secs", 0.0) for line in lines) / len(steps)
    step_secs = fmean(step["step_secs"] for step in (steps[1:] or steps)[-100:])
    left = (step_secs + eval_secs) * (info["num_steps"] - done) if "num_steps" in info else None
    later = None if is_ragged else info.get("later_tokens")
    return {
        "steps_done": done,
        "tokens": sum(step["tokens"] for step in steps),
        "tokens_per_sec": speed,
        "mfu": info["flops_per_token"] * speed / peak if speed and peak else None,
        "idle_frac": sum(waited) / sum(s["step_secs"] for s in steps) if waited else None,
        "secs_left": left,
        "run_secs_left": left + later / speed if left is not None and later and speed else None,
        **{key: fmean(step[key] for step in last_tenth) for key in averaged},
    }
