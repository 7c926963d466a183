"""Is this accelerator right, and how fast? Every check and benchmark in one run of minutes.

  python scripts/gpu_check.py --out=DIR               within 450 seconds
  python scripts/gpu_check.py --parts train decode    only parts whose names contain one of these

Parts come in order of worth, and each has a share of the time: one that no longer fits is skipped,
and when the time is up in the middle of a part the table is printed as it stands. Training steps
and the engine compile on other threads while the checks run; a part whose compilation is late lets
the next ones go first. A part that fails prints its traceback and hides no other; the exit status
is then 1. What is found is logged at once. DIR gets, after every part, results.json with all of it;
the training steps as XLA compiled them, *.hlo.gz; and a trace of two steps, trace.tar.gz, whose
kernels the output lists by time.

It ends with one table and a short line of JSON. Of the columns
  of peak     FLOP/s over the data sheet's dense bfloat16 rate (products in fp8 alone: its fp8
              rate), or bytes/s over its bandwidth; for a training step that is MFU, in fp8 too
  of ceiling  the same over what this very card reached on large random operands
  of target   over the number in gpu_check_targets.py; at least 100% is as hoped

Needs JAX, flax and optax, nothing that reads data. Without a GPU a tiny shape goes the same way.
"""

import argparse
import gc
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import bench_attention
import bench_infer
import bench_loss
import bench_matmul
import bench_optim
import gpu_check_right as right
import gpu_check_trace as tracing
import jax
from bench_train import Steps
from gpu_check_targets import Row, judge
from gpu_check_train import NO_TRITON, Training

from nanochat_jax import bench, hardware
from nanochat_jax.common import UserError, log, run_main, write_json
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model.accounting import train_flops_per_token

COMPILE_SECS = 60  # that measuring waits, at most, until nothing compiles
COMPILERS = 4  # programs at once; more would make the first ones wait
DECODE_ROWS = [1, 64]
# The others are in results.json only.
SHOWN_PRODUCTS = {"mlp up": ("y", "dx", "dw"), "head, a tile": ("y",)}
LEGEND = """\
how: microbatches x rows x their tokens; calls in the program: of fp8 and other products by cuBLAS,
  attention by cuDNN, products by Triton
products: y = x w, dx = dy w', dw = x' dy, of [M, K] and [K, N] as MxKxN
* measured while other programs were still being compiled: may be too slow"""


class Found:
    """What is known so far, and where it is kept; all ends at `stop`, on time.monotonic's clock."""

    def __init__(self, out: Path | None, stop: float):
        device = jax.devices()[0]
        row = hardware.find_accelerator(device.device_kind) if device.platform == "gpu" else None
        self.peaks: dict[str, float] = {}
        if row:  # in fp8 the tensor cores of Ada, Hopper and Blackwell are twice as fast
            self.peaks = {"bf16": row.peak_flops, "fp8": 2 * row.peak_flops, "copy": row.bandwidth}
        self.out, self.stop, self.rows = out, stop, []
        self.compiling: dict[str, Future] = {}  # on other threads
        self.kernels = ""  # the table of a trace
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

    def left(self) -> float:
        return self.stop - time.monotonic()

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
        """What a person reads: kernels, what passed and what did not, the table; then a line."""
        if self.kernels:
            log(self.kernels + "\n")
        for name, end in self.parts.items():
            if name.startswith("right: ") and end == "ok":
                differences = self.results[name]
                log(f"{name}: ok, differs by {max(differences.values()):.1e} at most")
            elif end != "ok":
                log(f"{name}: {end}")
        cells = [
            (
                r["what"] + (" *" if r["disturbed"] else ""),
                bench.number(r["ms"], "{:,.2f}"),
                bench.number(r["value"], "{:,.4g}" if (r["value"] or 0) < 1e3 else "{:,.0f}"),
                r["unit"],
                *(bench.number(r[key], "{:.1%}") for key in ("of peak", "of ceiling")),
                r["target"],
                bench.number(r["of target"], "{:.0%}"),
                r["detail"],
            )
            for r in self.judged()
        ]
        cells = [tuple("" if cell == "n/a" else cell for cell in row) for row in cells]
        ratios = ("of peak", "of ceiling", "target", "of target")
        log("\n" + bench.table(("what", "ms", "achieved", "unit", *ratios, "how"), cells))
        log(LEGEND)
        log(json.dumps({key: self.as_json()[key] for key in ("bench", "failed")}))


