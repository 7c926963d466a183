"""Where the time of a training step goes: a short trace, and its kernels by total time.

The table is of device work alone: on a GPU what its streams ran, on a CPU XLA's operations, each
less what ran inside it. Names that differ in a trailing number only are one: "fusion.12" is the
twelfth of its kind.
"""

import gzip
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nanochat_jax import bench
from nanochat_jax.common import log

STEPS = 2
# For ui.perfetto.dev, and for xprof: that one holds every program of the process, too.
KEPT = ("perfetto_trace.json.gz", ".xplane.pb")
MAX_BYTES = 15 * 2**20  # of the archive: what is borrowed may bring back no larger files


class Kernel(NamedTuple):
    name: str
    calls: int
    ms: float
    share: float  # of all kernels' time


def trace(step: Callable[[], Any], folder: Path) -> Path:
    """Trace STEPS whole steps; returns the file that top_kernels reads."""
    jax.block_until_ready(step())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would crowd out what matters
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    for _ in range(STEPS):
        result = step()
    jax.block_until_ready(result)
    jax.profiler.stop_trace()
    (file,) = folder.rglob("perfetto_trace.json.gz")
    return file


def top_kernels(file: Path) -> list[Kernel]:
    """All kernels of a trace, those that took most first."""
    with gzip.open(file) as text:
        events = json.load(text)["traceEvents"]
    process, thread, calls, micros = {}, {}, Counter(), Counter()
    for event in events:
        if event.get("name") == "process_name":
            process[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            thread[event["pid"], event["tid"]] = event["args"]["name"]
    has_gpu = any(name.startswith("/device:GPU") for name in process.values())
    lanes: dict[tuple, list[dict]] = {}
    for event in events:
        if event.get("ph") == "X":
            lane = event["pid"], event["tid"]
            on_stream = thread.get(lane, "").startswith("Stream")
            if on_stream if has_gpu else "hlo_op" in event.get("args", {}):
                lanes.setdefault(lane, []).append(event)
    for lane in lanes.values():
        around: list[tuple[float, str]] = []  # (end, name) of what the next one may be inside of
        for event in sorted(lane, key=lambda e: (e["ts"], -e["dur"])):
            name = re.sub(r"[._]\d+$", "", event["name"])
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                micros[around[-1][1]] -= event["dur"]
            around.append((event["ts"] + event["dur"], name))
            calls[name] += 1
            micros[name] += event["dur"]
    assert calls, f"the trace has no kernels; its threads are {sorted(set(thread.values()))}"
    total = sum(micros.values())
    return [Kernel(n, calls[n], us / 1e3, us / total) for n, us in micros.most_common()]


def table(kernels: list[Kernel], most: int = 15) -> str:
    """The first of them, for people."""
    rows = [(k.name[:80], f"{k.calls:,}", f"{k.ms:,.2f}", f"{k.share:.1%}") for k in kernels[:most]]
    all_of_them = sum(k.ms for k in kernels)
    rows.append(("all", f"{sum(k.calls for k in kernels):,}", f"{all_of_them:,.2f}", "100.0%"))
    return bench.table((f"kernel, in {STEPS} steps", "calls", "ms", "share"), rows)


def archive(folder: Path, file: Path) -> None:
    """A trace as one .tar.gz of all KEPT, or of the first alone if that were too large."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for kept in (KEPT, KEPT[:1]):
        with tarfile.open(file, "w:gz") as tar:
            for path in sorted(folder.rglob("*")):
                if path.name.endswith(kept):
                    tar.add(path, path.relative_to(folder))
        if file.stat().st_size <= MAX_BYTES:
            return
    log(f"{file} has {file.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
