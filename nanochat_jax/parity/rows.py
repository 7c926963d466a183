"""One line of the parity table."""

import math
from typing import NamedTuple


class Row(NamedTuple):
    """What of which file was compared, in how many values, and how far apart they are at most.

    Where a comparison is exact, the tolerance is 0 and the difference is how many values differ.
    """

    file: str
    what: str
    compared: int
    difference: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


def not_comparable(file: str, what: str, reason: str = "") -> Row:
    """A miss: something is there that no comparison covers, or that none understands."""
    note = f"not able to compare: {reason}" if reason else "not able to compare"
    return Row(file, what, 0, math.inf, 0.0, note)