class Part(NamedTuple):
    name: str
    needs_secs: float  # at most, on one H200
    run: Callable[[], tuple[list[Row], Any]]  # rows of the table, and all else that was found
    possible: bool = True
    awaits: str = ""  # what it needs of found.compiling


def run_parts(parts: list[Part], found: Found) -> None:
    """Run those that fit, the first whose compilation is done; what one raises is its end."""
    waiting = list(parts)
    while waiting:
        late = {name for name, future in found.compiling.items() if not future.done()}
        part = next((part for part in waiting if part.awaits not in late), waiting[0])
        waiting.remove(part)
        left = found.left()
        if not part.possible:
            found.parts[part.name] = "skipped: not for this device"
        elif part.needs_secs > left:
            found.parts[part.name] = f"skipped: needs {part.needs_secs:.0f} s, {left:.0f} are left"
        else:
            began = time.monotonic()
            found.parts[part.name] = "the time was up in the middle of it"
            found.save()
            try:
                rows, found.results[part.name] = part.run()
                disturbed = bool(late - {part.awaits})
                found.rows += [row._replace(disturbed=disturbed) for row in rows]
                found.parts[part.name] = "ok"
            except Exception:
                traceback.print_exc()
                found.parts[part.name] = "FAILED"
            log(f"{part.name}: {found.parts[part.name]} ({time.monotonic() - began:.1f} s)")
            if not found.out:
                log(f"  {found.results.get(part.name)}")
            gc.collect()  # what it held on the device
        found.save()


