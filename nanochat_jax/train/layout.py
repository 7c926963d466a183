"""How a step lies in memory: rows worked on at once, and how much of a block is recomputed.

  candidates()   every layout a stage may take, the fastest first; all give the same result, up to
                 rounding, because the batch stays whole and only its parts change
  LayoutRecord   layout.json in the stage's folder: the layout taken, those that ran out of memory

The layout is written down because another one rounds otherwise: a continued run takes the same one
again and repeats the uninterrupted run to the last bit. What ran out of memory is written down with
the bytes the compiler had counted: from then on a layout must not need more than that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError, read_json, write_json
from nanochat_jax.model.gpt import REMAT

MIN_TOKENS = 8_192  # of a part: with fewer, kernels and launches cost more than recomputing


class Layout(NamedTuple):
    rows: int  # a row shard works on at once; the rest of its share is accumulated
    remat: str  # none | names | full

    def __str__(self) -> str:
        return f"{self.rows} row{'s'[: self.rows - 1]} at once, remat {self.remat}"


class OutOfMemory(Exception):
    """A training step ran out of memory; its text is what the runtime said."""


@contextmanager
def in_the_step() -> Iterator[None]:
    """Out of memory in here is the fault of the layout: OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0]) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a jax.errors.JaxRuntimeError says so, in XLA's words, CUDA's or NCCL's."""
    said = str(error).lower()
    return any(words in said for words in ("resource_exhausted", "out_of_memory", "out of memory"))


def candidates(share: int, most_rows: int, seq_len: int, remat: str) -> list[Layout]:
    """Layouts for `share` rows of a row shard, at most `most_rows` of them at once; fastest first.

    First as many rows as are allowed, then fewer while a part is large enough to keep a device
    busy; the same with more and more recomputed, and small parts last. remat: auto, or the only one
    to be considered.
    """
    allowed = [n for n in range(min(share, most_rows), 0, -1) if share % n == 0]
    busy = [n for n in allowed if n == allowed[0] or n * seq_len >= MIN_TOKENS]
    kinds = REMAT if remat == "auto" else (remat,)
    layouts = [Layout(rows, kind) for kind in kinds for rows in busy]
    return layouts + [Layout(rows, kinds[-1]) for rows in allowed[len(busy) :]]


class LayoutRecord:
    """What a stage knows of its layouts, the same on all processes.

    made_for: what else decides about memory, as it comes back from JSON. A record made for anything
    else, or for other candidates, says nothing and is begun anew.
    """

    def __init__(self, path: Path, made_for: dict[str, Any], layouts: list[Layout]):
        self.path, self.layouts = path, layouts
        self.made_for = made_for | {"candidates": [list(layout) for layout in layouts]}
        # Bytes of those that ran out of memory, else 0; the one taken. Process 0 has read the file.
        too_large, taken = np.zeros(len(layouts), np.float32), np.int32(-1)
        if jax.process_index() == 0 and path.exists():
            saved = _read(path)
            if saved["made_for"] == self.made_for:
                for entry in saved["too_large"]:
                    too_large[self._index(entry)] = entry["bytes"]
                taken = np.int32(self._index(saved["taken"]) if saved["taken"] else -1)
        if jax.process_count() > 1:
            too_large, taken = multihost_utils.broadcast_one_to_all((too_large, taken))
        self.too_large = {
            layout: int(size)
            for layout, size in zip(layouts, too_large.tolist(), strict=True)
            if size
        }
        self.taken = layouts[int(taken)] if taken >= 0 else None

    def left(self) -> list[Layout]:
        """Those to try, in this order: from the one taken before on, or after what ran out of
        memory; all before that have been tried."""
        tried = 1 + max((self.layouts.index(layout) for layout in self.too_large), default=-1)
        return self.layouts[self.layouts.index(self.taken) if self.taken else tried :]

    def take(self, layout: Layout, num_bytes: int) -> None:
        """From now on this one; num_bytes: what a step needs, by the compiler's analysis."""
        self.taken = layout
        if jax.process_index() == 0:
            # At least 1, should the compiler not tell: 0 means that nothing ran out of memory.
            taken = layout._asdict() | {"bytes": max(1, num_bytes)}
            too_large = [one._asdict() | {"bytes": size} for one, size in self.too_large.items()]
            record = {"made_for": self.made_for, "taken": taken, "too_large": too_large}
            write_json(self.path, record)

    def _index(self, entry: dict[str, Any]) -> int:
        return self.layouts.index(Layout(entry["rows"], entry["remat"]))


def note_too_large(path: Path) -> Layout:
    """Write down that the layout taken ran out of memory; returns it. Any process may do so."""
    record = _read(path)
    entry = record["taken"]
    if entry is None:  # another process was faster
        entry = record["too_large"][-1]
    else:
        write_json(path, record | {"taken": None, "too_large": [*record["too_large"], entry]})
    return Layout(entry["rows"], entry["remat"])


def _read(path: Path) -> dict[str, Any]:
    cure = f"delete {path}; the layout is then chosen anew"
    record, keys = read_json(path, cure), {"made_for", "taken", "too_large"}
    if not isinstance(record, dict) or record.keys() != keys:
        wanted = ", ".join(sorted(keys))
        raise UserError(f"{path} got {str(record)[:40]!r}, expected {wanted}; {cure}")
    return record
