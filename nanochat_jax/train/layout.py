"""The layout of a step: how many rows it works on at once, how much of a block it recomputes.

All layouts give the same result up to rounding. The first that fits is taken and recorded in
layout.json, so that a continued run repeats the uninterrupted one to the last bit. One that ran out
of memory is recorded with the bytes that the compiler had counted; later ones must need less.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError, log, read_json, write_json
from nanochat_jax.model.gpt import REMAT
from nanochat_jax.train.memory import ADVICE, format_bytes, is_out_of_memory, too_little_memory

MIN_TOKENS = 8_192  # of a part: with fewer, kernels and launches cost more than recomputing


class Layout(NamedTuple):
    rows: int  # a row shard works on at once; the rest of its share is accumulated
    remat: str  # none | names | full

    def __str__(self) -> str:
        return f"{self.rows} row{'s'[: self.rows - 1]} at once, remat {self.remat}"


def candidates(share: int, most_rows: int, seq_len: int, remat: str) -> list[Layout]:
    """Layouts for `share` rows of a row shard, at most `most_rows` of them at once; fastest first:
    for each kind of remat, from none to full, as many rows as are allowed, then fewer while a part
    keeps a device busy. Small parts come last. remat: auto, or the only kind."""
    allowed = [n for n in range(min(share, most_rows), 0, -1) if share % n == 0]
    busy = [n for n in allowed if n == allowed[0] or n * seq_len >= MIN_TOKENS]
    kinds = REMAT if remat == "auto" else (remat,)
    layouts = [Layout(rows, kind) for kind in kinds for rows in busy]
    return layouts + [Layout(rows, kinds[-1]) for rows in allowed[len(busy) :]]


class LayoutRecord:
    """The layout that a stage has taken, and the bytes of those that ran out of memory. A record
    that was not `made_for` these (what else memory depends on) and these layouts is replaced."""

    def __init__(self, path: Path, made_for: dict[str, Any], layouts: list[Layout]):
        self.path, self.layouts = path, layouts
        self.made_for = made_for | {"candidates": [list(layout) for layout in layouts]}
        # Process 0 has read the file: the others might see an older one, and wait for ever.
        too_large, taken = np.zeros(len(layouts), np.float32), np.int32(-1)
        if jax.process_index() == 0 and path.exists():
            saved = _read(path)
            if saved["made_for"] == self.made_for:
                for entry in saved["too_large"]:
                    too_large[layouts.index(_of(entry))] = entry["bytes"]
                taken = np.int32(layouts.index(_of(saved["taken"])) if saved["taken"] else -1)
        too_large, taken = multihost_utils.broadcast_one_to_all((too_large, taken))
        sizes = zip(layouts, too_large.tolist(), strict=True)
        self.too_large = {layout: int(size) for layout, size in sizes if size}
        self.taken = layouts[int(taken)] if taken >= 0 else None

    def left(self) -> list[Layout]:
        """Those still to be tried: from the one taken on, or after those that ran out of memory."""
        tried = 1 + max((self.layouts.index(layout) for layout in self.too_large), default=-1)
        return self.layouts[self.layouts.index(self.taken) if self.taken else tried :]

    def take(self, layout: Layout, num_bytes: int) -> None:
        """Record the layout taken; num_bytes: what a step needs, by the compiler's analysis."""
        self.taken = layout
        if jax.process_index() == 0:
            # At least 1 where the compiler does not tell: 0 means that memory sufficed.
            sizes = {layout: max(1, num_bytes)} | self.too_large
            taken, *too_large = (one._asdict() | {"bytes": size} for one, size in sizes.items())
            record = {"made_for": self.made_for, "taken": taken, "too_large": too_large}
            write_json(self.path, record)


def note_too_large(path: Path) -> Layout:
    """Record that the layout taken ran out of memory, in any process; returns that layout."""
    record = _read(path)
    entry = record["taken"]
    if entry is None:  # another process was faster
        return _of(record["too_large"][-1])
    write_json(path, record | {"taken": None, "too_large": [*record["too_large"], entry]})
    return _of(entry)


def choose(
    record: LayoutRecord,
    compile: Callable[[Layout], int],
    held_bytes: int,
    available_bytes: Callable[[], float],
) -> Layout:
    """The first layout left that fits, which the record takes; UserError when none does.

    compile: compiles the step in a layout, returns the bytes it needs. held_bytes: weights,
    gradients and optimizer state. Bytes grow with the rows, from more than held_bytes on: a layout
    is not compiled when the line from there to one with more rows shows that it cannot fit.
    """
    left = record.left()
    # A layout that ran out of memory shows that there is less than the device says.
    limit = min(record.too_large.values(), default=math.inf)
    known: dict[str, tuple[int, float]] = {}  # remat: (rows, bytes) of the one compiled last
    needed = available = 0.0
    for layout in left:
        if layout.remat in known and layout != left[-1]:
            more_rows, more_bytes = known[layout.remat]
            if held_bytes + (more_bytes - held_bytes) * layout.rows / more_rows > available:
                continue
        try:
            needed = compile(layout)
        except jax.errors.JaxRuntimeError as error:  # while kernels are tried out
            if not is_out_of_memory(error):
                raise
            needed = math.inf
        needed, available = _agreed(needed, min(limit, available_bytes()))
        fits = needed <= available and math.isfinite(needed)
        size = f"{format_bytes(needed)} of {format_bytes(available)} per device"
        log(f"layout: {layout}; a step needs {size}{'' if fits else ', too much'}")
        if fits:
            if record.taken not in (None, layout):
                log(f"layout: was {record.taken}; from here on losses agree up to rounding only")
            record.take(layout, int(needed))
            return layout
        if math.isfinite(needed):
            known[layout.remat] = layout.rows, needed
    if not left:
        raise UserError(f"{record.path}: every layout ran out of memory; {ADVICE}, or delete it")
    raise too_little_memory(f"with {left[-1]} a step needs", needed, available)


def _agreed(needed: float, available: float) -> tuple[float, float]:
    """The most that any process needs, the least that any has, so that all choose the same."""
    if jax.process_count() == 1:
        return needed, available
    values = multihost_utils.process_allgather(np.array([needed, available], np.float32))
    return float(values[:, 0].max()), float(values[:, 1].min())


def _of(entry: dict[str, Any]) -> Layout:
    return Layout(entry["rows"], entry["remat"])


def _read(path: Path) -> dict[str, Any]:
    cure = f"delete {path}; the layout is then chosen anew"
    record = read_json(path, cure)
    if not isinstance(record, dict) or record.keys() != {"made_for", "taken", "too_large"}:
        raise UserError(f"{path} got {str(record)[:40]!r}, expected the record of a layout; {cure}")
    return record
