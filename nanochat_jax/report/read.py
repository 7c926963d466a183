"""What a run left behind, as plain facts: a Stage for each part of the run that has begun.

Any file may be missing, as a run may be half done or of older code. Below runs/<name>/ are read

    <stage>/config.json, run_info.json, metrics.jsonl
    <stage>/train_conversations/conversations.json    how many conversations were trained on
    eval/<stage>.json, <stage>_chat.json
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nanochat_jax.common import UserError, read_json
from nanochat_jax.hardware import usd_per_hour
from nanochat_jax.train.metrics import read_metrics

TRAINED = ("base", "mid", "sft", "rl")


@dataclass(frozen=True)
class Stage:
    """The tokenizer or a training stage, with the evaluations of what it made."""

    name: str
    config: dict[str, Any]
    info: dict[str, Any]  # run_info.json
    lines: list[dict[str, Any]]  # of metrics.jsonl
    facts: dict[str, Any]  # every value of these files by its name, the newest; and derived ones

    def curve(self, key: str) -> list[tuple[int, float]]:  # (step, value)
        return [(line["step"], line[key]) for line in self.lines if key in line]

    @property
    def answers(self) -> dict[str, str]:  # prompt -> how the model answered or went on
        given = [*self.facts["samples"], *self.facts["answers"]]
        return {answer["prompt"]: answer["text"] for answer in given}


def read_run(run_dir: Path) -> dict[str, Stage]:
    """The stages that have begun, by name and in order; UserError when there is none."""
    stages = {name: _read_stage(run_dir, name) for name in ("tokenizer", *TRAINED)}
    begun = {name: stage for name, stage in stages.items() if stage.info or stage.lines}
    if not begun:
        raise UserError(f"got {run_dir}, expected a run that has begun; run scripts/train.py first")
    return begun


def _read_stage(run_dir: Path, name: str) -> Stage:
    def read(file: str) -> dict[str, Any]:
        return read_json(run_dir / file, "delete it") if (run_dir / file).exists() else {}

    config, info = read(f"{name}/config.json"), read(f"{name}/run_info.json")
    if started := info.pop("started_unix_secs", None):
        info["started"] = f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC"
    counts = read(f"{name}/train_conversations/conversations.json").get("counts", {})
    evals = read(f"eval/{name}.json"), read(f"eval/{name}_chat.json")
    lines = read_metrics(run_dir / name / "metrics.jsonl")
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
    facts |= _derived(steps, info, is_ragged) if steps else {}
    return Stage(name, config, info, lines, facts)


def _derived(steps: list[dict[str, Any]], info: dict[str, Any], is_ragged: bool) -> dict[str, Any]:
    speed = median(step["tokens_per_sec"] for step in steps[1:]) if len(steps) > 1 else None
    peak = None if is_ragged else info.get("peak_flops")
    waited = [step["wait_secs"] for step in steps if "wait_secs" in step]
    last_tenth = steps[-math.ceil(len(steps) / 10) :]
    averaged = {"reward", "answer_tokens"} & steps[-1].keys()
    return {
        "steps_done": steps[-1]["step"] + 1,
        "tokens": sum(step["tokens"] for step in steps),
        "tokens_per_sec": speed,
        "mfu": info["flops_per_token"] * speed / peak if speed and peak else None,
        "idle_frac": sum(waited) / sum(s["step_secs"] for s in steps) if waited else None,
        **{key: fmean(step[key] for step in last_tenth) for key in averaged},
    }
