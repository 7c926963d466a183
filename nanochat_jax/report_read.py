"""Read what a run left behind, whatever its state: never run, interrupted, torn by a crash,
complete.

Nothing here raises for a file that is missing or broken: what can be read is read, and the rest is
said in `notes`, which the report prints. Formats (all written elsewhere):

    <stage>/config.json     resolved configuration, a dict of sections
    <stage>/run_info.json   hardware (hardware.describe), git, started_unix_secs, command, params,
                            flops_per_token, tokens_per_step, num_steps, wall_secs, restarts,
                            parent, documents (what was read), peak_flops and peak_flops_source
                            (hardware.compute_ceiling)
    <stage>/metrics.jsonl   lines of kind "train" and "eval"; for a step written twice the later
                            counts
    <stage>/train_conversations/conversations.json    counts: conversations, cut_at_a_turn, ...
    eval/<stage>.json       final evaluation; base: core or core_partial, core_tasks (eval/core.py)
    eval/<stage>_chat.json  chat evaluation, written again after each task: tasks {spec: Score of
                            eval/chat.py}, accuracy by task name, chatcore*, settings
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nanochat_jax.common import UserError
from nanochat_jax.hardware import peak_flops, usd_per_hour

STAGES = ("base", "mid", "sft", "rl")


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None: files may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # so is NaN


def whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


@dataclass
class Stage:
    """One training stage: its files, and the numbers that follow from them."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)  # by step
    evals: list[dict[str, Any]] = field(default_factory=list)  # by step
    eval_files: dict[str, dict[str, Any]] = field(default_factory=dict)  # eval/<stage>*.json
    conversations: dict[str, Any] = field(default_factory=dict)  # counts of what was rendered
    notes: list[str] = field(default_factory=list)

    @property
    def has_run(self) -> bool:
        return bool(self.train or self.evals or self.info or self.eval_files)

    @property
    def results(self) -> dict[str, Any]:
        """All evaluation files in one."""
        return {key: value for file in self.eval_files.values() for key, value in file.items()}

    @property
    def chat(self) -> dict[str, Any]:
        """The chat evaluation."""
        return self.eval_files.get(f"{self.name}_chat", {})

    @property
    def steps_done(self) -> int:
        return self.train[-1]["step"] + 1 if self.train else 0

    @property
    def num_steps(self) -> int | None:
        return whole(self.info.get("num_steps")) or whole(self.setting("num_steps"))

    @property
    def tokens_per_step(self) -> float | None:
        """Time steps worked on, padding included; where `is_ragged`, the most there can be."""
        return number(self.info.get("tokens_per_step")) or number(
            self.setting("total_batch_tokens")
        )

    @property
    def is_ragged(self) -> bool:
        """Whether a batch is as wide as its longest row needs."""
        return self.name == "rl" or self.setting("packing") == "rows"

    @property
    def trained_tokens(self) -> int:
        return sum(whole(line.get("tokens")) or 0 for line in self.train)

    @property
    def step_secs(self) -> float | None:
        """Median; the first step is left out, it compiles."""
        secs = [s for line in self.train[1:] if (s := number(line.get("step_secs")))]
        return median(secs) if secs else None

    @property
    def rates(self) -> list[tuple[int, float]]:
        """(step, tokens per second), without the first; where `is_ragged`, of trained tokens."""
        points = []
        for line in self.train[1:]:
            secs = number(line.get("step_secs"))
            tokens = number(line.get("tokens")) if self.is_ragged else self.tokens_per_step
            if secs and secs > 0 and tokens:
                points.append((line["step"], tokens / secs))
        return points

    @property
    def tokens_per_sec(self) -> float | None:
        """Median of the rates."""
        return median(rate for _, rate in self.rates) if self.rates else None

    @property
    def idle_frac(self) -> float | None:
        """Of the time in steps, that in which the devices waited for a batch."""
        both = [[number(line.get(k)) for k in ("wait_secs", "step_secs")] for line in self.train]
        known = [(wait, secs) for wait, secs in both if wait is not None and secs]
        total = sum(secs for _, secs in known)
        return sum(wait for wait, _ in known) / total if total > 0 else None

    @property
    def wall_secs(self) -> float | None:
        """What the run recorded, or the clock of its last line: a kill leaves the record behind."""
        clocks = [self.info.get("wall_secs")]
        clocks += [line.get("elapsed_secs") for line in self.train + self.evals]
        return max((secs for clock in clocks if (secs := number(clock)) is not None), default=None)

    @property
    def eval_secs(self) -> float:
        return sum(number(file.get("eval_secs")) or 0.0 for file in self.eval_files.values())

    @property
    def hardware(self) -> dict[str, Any]:
        return as_dict(self.info.get("hardware"))

    @property
    def usd_per_hour(self) -> float | None:
        return price_per_hour(self.hardware)

    @property
    def mfu(self) -> tuple[float | None, str]:
        """Model FLOPs utilisation as a fraction, and what it is a fraction of."""
        kind = str(self.hardware.get("device_kind", "an unknown device"))
        ceiling = number(self.info.get("peak_flops"))
        source = str(self.info.get("peak_flops_source") or f"peak of {kind}")
        if ceiling is None and self.hardware.get("platform") != "cpu":
            peak = peak_flops(kind)
            ceiling = peak and peak * (number(self.hardware.get("num_devices")) or 1)
        flops_per_token = number(self.info.get("flops_per_token"))
        if self.is_ragged or not ceiling or not flops_per_token or not self.tokens_per_sec:
            return None, source
        return flops_per_token * self.tokens_per_sec / ceiling, source

    def setting(self, key: str) -> Any:
        """A value of the stage's own section of the configuration."""
        return as_dict(self.config.get(self.name)).get(key)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a number in the evaluation lines."""
        return _points(self.evals, key)

    def trained(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a number in the training lines."""
        return _points(self.train, key)

    def metric(self, key: str) -> float | None:
        """The final value: that of the evaluation file, else the last one seen while training."""
        final = number(self.results.get(key))
        curve = self.curve(key)
        return final if final is not None else (curve[-1][1] if curve else None)

    def samples(self) -> tuple[list[tuple[str, str]], int | None]:
        """Newest samples as (prompt, continuation), and the step they are from."""
        sources = [*self.evals, *self.eval_files.values()]
        source = next((s for s in reversed(sources) if isinstance(s.get("samples"), list)), {})
        pairs = []
        for sample in source.get("samples", []):
            prompt, text = (str(as_dict(sample).get(k, "")) for k in ("prompt", "text"))
            pairs.append((prompt, text.removeprefix(prompt)))
        return pairs, whole(source.get("step"))


