"""Is this accelerator right, and how fast? Every check and benchmark in one run of minutes.

  python scripts/gpu_check.py --out=DIR               within 450 seconds
  python scripts/gpu_check.py --parts train decode    only parts whose names contain one of these

Parts come in order of worth, and each has a share of the time, compiling included: one that no
longer fits is skipped, and when the time is up in the middle of a part the table is printed as it
stands. Large training steps compile on other threads while the checks run. What is found is logged
at once and written to DIR/results.json after every part; without --out it is the last line. A part
that fails prints its traceback and hides no other; the exit status is then 1.

It ends with one table and a line of JSON. Of the columns
  of peak     FLOP/s over the data sheet's dense bfloat16 rate (products in fp8 alone: its fp8
              rate), or bytes/s over its bandwidth; for a training step that is MFU, in fp8 too
  of ceiling  the same over what this very card reached on large random operands
  of target   over the number in TARGETS; at least 100% is as hoped
The share of a step that Muon takes is of an optimizer step as long as upstream's, STEP_TOKENS.

Needs JAX, flax and optax, nothing that reads data. Without a GPU a tiny shape goes the same way.
"""

import argparse
import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import bench_attention
import bench_infer
import bench_loss
import bench_matmul
import bench_optim
import bench_train
import gpu_check_right as right
import jax

from nanochat_jax import bench, hardware
from nanochat_jax.common import UserError, log, run_main, write_json
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.runtime import available_bytes, compile_lowered, compiled_bytes, start_runtime

STEP_TOKENS = 524_288  # of upstream's optimizer step, over which Muon is spread
COMPILE_SECS = 150  # that measuring waits for the training steps at most


class Row(NamedTuple):
    """A line of the table."""

    what: str
    ms: float
    value: float
    unit: str
    work: float | None = None  # FLOP/s or bytes/s
    limit: str = ""  # what bounds it: "bf16", "fp8" or "copy"


class Target(NamedTuple):
    measure: str  # "of peak", "value" (at least) or "value at most"
    number: float
    source: str


_MODEL = (
    "matrix products at 720 TFLOP/s, attention at 450, 285 GB of other traffic at 4 TB/s: 58% at "
    "best on an H200; upstream reports 50%, and 59% in fp8 (its dev/LEADERBOARD.md)"
)
_BANDWIDTH = "35% of reading 561M bf16 weights a token at 4.8 TB/s"
_CACHE = "64 rows: weights once, 100 KB of cache a token and row; 27,000 at an H100's bandwidth"
TARGETS = {
    "train step d20 bf16": Target("of peak", 0.52, _MODEL),
    "train step d20 fp8": Target("of peak", 0.60, _MODEL),
    "train step gpt2 bf16": Target("of peak", 0.52, _MODEL),
    "train step gpt2 fp8": Target("of peak", 0.60, _MODEL),
    "attention d20 cudnn full": Target("value", 450, "FlashAttention 3's class (2407.08608)"),
    "decode d20, rows 1": Target("value", 1_500, _BANDWIDTH),
    "decode d20, rows 64": Target("value", 20_000, _CACHE),
    "prefill d20": Target("of peak", 0.45, "the products' rate without a backward pass"),
    "Muon d20": Target("value at most", 1.5, "0.8% of the step's FLOPs, at half of their rate"),
}


class Found:
    """What is known so far, and where it is kept."""

    def __init__(self, out: Path | None):
        device = jax.devices()[0]
        row = hardware.find_accelerator(device.device_kind) if device.platform == "gpu" else None
        self.peaks: dict[str, float] = {}
        if row:  # in fp8 the tensor cores of Ada, Hopper and Blackwell are twice as fast
            self.peaks = {"bf16": row.peak_flops, "fp8": 2 * row.peak_flops, "copy": row.bandwidth}
        self.out, self.rows = out, []
        self.ceilings: dict[str, float] = {}
        self.parts: dict[str, str] = {}  # name: how it ended
        self.results: dict[str, Any] = {}
        libraries = ("jax-cuda", "nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-nvcc")
        versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
        settings = ("XLA_", "JAX_", "NVIDIA_", "CUDA_", "NCCL_")
        self.machine = hardware.describe() | {
            "libraries": {n: v for n, v in versions.items() if n and n.startswith(libraries)},
            "environment": {k: v for k, v in os.environ.items() if k.startswith(settings)},
        }

    def judged(self) -> list[dict]:
        return [judge(row, self.peaks, self.ceilings) for row in self.rows]

    def as_json(self) -> dict:
        return {
            "bench": "gpu_check",
            "failed": [name for name, end in self.parts.items() if end == "FAILED"],
            "parts": self.parts,
            "rows": self.judged(),
            "ceilings": self.ceilings,
            "peaks": self.peaks,
            "results": self.results,
            "machine": self.machine,
        }

    def save(self) -> None:
        if self.out:
            write_json(self.out / "results.json", self.as_json())

    def show(self) -> None:
        """The table, what did not end well, and the last line."""
        cells = [
            (
                r["what"],
                bench.number(r["ms"] or None, "{:,.2f}"),
                bench.number(r["value"], "{:,.4g}" if r["value"] < 1e3 else "{:,.0f}"),
                r["unit"],
                *(bench.number(r[key], "{:.1%}") for key in ("of peak", "of ceiling")),
                r["target"],
                bench.number(r["of target"], "{:.0%}"),
            )
            for r in self.judged()
        ]
        header = ("what", "ms", "achieved", "", "of peak", "of ceiling", "target", "of target")
        log(bench.table(header, cells))
        for name, end in self.parts.items():
            if end != "ok":
                log(f"{name}: {end}")
        whole = self.as_json()
        log(json.dumps(whole if self.out is None else {k: whole[k] for k in ("bench", "failed")}))


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
        wanted, ratio = f"{target.number:,} {row.unit}", row.value / target.number
    else:
        wanted, ratio = f"at most {target.number} {row.unit}", target.number / row.value
    return judged | {"target": wanted, "of target": ratio, "source": target.source}