def make_parts(found: Found, secs: float, pool: ThreadPoolExecutor) -> list[Part]:
    """Every part in order of worth; `secs` of measuring in each that measures."""
    gpu = jax.default_backend() == "gpu"
    in_fp8, shape, plain = multiplies_in_fp8(), *(("d20", "bf16") if gpu else ("tiny", "float32"))
    training = Training(pool, found.compiling, secs)
    decode = f"decode {shape}"

    def start():
        """Choose the attention, begin to compile: what is measured first comes first."""
        kinds = [plain, "fp8"] if in_fp8 else [plain]
        training.start(shape, kinds)
        attention = training.shapes[f"{shape} {plain}"].model.attention_backend
        found.compiling[decode] = pool.submit(bench_infer.warm_up, shape, DECODE_ROWS, attention)
        if gpu:
            training.start("gpt2", kinds)
            training.submit(f"{shape} {plain}{NO_TRITON}", training.shapes[f"{shape} {plain}"])
        return [], {"attention": attention}

    def compiled():
        done, late = wait(found.compiling.values(), timeout=COMPILE_SECS)
        return [], {"done": len(done), "late": len(late)}

    def started(label: str) -> None:
        if label not in found.compiling:  # with --parts
            start()

    def ceilings():
        found.ceilings = bench_matmul.ceilings(secs)
        rows = [
            Row(f"ceiling {kind}", None, rate / 1e12, unit, rate, kind)
            for kind, rate in found.ceilings.items()
            for unit in ["TB/s" if kind == "copy" else "TFLOP/s"]
        ]
        return rows, found.ceilings

    def train(label: str):
        started(label)
        try:
            r = training.measure(label, found.left())
        finally:  # of a step that fails it is wanted most
            is_kept = label in (f"{shape} {plain}", f"{shape} fp8")
            if found.out and is_kept and label in training.fitted:
                training.write_text(label, found.out)
        model = training.shapes[label].model
        flops = train_flops_per_token(model) * r["tokens_per_sec"]
        calls = ", ".join(f"{count} {name}" for name, count in r["kernels"].items() if count)
        how = (
            f"{r['microbatches']} x {r['rows']} x {model.seq_len:,} tokens, "
            f"{r['bytes']['ours'] / 2**30:.1f} GiB, {r['attention']}{calls and '; ' + calls}"
        )
        ms, rate = r["ms"]["ours"], r["tokens_per_sec"]
        return [Row(f"train step {label}", ms, rate, "tok/s", flops, "bf16", how)], r

    def profile():
        label = f"{shape} {plain}"
        started(label)
        step = Steps(*training.ready(label, found.left()))
        with tempfile.TemporaryDirectory() as folder:
            kernels = tracing.top_kernels(tracing.trace(step, Path(folder)))
            if found.out:
                tracing.archive(Path(folder), found.out / "trace.tar.gz")
        found.kernels = f"{label}:\n{tracing.table(kernels)}"
        return [], [kernel._asdict() for kernel in kernels]

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
        started(decode)
        wait([found.compiling[decode]], found.left())
        backend = training.shapes[f"{shape} {plain}"].model.attention_backend
        r = bench_infer.run(shape, secs, DECODE_ROWS, rivals=False, attention=backend)
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
        rows = [Row(f"optimizer {shape}", both, None, "")]
        step = found.results.get(f"train step {shape} {plain}")
        if step:
            share = 100 * muon / step["ms"]["ours"]
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
            for form in SHOWN_PRODUCTS.get(p["what"], ())
            for rate in [p["tflops"][kind][form]]
        ]
        return rows, r

    def check(name: str, needs: float, function: Callable[[], dict]) -> Part:
        return Part(f"right: {name}", needs, lambda: ([], function()))

    def step(name: str, kind: str, needs: float, possible: bool = True) -> Part:
        label = f"{name} {kind}"
        return Part(f"train step {label}", needs, lambda: train(label), possible, label)

    no_triton = step(shape, plain + NO_TRITON, 25, gpu)
    return [
        Part("start", 30, start),
        check("attention", 15, right.check_attention),
        check("tiled loss", 10, right.check_loss),
        check("bf16 and fp8 losses", 30, lambda: right.check_dtypes(in_fp8)),
        check("decoding, classic", 20, lambda: right.check_decoding({})),
        check("decoding, modern", 20, lambda: right.check_decoding(right.MODERN)),
        Part("compiling", 30, compiled),
        step(shape, plain, 30),
        Part("ceilings", 15, ceilings),
        Part("attention", 20, attention),
        step(shape, "fp8", 25, in_fp8),
        Part("profile", 25, profile, awaits=f"{shape} {plain}"),
        Part("decode and prefill", 25, inference, awaits=decode),
        step("gpt2", plain, 35, gpu),
        step("gpt2", "fp8", 30, gpu and in_fp8),
        Part("optimizer", 15, optimizer),
        Part("loss", 15, loss),
        Part("matmuls", 30, matmuls),
        no_triton,
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


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds, for everything")
    parser.add_argument("--secs", type=float, help="of measuring, in each part (GPU: 6, CPU: 1)")
    parser.add_argument("--out", type=Path, help="folder for what is found")
    parser.add_argument("--parts", nargs="+", help="only those whose names contain one of these")
    args = parser.parse_args()
    start_runtime(compile_cache=True)
    found = Found(args.out, began + args.budget)
    log(json.dumps(found.machine))

    def time_is_up() -> None:
        found.save()
        found.show()
        os._exit(1)

    watch = threading.Timer(max(0.0, found.left()), time_is_up)
    watch.daemon = True
    watch.start()
    secs = args.secs
    if secs is None:
        secs = 6.0 if jax.default_backend() == "gpu" else 1.0
    parts = make_parts(found, secs, ThreadPoolExecutor(COMPILERS))
    run_parts([p for p in parts if chosen(p.name, args.parts)], found)
    watch.cancel()
    found.show()
    os._exit("FAILED" in found.parts.values())  # not to wait for what may still be compiling


def chosen(name: str, patterns: list[str] | None) -> bool:
    """Whether a part is wanted; the ceilings, to which others are compared, always are."""
    return not patterns or name == "ceilings" or any(pattern in name for pattern in patterns)


if __name__ == "__main__":
    run_main(main)