@dataclass
class Run:
    name: str
    info: dict[str, Any]  # of the run as a whole, else of the first stage that has one
    stages: dict[str, Stage]
    tokenizer: dict[str, Any]  # tokenizer/tokenizer.json
    tokenizer_info: dict[str, Any]  # tokenizer/run_info.json
    compression: dict[str, Any]  # eval/tokenizer.json, as eval/compression.py makes it
    other_results: dict[str, dict[str, Any]]  # eval/*.json that belong to no stage
    notes: list[str]

    @property
    def all_notes(self) -> list[str]:
        return self.notes + [note for stage in self.stages.values() for note in stage.notes]

    @property
    def wall_secs(self) -> float:
        return sum(
            ((s.wall_secs or 0.0) + s.eval_secs for s in self.stages.values()),
            start=number(self.tokenizer_info.get("wall_secs")) or 0.0,
        )

    @property
    def cost_usd(self) -> float | None:
        """Each stage's hours at its own machine's price; None when a price is unknown."""
        run_price = price_per_hour(as_dict(self.info.get("hardware")))
        spent = [(number(self.tokenizer_info.get("wall_secs")) or 0.0, run_price)]
        for stage in self.stages.values():
            price = stage.usd_per_hour if stage.hardware else run_price
            spent.append(((stage.wall_secs or 0.0) + stage.eval_secs, price))
        total = 0.0
        for secs, price in spent:
            if secs and price is None:
                return None
            total += secs / 3600 * (price or 0.0)
        return total


