"""A file of reference numbers, and a row of the table: our value beside the file's."""

import math
import zipfile
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.common import UserError, read_json

ABSENT = "nothing"  # in a note, for a key that one side does not have
RELATIVE_FLOOR = 1e-12  # numbers closer than this are relatively the same: 2e-16 is a rounded 0


class Row(NamedTuple):
    """One comparison. Where it is exact, the tolerance is 0."""

    file: str
    what: str
    compared: int  # values
    difference: float  # the largest, or how many values differ
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


class Reference(UserDict[str, Any]):
    """The values of one file by key; it remembers which of them were read.

    Where there is no key "a", "a" stands for all "a.rest" and "a/rest", as {rest: value}.
    """

    def __init__(self, file: str, values: Mapping[str, Any]):
        super().__init__(values)
        self.file = file
        self._unread = dict.fromkeys(values)  # a set that keeps the file's order

    def __contains__(self, key: object) -> bool:
        return key in self.data or any(name.startswith((f"{key}.", f"{key}/")) for name in self)

    def __getitem__(self, key: str) -> Any:
        if key in self.data:
            self._unread.pop(key, None)
            return self.data[key]
        names = [name for name in self if name.startswith((f"{key}.", f"{key}/"))]
        if not names:
            raise KeyError(f"{key} is missing")
        return {name[len(key) + 1 :]: self[name] for name in names}

    def unread(self) -> list[Row]:
        """A miss for each key that no comparison has read."""
        return [miss(self.file, key) for key in self._unread]

    def compare(
        self, what: str, ours: Any, theirs: Any, tolerance: float = 0.0, relative: bool = False
    ) -> Row:
        """A row for two values, or for two lists or dicts of them.

        With a tolerance, values are arrays and the difference is the largest distance; without one
        it is how many values differ.
        """
        pairs = _pair_up(ours, theirs)
        if tolerance:
            off = {key: _distance(a, b, relative) for key, (a, b) in pairs.items()}
            compared, difference = sum(np.size(b) for _, b in pairs.values()), max(off.values())
        else:
            off = {key: float(a != b) for key, (a, b) in pairs.items()}
            compared, difference = len(pairs), sum(off.values())
        if not compared:
            return miss(self.file, what, "no values in it")
        note = "relative" if relative else ""
        if difference > tolerance:
            worst = max(off, key=lambda key: off[key])
            got, reference = map(_short, pairs[worst])
            note = f"{worst}: got {got}, reference {reference}".removeprefix(": ")
        return Row(self.file, what, compared, difference, tolerance, note)


def miss(file: str, what: str, reason: str = "") -> Row:
    """A row for what is in the file and was not compared."""
    note = f"not able to compare: {reason}" if reason else "not able to compare"
    return Row(file, what, 0, math.inf, 0.0, note)


def collect(file: str, what: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come; numbers that do not fit together are a miss, not a crash."""
    try:
        yield from rows
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = str(error.args[0] if error.args else error) or type(error).__name__
        yield miss(file, what, reason.strip().partition("\n")[0])


def read(path: Path) -> Reference:
    """An .npz of plain arrays, never unpickled; or a JSON object, nested ones by dotted keys."""
    if path.suffix == ".json":
        content = read_json(path, "a folder of reference numbers holds it")
        if not isinstance(content, dict):
            raise UserError(f"{path} got a {type(content).__name__}, expected an object")
        return Reference(path.name, dotted(content))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Reference(path.name, dict(arrays))
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of plain arrays ({error}); make it anew") from None


def dotted(content: dict, prefix: str = "") -> dict[str, Any]:
    """One dict for nested ones; lists stay whole."""
    flat = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and value
        flat |= dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _pair_up(ours: Any, theirs: Any) -> dict[Any, tuple[Any, Any]]:
    if isinstance(ours, list) and isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return {key: (ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in ours | theirs}
    return {"": (ours, theirs)}


def _distance(ours: Any, theirs: Any, relative: bool) -> float:
    """The largest one; infinite for other shapes and where one side alone is nan."""
    if ours is ABSENT or theirs is ABSENT or np.shape(ours) != np.shape(theirs):
        return math.inf
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    off = np.where(np.isnan(ours) & np.isnan(theirs), 0, np.abs(ours - theirs))
    if relative:
        off = np.where(off > RELATIVE_FLOOR, off / np.maximum(np.abs(theirs), RELATIVE_FLOOR), 0)
    return float(np.nan_to_num(np.max(off, initial=0.0), nan=math.inf))


def _short(value: Any) -> str:
    shown = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
