"""What a program compiled for a GPU does, read from its text (HLO, as XLA prints it).

  kernels   instructions of the schedule that are no mere change of name, by kind
  bytes     what each must read and write: of a slice what is taken out, of an update what is put in
  sent      by collectives, as it crosses a GPU's links, and the seconds of kernels meanwhile
  stops     loops of unknown length and conditionals: at each the host waits for the GPU

Loops count as often as the compiler says that they run, those of unknown length once; of the
branches of a conditional the longest counts. Seconds are a roofline: no kernel is faster than its
products or its bytes allow, at the shares of the GPU's peak below. Sending takes none. They compare
two programs; they do not foretell a speed.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)}
# Of the bfloat16 peak or of the bandwidth: round figures of good kernels on an H100.
PRODUCTS, ATTENTION, ATTENTION_BACKWARD, BANDWIDTH = 0.67, 0.55, 0.45, 0.85
SPEED = {"f8e4m3fn": 2.0, "f8e5m2": 2.0, "f32": 1 / 16}  # of products, against bfloat16
LAUNCH_SECS = 2e-6  # a kernel takes no less
RATES = (
    f"products at {PRODUCTS:.0%} of the peak, attention at {ATTENTION:.0%}, backwards "
    f"{ATTENTION_BACKWARD:.0%}, bytes at {BANDWIDTH:.0%} of the bandwidth, "
    f"{1e6 * LAUNCH_SECS:.0f} us a kernel; sending left out"
)
NO_KERNEL = set(
    "parameter constant tuple get-tuple-element bitcast after-all iota partition-id replica-id "
    "add-dependency opt-barrier domain".split()
)
TAKES = ("slice", "dynamic-slice", "gather")  # a part of their first argument
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # in place; which argument is what is put in
KINDS = {  # what else a kernel is called, by the first of these in it
    "sort": "sorts",
    "scatter": "scatters",
    "reduce": "sums and maxima",
    "transpose": "transpositions",
    "copy": "copies",
    "gather": "look-ups",
    "dynamic-update-slice": "updates in place",
}
COLLECTIVE = re.compile("all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")
SHAPE = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
SCRATCH = re.compile(r"[su]8\[\d+\]\S*\)$")  # working memory of a library, last in its results
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    args: list[str]
    rest: str  # of its line, from the arguments on

    def attribute(self, key: str) -> str:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    def trips(self) -> int | None:
        """How often a loop runs, if that is known."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.rest)
        return int(found[1]) if found else None


Part = Mapping[str, Instruction]


@dataclass
class Work:
    """What a program, or a part of it, does in one call."""

    kernels: Counter = field(default_factory=Counter)  # by kind
    bytes: Counter = field(default_factory=Counter)
    secs: dict = field(default_factory=lambda: defaultdict(float))
    collectives: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)  # bytes, by kind of collective
    beside: dict = field(default_factory=lambda: defaultdict(float))  # seconds of kernels meanwhile
    stops: Counter = field(default_factory=Counter)  # while, conditional


def size(shape: str) -> int:
    """Bytes of a shape, or of a tuple of them."""
    return sum(BITS[kind] * math.prod(dims) for kind, dims in arrays(shape)) // 8


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """dtype and sizes of the arrays of a shape."""
    return [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in SHAPE.findall(shape)]