class Part(NamedTuple):
    name: str
    needs_secs: float  # at most, on one H200
    run: Callable[[], tuple[list[Row], Any]]  # rows of the table, and all else that was found
    possible: bool = True


def run_parts(parts: list[Part], found: Found, stop: float) -> None:
    """Run those that fit until `stop`, on time.monotonic's clock; what one raises is its end."""
    for part in parts:
        left = stop - time.monotonic()
        if not part.possible:
            found.parts[part.name] = "skipped: needs a GPU that can"
        elif part.needs_secs > left:
            found.parts[part.name] = f"skipped: needs {part.needs_secs:.0f} s, {left:.0f} are left"
        else:
            began = time.monotonic()
            found.parts[part.name] = "the time was up in the middle of it"
            found.save()
            try:
                rows, found.results[part.name] = part.run()
                found.rows += rows
                found.parts[part.name] = "ok"
            except Exception:
                traceback.print_exc()
                found.parts[part.name] = "FAILED"
            log(f"{part.name}: {found.parts[part.name]} ({time.monotonic() - began:.1f} s)")
            log(f"  {found.results.get(part.name)}")
            gc.collect()  # what it held on the device
        found.save()


def make_parts(found: Found, secs: float, pool: ThreadPoolExecutor) -> list[Part]:
    """Every part in order of worth; `secs` of measuring in each that measures."""
    gpu = jax.default_backend() == "gpu"
    in_fp8, shape, plain = multiplies_in_fp8(), *(("d20", "bf16") if gpu else ("tiny", "float32"))
    shapes: dict[str, bench.Shape] = {}  # as trained here: "d20 bf16"
    compiling: dict[str, Future] = {}

    def start(name: str):
        """Choose the attention and begin to compile the training steps."""
        base = bench.get_shape(name)
        base = replace(base, model=check_attention(base.model, "auto"))
        shapes[f"{name} {plain}"] = base
        if in_fp8:
            shapes[f"{name} fp8"] = bench_train.with_options(base, in_fp8=True)
        for label in [label for label in shapes if label not in compiling]:
            compiling[label] = pool.submit(compile_lowered, bench_train.lower_step(shapes[label]))
        return [], {"attention": base.model.attention_backend}

    def compiled():
        began = time.monotonic()
        done, late = wait(compiling.values(), timeout=COMPILE_SECS)
        waited = f"{time.monotonic() - began:.1f} s"
        return [], {"done": len(done), "late": len(late), "waited": waited}

    def ceilings():
        found.ceilings = bench_matmul.ceilings(secs)
        rows = [
            Row(f"ceiling {kind}", 0.0, rate / 1e12, unit, rate, kind)
            for kind, rate in found.ceilings.items()
            for unit in ["TB/s" if kind == "copy" else "TFLOP/s"]
        ]
        return rows, found.ceilings

    def train(name: str, kind: str):
        label = f"{name} {kind}"
        if label not in compiling:
            start(name)
        ours, step = shapes[label], compiling[label].result()
        while compiled_bytes(step) > available_bytes(bench.one_device()) and ours.rows > 1:
            ours = replace(ours, rows=ours.rows // 2)
            step = compile_lowered(bench_train.lower_step(ours))
        r = bench_train.run(ours, secs, rivals=False, compiled=step)
        text = step.as_text()
        r["kernels"] = {name: text.count(f'"__{name}"') for name in PRODUCTS}
        flops = bench_train.train_flops_per_token(ours.model) * r["tokens_per_sec"]
        row = Row(f"train step {label}", r["ms"]["ours"], r["tokens_per_sec"], "tok/s", flops)
        return [row._replace(limit="bf16")], r

    def attention():
        r = bench_attention.run(shape, secs, rivals=False)
        rows = [
            Row(f"attention {shape} {key} {label}", ms, rate, "TFLOP/s", rate * 1e12, "bf16")
            for label, numbers in r["windows"].items()
            for key, ms in numbers["ms"].items()
            for rate in [numbers["tflops"][key]]
        ]
        return rows, r

    def inference():
        backend = found.results.get(f"start {shape}", {"attention": "auto"})["attention"]
        r = bench_infer.run(shape, secs, [1, 64], rivals=False, attention=backend)
        rows = [
            Row(
                f"decode {shape}, rows {one['rows']}",
                one["ms_per_token"],
                one["decode_tokens_per_sec"],
                "tok/s",
                one["bandwidth"],
                "copy",
            )
            for one in r["results"]
        ]
        p = r["prefill"]
        flops = p["tflops"] * 1e12
        rows.append(Row(f"prefill {shape}", p["ms"], p["tokens_per_sec"], "tok/s", flops, "bf16"))
        return rows, r

    def optimizer():
        r = bench_optim.run(shape, secs)
        muon, both = r["ms"]["muon"], r["ms"]["both"]
        work = r["muon_tflops"] * 1e12
        rows = [Row(f"optimizer {shape}", both, both, "ms")]
        step = found.results.get(f"train step {shape} {plain}")
        if step:  # its batch over and over, one update at the end
            times = STEP_TOKENS / bench.get_shape(shape).tokens
            whole = times * (step["ms"]["ours"] - both) + both
            share = 100 * muon / whole
            rows.append(Row(f"Muon {shape}", muon, share, "% of a step", work, "bf16"))
        return rows, r

    def loss():
        r = bench_loss.run(shape, [bench.get_shape(shape).tile_tokens], secs, rivals=False)
        rows = [
            Row(f"loss {shape}, {key}", ms, rate, "TFLOP/s", rate * 1e12, "bf16")
            for key, ms in r["ms"].items()
            for rate in [r["tflops"][key]]
        ]
        return rows, r

    def matmuls():
        r = bench_matmul.run(shape, secs)
        rows = [
            Row(
                f"{p['what']} {'x'.join(str(n) for n in p['size'])} {form} {kind}",
                p["ms"][kind][form],
                rate,
                "TFLOP/s",
                rate * 1e12,
                kind,
            )
            for p in r["products"]
            for kind in p["tflops"]
            for form, rate in p["tflops"][kind].items()
        ]
        return rows, r

    def check(name: str, needs: float, function: Callable[[], dict]) -> Part:
        return Part(f"right: {name}", needs, lambda: ([], function()))

    return [
        Part(f"start {shape}", 60, lambda: start(shape)),
        Part("start gpt2", 60, lambda: start("gpt2"), gpu),
        check("attention", 30, right.check_attention),
        check("tiled loss", 10, right.check_loss),
        check("bf16 and fp8 losses", 45, lambda: right.check_dtypes(in_fp8)),
        check("decoding, classic", 30, lambda: right.check_decoding({})),
        check("decoding, modern", 30, lambda: right.check_decoding(right.MODERN)),
        Part("compiling", 30, compiled),
        Part("ceilings", 20, ceilings),
        Part(f"train step {shape} {plain}", 40, lambda: train(shape, plain)),
        Part(f"train step {shape} fp8", 30, lambda: train(shape, "fp8"), in_fp8),
        Part("attention", 30, attention),
        Part(f"train step gpt2 {plain}", 40, lambda: train("gpt2", plain), gpu),
        Part("decode and prefill", 80, inference),
        Part("train step gpt2 fp8", 30, lambda: train("gpt2", "fp8"), gpu and in_fp8),
        Part("optimizer", 30, optimizer),
        Part("loss", 15, loss),
        Part("matmuls", 45, matmuls),
    ]


def multiplies_in_fp8() -> bool:
    """Whether this device does; a CPU computes the same slowly."""
    device = jax.devices()[0]
    try:
        if device.platform != "cpu":
            hardware.check_fp8(device, "bfloat16")
    except UserError:
        return False
    return True


# How XLA's text names the libraries' products: in fp8, and in other types.
PRODUCTS = ("cublas$lt$matmul$f8", "cublas$lt$matmul", "cublas$gemm")


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds, for everything")
    parser.add_argument("--secs", type=float, default=6.0, help="of measuring, in each part")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--parts", nargs="+", help="only those whose names contain one of these")
    args = parser.parse_args()
    # The card is ours alone, and a step at the recipe's batch needs most of it. JAX refuses two
    # fractions, one by its older name.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    start_runtime(compile_cache=True)
    found = Found(args.out)
    log(json.dumps(found.machine))

    def time_is_up() -> None:
        found.save()
        found.show()
        os._exit(1)

    watch = threading.Timer(max(0.0, began + args.budget - time.monotonic()), time_is_up)
    watch.daemon = True
    watch.start()
    parts = make_parts(found, args.secs, ThreadPoolExecutor())
    run_parts([p for p in parts if chosen(p.name, args.parts)], found, began + args.budget)
    watch.cancel()
    found.show()
    os._exit("FAILED" in found.parts.values())  # not to wait for what may still be compiling


def chosen(name: str, patterns: list[str] | None) -> bool:
    """Whether a part is wanted; the ceilings, to which others are compared, always are."""
    return not patterns or name == "ceilings" or any(pattern in name for pattern in patterns)


if __name__ == "__main__":
    run_main(main)