def read_run(run_dir: Path) -> Run:
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"got run {run_dir}, which does not exist; expected the folder of a run, "
            "run a stage of it first: python scripts/train.py --config=..."
        )
    notes: list[str] = []
    stages = {name: _read_stage(run_dir, name) for name in STAGES}
    files = sorted((run_dir / "eval").glob("*.json"))
    results = {path.stem: _read_json(path, notes) for path in files}
    compression = results.pop("tokenizer", {})
    other_results = {}
    for name, values in results.items():
        stage = stages.get(name.split("_")[0])
        if stage:
            stage.eval_files[name] = values
        else:
            other_results[name] = values
    info = _read_json(run_dir / "run_info.json", notes)
    tokenizer_info = _read_json(run_dir / "tokenizer" / "run_info.json", notes)
    for stage_info in (*(stage.info for stage in stages.values()), tokenizer_info):
        info = info or stage_info
    return Run(
        name=run_dir.name,
        info=info,
        stages=stages,
        tokenizer=_read_json(run_dir / "tokenizer" / "tokenizer.json", notes),
        tokenizer_info=tokenizer_info,
        compression=compression,
        other_results=other_results,
        notes=notes,
    )


def _read_stage(run_dir: Path, name: str) -> Stage:
    stage, folder = Stage(name), run_dir / name
    stage.config = _read_json(folder / "config.json", stage.notes)
    stage.info = _read_json(folder / "run_info.json", stage.notes)
    rendered = _read_json(folder / "train_conversations" / "conversations.json", stage.notes)
    stage.conversations = as_dict(rendered.get("counts"))
    if not (folder / "metrics.jsonl").is_file():
        return stage
    lines: dict[tuple, dict[str, Any]] = {}
    text = (folder / "metrics.jsonl").read_bytes().decode(errors="replace")
    all_lines = text.splitlines()
    broken = []
    for line_number, line in enumerate(all_lines, start=1):
        try:
            value = json.loads(line)
            value["step"] = int(value["step"] if abs(value["step"]) < 1e15 else "too large")
            lines[value["kind"], value.get("name"), value["step"]] = value
        except (ValueError, KeyError, TypeError, AttributeError):
            broken.append(line_number)
    if broken == [len(all_lines)] and not text.endswith("\n"):
        stage.notes.append(f"{name}/metrics.jsonl: its last line is torn and was skipped")
    elif broken:
        stage.notes.append(
            f"{name}/metrics.jsonl: {len(broken)} unreadable lines were skipped, "
            f"the first is line {broken[0]}"
        )
    ordered = sorted(lines.values(), key=lambda line: line["step"])
    stage.train = [line for line in ordered if line["kind"] == "train"]
    stage.evals = [line for line in ordered if line["kind"] == "eval"]
    return stage


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The dict in a file; empty when there is none; a file that cannot be read is noted."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes().decode(errors="replace"))
    except ValueError as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.parent.name}/{path.name} cannot be read: it holds no object")
        return {}
    return value


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    values = ((line["step"], number(line.get(key))) for line in lines)
    return [(step, value) for step, value in values if value is not None]


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def price_per_hour(hardware: dict[str, Any]) -> float | None:
    """Of all devices of a described machine."""
    kind = hardware.get("device_kind")
    if kind is None:
        return None
    each = usd_per_hour(str(kind), str(hardware.get("platform")))
    return None if each is None else each * (number(hardware.get("num_devices")) or 1)