class Program:
    def __init__(self, text: str, *, peak_flops: float, bandwidth: float):
        self.peak_flops, self.bandwidth = peak_flops, bandwidth
        self.entry, self.parts = "", {}
        part: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if (head := HEAD.match(line)) and not line.startswith("HloModule"):
                part = self.parts.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif found := LINE.match(line):
                name, shape, op, rest = found.groups()
                args = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                part[name] = Instruction(name, shape, op, args, rest)

    def work(self, part: str = "") -> Work:
        """Of the whole program, or of a part (the body of a loop)."""
        total = Work()
        self._add(self.parts[part or self.entry], 1, total)
        return total

    def loops(self, part: str = "") -> Iterator[tuple[str, int | None]]:
        """(body, how often it runs if known) of each loop that lies in no other."""
        for one in self.parts[part or self.entry].values():
            if one.op == "while":
                yield one.attribute("body"), one.trips()
            elif one.op == "call":
                yield from self.loops(one.attribute("to_apply"))

    def _add(self, part: Part, times: int, total: Work) -> None:
        started: dict[str, float] = {}  # collectives under way, and when
        for one in part.values():
            if one.op in NO_KERNEL or one.op.endswith("-update"):
                continue
            if one.op == "call":
                self._add(self.parts[one.attribute("to_apply")], times, total)
            elif one.op == "while":
                known = one.trips()
                total.stops["while"] += times * (known is None)
                self._add(self.parts[one.attribute("body")], times * (known or 1), total)
            elif one.op == "conditional":
                total.stops["conditional"] += times
                _, listed = one.rest.split("computation", 1)
                names = re.findall(r"%([\w.\-]+)", listed.split("metadata=")[0])
                branches = [self.parts[name] for name in names if name in self.parts]
                self._add(max(branches, key=len), times, total)
            elif found := COLLECTIVE.match(one.op):
                kind, now = found[0], sum(total.secs.values())
                if one.op.endswith("-done"):
                    one = part[one.args[0]]  # its start
                    is_beside = '"is_sync":true' not in one.rest
                    total.beside[kind] += is_beside * (now - started[one.name])
                    continue
                started[one.name] = now
                given = sum(size(part[arg].shape) for arg in one.args)
                made = size(one.shape) - given * one.op.endswith("-start")  # lists both
                total.collectives[kind] += times
                total.sent[kind] += times * max(given, made) * (2 if kind == "all-reduce" else 1)
            elif not one.op.endswith("-done"):
                self._add_kernel(one, part, times, total)

    def _add_kernel(self, one: Instruction, part: Part, times: int, total: Work) -> None:
        given = [part[arg].shape if arg in part else "" for arg in one.args]
        inner = self.parts.get(one.attribute("calls"), {})
        kind, secs = self._product(one, given, inner)
        if inner:
            moved = _moved_by_fusion(inner)
        elif one.op in TAKES:
            moved = 2 * size(one.shape)
        elif one.op in PUTS:
            moved = 2 * size(given[PUTS[one.op]])
        else:
            moved = sum(map(size, given)) + size(SCRATCH.sub("", one.shape))
        secs = max(secs, moved / (BANDWIDTH * self.bandwidth), LAUNCH_SECS)
        total.kernels[kind] += times
        total.bytes[kind] += times * moved
        total.secs[kind] += times * secs

    def _product(self, one: Instruction, given: list[str], inner: Part) -> tuple[str, float]:
        """(kind of a kernel, seconds of its products)."""
        found = re.search(r'custom_call_target="([^"]*)"', one.rest)
        target = found[1] if found else ""
        if dot := next((i for i in inner.values() if i.op == "dot"), None):
            return self._product(dot, [inner[arg].shape for arg in dot.args], {})
        if one.op == "dot" or "gemm" in target or "cublas" in target:
            (kind, left), (_, right), (_, out) = (arrays(s)[0] for s in (*given[:2], one.shape))
            batch = re.search(r'lhs_batch_dim\w*"?[:=][\[{]([^\]}]*)', one.rest)
            both = math.prod(left[int(i)] for i in re.findall(r"\d+", batch[1])) if batch else 1
            summed = math.sqrt(math.prod(left) * math.prod(right) / math.prod(out) / both)
            flops = 2 * math.prod(out) * summed
            return f"products {kind}", flops / (PRODUCTS * SPEED.get(kind, 1.0) * self.peak_flops)
        if "fmha" in target:
            backward, dims = "ackward" in target, arrays(given[0])[0][1]
            found, length = (
                re.search(r'sliding_window_length":"?\s*(\d+)', one.rest),
                max(dims[1:3]),
            )
            window = int(found[1]) if found and int(found[1]) else length
            pairs = window * (length - window / 2)  # of causal attention
            flops = 4 * math.prod(dims) / length * pairs * (2.5 if backward else 1)
            share = ATTENTION_BACKWARD if backward else ATTENTION
            kind = f"attention {'backward' if backward else 'forward'}"
            return kind, flops / (share * self.peak_flops)
        ops = {one.op, *(i.op for i in inner.values())}
        named = next((kind for op, kind in KINDS.items() if op in ops), "element by element")
        return target or named, 0.0


def _moved_by_fusion(inner: Part) -> int:
    """Bytes that a fused kernel reads and writes."""
    users: dict[str, list[Instruction]] = {}
    for one in inner.values():
        for arg in dict.fromkeys(one.args):
            users.setdefault(arg, []).append(one)

    def read(name: str, whole: int) -> int:
        sizes = 0
        for user in users.get(name, []):
            if user.op == "bitcast":
                sizes += read(user.name, whole)
            elif user.op in TAKES and user.args[0] == name:
                sizes += size(user.shape)
            elif user.op not in PUTS or user.args[0] != name:
                sizes += whole
        return min(sizes, whole)

    *_, last = inner.values()
    puts = [one for one in inner.values() if one.op in PUTS]
    written = size(last.shape) - sum(size(one.shape) for one in puts)
    written += sum(size(inner[one.args[PUTS[one.op]]].shape) for one in puts)
    given = [one for one in inner.values() if one.op == "parameter"]
    return max(written, 0) + sum(read(one.name, size(one.shape)) for one in given)
