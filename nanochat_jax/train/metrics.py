"""metrics.jsonl for programs, lines on the console for people, a tracker if asked.

metrics.jsonl: one object a line with `kind` ("train" or "eval"), `step` (updates done before it)
and unrounded values. In all keys but those that end in `_secs` two runs of a recipe agree to the
last bit. A resumed run cuts the file back to its checkpoint.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanochat_jax.common import UserError, atomic_write, log

SECS_BETWEEN_LINES = 10  # where the output is no terminal


class MetricsLog:
    """Appends to metrics.jsonl and mirrors numbers to wandb or trackio."""

    def __init__(self, path: Path, start_step: int, tracker: str, run_name: str, is_main: bool):
        self.is_main = is_main
        self._tracker = _open_tracker(tracker, run_name) if is_main else None
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(path) if line["step"] < start_step]
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = open(path, "a", buffering=1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        if not self.is_main:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._tracker:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._tracker.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def sync(self) -> None:
        """Write it to disk, before a checkpoint that counts on it."""
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
    """On a terminal a line per step and a progress bar, elsewhere a line every ten seconds.

    Times, rates and MFU are means since the line before. The ETA counts evaluations and saves too,
    and that of the run goes by the rate of all steps: a slow stretch says little of hours to come.
    later_tokens: the tokens of this stage that would take as long as the stages after it.
    """

    def __init__(
        self,
        num_steps: int,
        start_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        later_tokens: float = 0.0,
    ):
        self.num_steps, self.later_tokens = num_steps, later_tokens
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._steps, self._tokens, self._secs = 0, 0, 0.0  # since the last line
        self._all_tokens, self._all_secs = 0, 0.0
        self._first: tuple[int, float] | None = None  # (step, time) that the ETA counts from
        self._line_at = -float("inf")
        off = not sys.stderr.isatty() or os.environ.get("NANOCHAT_PROCESS_INDEX", "0") != "0"
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", disable=off, leave=False)

    def step(self, step: int, values: dict[str, float], *, tokens: int, secs: float) -> None:
        """values: what to show, in order; tokens: time steps worked on, of all rows."""
        now, done = time.monotonic(), step + 1
        self._steps += 1
        self._tokens += tokens
        self._secs += secs
        self._bar.update(1)
        if self._first:
            self._all_tokens += tokens
            self._all_secs += secs
        self._first = self._first or (done, now)  # the first step has to warm up
        if self._bar.disable and now < self._line_at + SECS_BETWEEN_LINES and done < self.num_steps:
            return
        rate, (first, began) = self._tokens / self._secs, self._first
        mfu = f"{rate * self.flops_per_token / self.peak_flops:.1%}" if self.peak_flops else "n/a"
        left = (self.num_steps - done) * ((now - began) / (done - first) if done > first else secs)
        shown = " | ".join(f"{name} {value:.4f}" for name, value in values.items())
        eta = f"eta {format_secs(left)}"
        if self.later_tokens:
            mean = self._all_tokens / self._all_secs if self._all_tokens else rate
            eta += f", of the run about {format_secs(left + self.later_tokens / mean)}"
        self.line(
            f"step {done:05d}/{self.num_steps:05d} ({done / self.num_steps:.1%}) | {shown} | "
            f"dt {self._secs / self._steps * 1e3:.0f} ms | {rate:,.0f} tok/s | mfu {mfu} | {eta}"
        )
        self._steps, self._tokens, self._secs, self._line_at = 0, 0, 0.0, now

    def line(self, text: str) -> None:
        (log if self._bar.disable else self._bar.write)(text)

    def close(self) -> None:
        self._bar.close()


def format_secs(secs: float) -> str:
    """95 -> 1m35s, 7260 -> 2h01m."""
    minutes, secs = divmod(round(secs), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def _open_tracker(name: str, run_name: str):
    if name == "none":
        return None
    if name not in ("wandb", "trackio"):
        raise UserError(f"config.run.tracker got {name!r}, expected none, wandb or trackio")
    try:
        module = __import__(name)
    except ImportError:
        raise UserError(f"config.run.tracker needs a package; pip install {name}") from None
    own = {"id": run_name} if name == "wandb" else {}
    module.init(project="nanochat-jax", name=run_name, resume="allow", **own)
    return module
