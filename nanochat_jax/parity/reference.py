"""A file of reference numbers that remembers what has been compared, and rows of closeness.

Whatever a comparison takes out is crossed off; what is left in the end was not compared, and is
reported as such (`Reference.leftovers`). Nothing here knows what the numbers mean.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.common import UserError, read_json
from nanochat_jax.parity.rows import Row, not_comparable

COUNTLESS = "no values in it"


class Reference:
    """{key: value} of one file; `take` crosses a key off, a key that is not there is a KeyError."""

    def __init__(self, file: str, values: Mapping[str, Any]):
        self.file = file
        self._values = dict(values)
        self._left = dict.fromkeys(values)  # a set that keeps the file's order

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> list[str]:
        return list(self._values)

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

    def leftovers(self) -> list[Row]:
        return [not_comparable(self.file, key) for key in self._left]


def read_arrays(path: Path) -> Reference:
    """An .npz, without unpickling anything."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Reference(path.name, dict(arrays))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a folder of reference numbers holds it") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of plain arrays ({error}); make it anew") from None


def read_settings(path: Path) -> Reference:
    """A JSON object, nested ones under dotted keys; lists stay whole."""
    content = read_json(path, "a folder of reference numbers holds it")
    if not isinstance(content, dict):
        raise UserError(f"{path} got a {type(content).__name__}, expected an object")
    return Reference(path.name, dotted(content))


def dotted(content: dict, prefix: str = "") -> dict[str, Any]:
    """One dict for nested ones."""
    flat = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and value
        flat |= dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def close_row(
    file: str, what: str, ours: Any, reference: Any, tolerance: float, relative: bool = False
) -> Row:
    """The largest absolute (or relative) difference between arrays, or dicts of arrays."""
    pairs = _pair_up(ours, reference)
    differences = {key: _difference(a, b, relative) for key, (a, b) in pairs.items()}
    compared = sum(np.size(b) for _, b in pairs.values())
    if not compared:
        return not_comparable(file, what, COUNTLESS)
    # nan sorts as the largest: it must never hide behind a number.
    worst = max(
        differences, key=lambda k: math.inf if math.isnan(differences[k]) else differences[k]
    )
    row = Row(file, what, compared, differences[worst], tolerance, "relative" if relative else "")
    return row if row.ok else row._replace(note=_where(worst, *pairs[worst]))


def exact_row(file: str, what: str, ours: Any, reference: Any) -> Row:
    """How many values differ, where all must be the same; both lists, dicts or plain values."""
    pairs = _pair_up(ours, reference)
    unequal = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not pairs:
        return not_comparable(file, what, COUNTLESS)
    note = ""
    if unequal:
        key, (a, b) = next(iter(unequal.items()))
        note = f"{key + ': ' if key else ''}got {a!r}, reference {b!r}"
    return Row(file, what, len(pairs), float(len(unequal)), 0.0, note)


def guarded(file: str, what: str, compare: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a comparison; numbers that do not fit together are a miss, not a crash."""
    try:
        return list(compare())
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        return [not_comparable(file, what, reason.strip().partition("\n")[0])]


def _pair_up(ours: Any, reference: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(reference, list) and isinstance(ours, list):
        ours, reference = (
            {str(i): v for i, v in enumerate(values)} for values in (ours, reference)
        )
    if isinstance(reference, dict):
        return {key: (ours.get(key), reference.get(key)) for key in ours | reference}
    return {"": (ours, reference)}


def _difference(ours: Any, reference: Any, relative: bool) -> float:
    if ours is None or reference is None or np.shape(ours) != np.shape(reference):
        return math.inf
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    difference = np.abs(ours - reference)
    if relative:
        # Below this floor two numbers are the same: 2e-16 is a rounded 0.
        difference = np.where(
            difference <= 1e-12, 0, difference / np.maximum(np.abs(reference), 1e-12)
        )
    return float(np.max(difference, initial=0.0))


def _where(key: str, ours: Any, reference: Any) -> str:
    if ours is None or reference is None:
        return f"{key} is only in {'the reference' if ours is None else 'our model'}"
    if np.shape(ours) != np.shape(reference):
        return f"{key} shape {np.shape(ours)}, reference {np.shape(reference)}".strip()
    return f"largest in {key}" if key else ""
