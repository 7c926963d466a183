"""A file of reference numbers that remembers what was compared, and how a comparison went.

Whatever a comparison takes out is crossed off; what is left in the end was not compared, and is
reported as a miss (`Reference.leftovers`). Nothing here knows what the numbers mean.
"""

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.common import UserError, read_json

ABSENT = "nothing"  # in a note, for a key that one side does not have
RELATIVE_FLOOR = 1e-12  # below it two numbers are relatively the same: 2e-16 is a rounded 0


class Comparison(NamedTuple):
    """A line of the table; where a comparison is exact, the tolerance is 0."""

    file: str
    what: str
    compared: int  # values
    difference: float  # the largest, or how many values differ
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


class Reference:
    """{key: value} of one file; `take` crosses a key off, a key that is not there is a KeyError."""

    def __init__(self, file: str, values: Mapping[str, Any]):
        self.file = file
        self._values = dict(values)
        self._left = dict.fromkeys(values)  # a set that keeps the file's order

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def take(self, key: str) -> Any:
        if key not in self._values:
            raise KeyError(f"{key} is missing")
        self._left.pop(key, None)
        return self._values[key]

    def under(self, prefix: str) -> dict[str, Any]:
        """{rest of the key: value} of all keys that begin with `prefix`; at least one."""
        keys = [key for key in self._values if key.startswith(prefix)]
        if not keys:
            raise KeyError(f"{prefix}* is missing")
        return {key.removeprefix(prefix): self.take(key) for key in keys}

    def matching(self, pattern: str) -> list[re.Match]:
        """The keys that fit as a whole, without crossing them off."""
        return [match for key in self._values if (match := re.fullmatch(pattern, key))]

    def leftovers(self) -> list[Comparison]:
        return [miss(self.file, key) for key in self._left]

    def compare(
        self, what: str, ours: Any, theirs: Any, tolerance: float = 0.0, relative: bool = False
    ) -> Comparison:
        """Of plain values, or lists or dicts of them; with a tolerance, of arrays or dicts of them.

        The difference is the largest distance, without a tolerance how many values differ.
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
        return Comparison(self.file, what, compared, difference, tolerance, note)


def miss(file: str, what: str, reason: str = "") -> Comparison:
    """Something is there that no comparison covers, or that none understands."""
    note = f"not able to compare: {reason}" if reason else "not able to compare"
    return Comparison(file, what, 0, math.inf, 0.0, note)


def collect(file: str, what: str, rows: Iterable[Comparison]) -> Iterator[Comparison]:
    """The rows as they come; numbers that do not fit together are a miss, not a crash."""
    try:
        yield from rows
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = str(error.args[0] if error.args else error) or type(error).__name__
        yield miss(file, what, reason.strip().partition("\n")[0])


def read(path: Path) -> Reference:
    """An .npz, without unpickling anything; or a JSON object, nested ones under dotted keys."""
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
    if ours is ABSENT or theirs is ABSENT or np.shape(ours) != np.shape(theirs):
        return math.inf
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    distance = np.abs(ours - theirs)
    if relative:
        scaled = distance / np.maximum(np.abs(theirs), RELATIVE_FLOOR)
        distance = np.where(distance <= RELATIVE_FLOOR, 0, scaled)
    largest = float(np.max(distance, initial=0.0))
    return math.inf if math.isnan(largest) else largest


def _short(value: Any) -> str:
    shown = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
