"""What gpu_check.py hopes for: targets of the numbers that decide, and the ratios of a row."""

from typing import NamedTuple


class Row(NamedTuple):
    """A line of the table."""

    what: str
    ms: float | None
    value: float | None
    unit: str
    work: float | None = None  # FLOP/s or bytes/s
    limit: str = ""  # what bounds it: "bf16", "fp8" or "copy"
    detail: str = ""
    disturbed: bool = False  # by what was still compiling


class Target(NamedTuple):
    measure: str  # "of peak", "value" (at least) or "value at most"
    number: float
    source: str


_MODEL = (
    "matrix products at 720 TFLOP/s, attention at 400, 285 GB of other traffic at 4 TB/s: 58% at "
    "best on an H200; upstream reports 50%, and 59% in fp8 (its dev/LEADERBOARD.md)"
)
_ATTENTION = "rows of 2,048, both ways; FlashAttention 3's best (2407.08608) needs longer rows"
_BANDWIDTH = "35% of reading 561M bf16 weights a token at 4.8 TB/s"
_CACHE = "64 rows: weights once, 100 KB of cache a token and row; 27,000 at an H100's bandwidth"
TARGETS = {
    "train step d20 bf16": Target("of peak", 0.52, _MODEL),
    "train step d20 fp8": Target("of peak", 0.60, _MODEL),
    "train step gpt2 bf16": Target("of peak", 0.52, _MODEL),
    "train step gpt2 fp8": Target("of peak", 0.60, _MODEL),
    "attention d20 cudnn full": Target("value", 400, _ATTENTION),
    "decode d20, rows 1": Target("value", 1_500, _BANDWIDTH),
    "decode d20, rows 64": Target("value", 20_000, _CACHE),
    "prefill d20": Target("of peak", 0.45, "the products' rate without a backward pass"),
    "Muon d20": Target("value at most", 1.5, "0.8% of the step's FLOPs, at half of their rate"),
}


def judge(row: Row, peaks: dict[str, float], ceilings: dict[str, float]) -> dict:
    """The row with its ratios; None where there is nothing to divide by."""
    of_peak, of_ceiling = (
        row.work / limits[row.limit] if row.work and row.limit in limits else None
        for limits in (peaks, ceilings)
    )
    judged = row._asdict() | {"of peak": of_peak, "of ceiling": of_ceiling}
    target = TARGETS.get(row.what)
    if target is None:
        return judged | {"target": "", "of target": None}
    if target.measure == "of peak":
        wanted, ratio = f"{target.number:.0%} of peak", of_peak and of_peak / target.number
    elif target.measure == "value":
        wanted, ratio = f"{target.number:,} {row.unit}", row.value and row.value / target.number
    else:
        wanted = f"at most {target.number} {row.unit}"
        ratio = row.value and target.number / row.value
    return judged | {"target": wanted, "of target": ratio, "source": target.source}
