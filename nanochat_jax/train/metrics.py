"""What a run tells: metrics.jsonl for programs, a line a step for people, a tracker if asked.

metrics.jsonl: one object a line with `kind` ("train" or "eval"), `step` (updates done before it)
and unrounded values; anything that depends on the clock is in a key ending in `_secs`, so two runs
of the same recipe agree in all other keys to the last bit. A resumed run cuts the file back to its
checkpoint.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanochat_jax.common import UserError, atomic_write, log

EMA_DECAY = 0.9


class MetricsLog:
    """Appends to metrics.jsonl and mirrors numbers to wandb or trackio."""

    def __init__(self, path: Path, start_step: int, tracker: str, run_name: str, is_main: bool):
        self.path = Path(path)
        self.is_main = is_main
        self._tracker = _open_tracker(tracker, run_name) if is_main else None
        if is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(self.path) if line["step"] < start_step]
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = open(self.path, "a", buffering=1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        if not self.is_main:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._tracker:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._tracker.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def sync(self) -> None:
        """On disk, power cut or not; called before a checkpoint that counts on it."""
        if self.is_main:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self.is_main:
            self._file.close()
            if self._tracker:
                self._tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line torn by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Console:
    """A line per step and, on a terminal, a progress bar below it."""

    def __init__(
        self, num_steps: int, start_step: int, flops_per_token: float, peak_flops: float | None
    ):
        self.num_steps = num_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._recent: list[float] = []
        visible = sys.stderr.isatty() and os.environ.get("NANOCHAT_PROCESS_INDEX", "0") == "0"
        self._bar = tqdm(
            total=num_steps, initial=start_step, unit="step", disable=not visible, leave=False
        )

    def step(self, step: int, values: dict[str, float], *, tokens: int, secs: float) -> None:
        """values: what to show, in order; tokens: time steps worked on, of all rows."""
        done = step + 1
        self._recent = [*self._recent[-19:], secs]
        typical = sorted(self._recent)[len(self._recent) // 2]
        rate = tokens / secs
        mfu = (
            "n/a" if not self.peak_flops else f"{rate * self.flops_per_token / self.peak_flops:.1%}"
        )
        left = format_secs(typical * (self.num_steps - done))
        shown = " | ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.line(
            f"step {done:05d}/{self.num_steps:05d} ({done / self.num_steps:.1%}) | {shown} | "
            f"dt {secs * 1e3:.0f} ms | {rate:,.0f} tok/s | mfu {mfu} | eta {left}"
        )
        self._bar.update(1)

    def line(self, text: str) -> None:
        if self._bar.disable:
            log(text)
        else:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


def format_secs(secs: float) -> str:
    """95 -> 1m35s, 7260 -> 2h01m."""
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


class Stopwatch:
    """Seconds between laps."""

    def __init__(self):
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def _open_tracker(name: str, run_name: str):
    if name == "none":
        return None
    if name not in ("wandb", "trackio"):
        raise UserError(f"config.run.tracker got {name!r}, expected none, wandb or trackio")
    try:
        module = __import__(name)
    except ImportError:
        raise UserError(
            f"config.run.tracker={name} needs that package; pip install {name}"
        ) from None
    once = {"id": run_name, "resume": "allow"} if name == "wandb" else {"resume": "allow"}
    module.init(project="nanochat-jax", name=run_name, **once)  # a restart continues the same run
    return module
