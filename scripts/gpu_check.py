"""Is this accelerator right, and how fast? Every check and benchmark in one run of minutes.

  python scripts/gpu_check.py --out=DIR               within 450 seconds
  python scripts/gpu_check.py --parts train decode    only parts whose names contain one of these

Parts come in order of worth. One that no longer fits into the time is skipped; when the time is up
in the middle of a part, the table is printed as it stands. Training steps and the engine compile on
other threads while the checks run. A part that fails prints its traceback and hides no other; the
exit status is then 1. DIR gets results.json, after every part; the training steps as XLA compiled
them, *.hlo.gz; and a trace of two steps, trace.json.gz, for ui.perfetto.dev. The last line is JSON.

  of peak     as in all benchmarks: over the data sheet's rate; of a training step that is MFU
  of ceiling  over what this very card reached on large random operands
  of target   over the number hoped for, in TARGETS

Needs JAX, flax and optax, nothing that reads data. Without a GPU a tiny shape goes the same way.
"""

import argparse
import functools
import gc
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanochat_jax import hardware
from nanochat_jax.common import UserError, log, run_main, write_json
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.launch.runtime import start_runtime
from nanochat_jax.model import fp8
from nanochat_jax.model.attention import candidates
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import GPTConfig, bind, init_params
from nanochat_jax.model.loss import cross_entropy_naive, cross_entropy_sum
from scripts.bench import common, infer, kernels, train
from scripts.bench.common import Row, Shape, Training

COMPILERS = 4  # programs at once; more would make the first ones wait
DECODED = (1, 64)  # texts at once
STEPS = 20  # of the comparison of losses
MODERN = dict(extras=True, window_pattern="SL", qk_scale=1.2, rope_base=100_000.0)
# How XLA's text names what a library computes, and products that it generates code for itself.
CALLS = {
    "f8": r'"__cublas\$lt\$matmul\$f8"',
    "cublas": r'"__cublas\$(lt\$matmul|gemm)"',
    "cudnn": r'"__cudnn\$fmhaSoftmax',
    "triton": r'"__triton(_nested)?_gemm(_fusion)?"',
}
# Row: of peak, or the value. A step: products at 720 TFLOP/s, attention at 400, 285 GB of other
# traffic at 4 TB/s make 58% on an H200; upstream reports 50%, and 59% in fp8 (dev/LEADERBOARD.md).
# Attention: rows of 2,048, both ways; FlashAttention 3's best (2407.08608) needs longer ones. One
# text: 35% of reading 561M bf16 weights a token at 4.8 TB/s; 64: weights once, and 100 KB of cache
# a token and row. Muon: 0.8% of a step's FLOPs, at half of their rate.
TARGETS = {
    "train step d20 bf16": ("of peak", 0.52),
    "train step d20 fp8": ("of peak", 0.60),
    "train step gpt2 bf16": ("of peak", 0.52),
    "train step gpt2 fp8": ("of peak", 0.60),
    "d20 attention cudnn full": ("value", 400),
    "d20 a token, 1 at once": ("value", 1_500),
    "d20 a token, 64 at once": ("value", 20_000),
    "d20 prefill, 16 x 2,048": ("of peak", 0.45),
    "d20 Muon": ("of peak", 0.26),
}


class Part(NamedTuple):
    name: str
    needs_secs: float  # at most, on one H200
    run: Callable[..., list[Row]]  # is given the result of its job, if it has one
    job: str = ""  # what is to be compiled on another thread first


class Found:
    """What is known so far, and where it is kept; all ends at `stop`, on time.monotonic's clock."""

    def __init__(self, out: Path | None, stop: float):
        self.out, self.stop = out, stop
        self.rows: list[Row] = []
        self.parts: dict[str, str] = {}  # name: how it ended
        versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
        libraries = {n: v for n, v in versions.items() if n and n.startswith(("jax-", "nvidia-"))}
        flags = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "NCCL_"))}
        self.machine = hardware.describe() | {"libraries": libraries, "environment": flags}

    def left(self) -> float:
        return self.stop - time.monotonic()

    def ratios(self, row: Row) -> dict[str, float | None]:
        ceilings = {r.limit: r.work for r in self.rows if " ceiling " in r.what}
        of_peak, ceiling = common.of_peak(row), ceilings.get(row.limit)
        kind, target = TARGETS.get(row.what, ("", 1.0))
        achieved = {"of peak": of_peak, "value": row.value}.get(kind)
        of_ceiling = row.work / ceiling if row.work and ceiling else None
        return {"of ceiling": of_ceiling, "of target": achieved and achieved / target}

    def save(self) -> None:
        if self.out:
            rows = [asdict(row) | self.ratios(row) for row in self.rows]
            found = {"parts": self.parts, "rows": rows, "machine": self.machine}
            write_json(self.out / "results.json", {"bench": "gpu_check", **found})

    def show(self) -> None:
        lines = []
        for row in self.rows:
            ratios = {k: common.text(v, "{:.0%}") for k, v in self.ratios(row).items()}
            lines.append(common.cells(row) | ratios | {"note": row.note})
        log("\n" + common.table(lines) if lines else "")
        for name, end in self.parts.items():
            log(f"{name}: {end}")
        failed = [name for name, end in self.parts.items() if end == "FAILED"]
        log(json.dumps({"bench": "gpu_check", "failed": failed}))


def run_parts(parts: list[Part], jobs: dict[str, Callable], found: Found) -> None:
    """Run those that fit; what one raises is its end. Before something is timed, all has to be
    compiled, unless the time is short."""
    pool, wanted = ThreadPoolExecutor(COMPILERS), {part.job for part in parts}
    futures = {name: pool.submit(job) for name, job in jobs.items() if name in wanted}
    for index, part in enumerate(parts):
        if part.needs_secs > found.left():
            found.parts[part.name] = f"skipped: {found.left():.0f} s are left"
            continue
        found.parts[part.name] = "the time was up in the middle of it"
        found.save()
        try:
            late = ()
            if not part.name.startswith("right"):
                rest = sum(part.needs_secs for part in parts[index:])
                late = wait(futures.values(), max(0, found.left() - rest)).not_done
            rows = part.run(futures[part.job].result(found.left())) if part.job else part.run()
            note = ", while others compiled" if late else ""
            found.rows += [replace(row, note=row.note + note) for row in rows]
            found.parts[part.name] = "ok"
        except Exception:
            traceback.print_exc()
            found.parts[part.name] = "FAILED"
        log(f"{part.name}: {found.parts[part.name]}, {found.left():.0f} s are left")
        gc.collect()  # what it held on the device
        found.save()


@functools.cache
def checked_shape(name: str) -> Shape:
    """The shape with the attention that passes its self-test."""
    shape = common.load_shape(name)
    model, line = check_attention(shape.model, "auto")
    log(line)
    return replace(shape, model=model)


def make_parts(found: Found, secs: float) -> tuple[list[Part], dict[str, Callable]]:
    """Every part in order of worth, with `secs` of measuring in each, and the jobs they await."""
    gpu, in_fp8 = jax.default_backend() == "gpu", True
    try:
        if gpu:  # a CPU computes the same, slowly
            hardware.check_fp8(jax.devices()[0], "bfloat16")
    except UserError:
        in_fp8 = False
    name, plain = ("d20", "bf16") if gpu else ("tiny", "float32")

    def compiled(label: str) -> Training:
        shape_name, kind = label.split()
        shape = train.changed(checked_shape(shape_name), in_fp8=kind == "fp8")
        return common.compile_fitting(shape, common.free_bytes())

    def check(what: str, needs: float, function: Callable[[], float]) -> Part:
        what = f"right: {what}"
        return Part(what, needs, lambda: [Row(what, value=function(), unit="difference")])

    def step(label: str, needs: float) -> Part:
        return Part(
            f"train step {label}", needs, lambda t: measure(label, t, secs, found.out), label
        )

    def kernel(kind: str, needs: float) -> Part:
        return Part(kind, needs, lambda: named(kernels.KERNELS[kind](checked_shape(name), secs)))

    def decode(secs: float) -> list[Row]:
        return named(infer.run(checked_shape(name), secs, DECODED, rivals=False))

    def named(rows: list[Row]) -> list[Row]:
        return [replace(row, what=f"{name} {row.what}") for row in rows]

    parts = [
        check("attention", 15, check_backends),
        check("tiled loss", 10, check_loss),
        check("bf16 losses", 15, lambda: check_losses(1e-2)),
        check("fp8 losses", 20, lambda: check_losses(3e-2, tuple(fp8.LAYERS))),
        check("decoding, classic", 20, lambda: check_decoding({})),
        check("decoding, modern", 20, lambda: check_decoding(MODERN)),
        step(f"{name} {plain}", 30),
        kernel("attention", 25),
        step(f"{name} fp8", 25),
        Part("decode and prefill", 30, lambda _: decode(secs), "decode"),
        step(f"gpt2 {plain}", 35),
        step("gpt2 fp8", 30),
        kernel("optimizer", 15),
        kernel("matmul", 45),
        kernel("loss", 20),
        Part("profile", 25, lambda training: profile(training, found.out), f"{name} {plain}"),
    ]
    parts = [p for p in parts if (gpu or "gpt2" not in p.name) and (in_fp8 or "fp8" not in p.name)]
    steps = [part.job for part in parts if part.name.startswith("train")]
    jobs: dict[str, Callable] = {label: functools.partial(compiled, label) for label in steps}
    return parts, jobs | {"decode": lambda: decode(0.0)}


def measure(label: str, training: Training, secs: float, out: Path | None) -> list[Row]:
    """The step's row; its kernels have to be those that the card is bought for."""
    program, model = training.step.as_text(), training.shape.model
    if out:
        with gzip.open(out / f"{label.replace(' ', '_')}.hlo.gz", "wt") as file:
            file.write(program)
    try:
        what = f"train step {label}"
        (row,) = train.run(training.shape, {what: training.start()}, secs)
    finally:
        training.stop()
    calls = {name: len(re.findall(pattern, program)) for name, pattern in CALLS.items()}
    row.note += f"; calls: {calls}, {model.attention_backend}"
    required = ("cudnn", "f8") if model.fp8_layers else ("cudnn",)
    missing = [name for name in required if not calls[name]]
    if jax.default_backend() == "gpu" and missing:
        raise RuntimeError(f"{label} runs at {row.value:,.0f} tok/s, but without {missing}")
    return [row]


def profile(training: Training, out: Path | None) -> list[Row]:
    """The kernels that took most of two steps."""
    training.start()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would crowd out what matters
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
        jax.block_until_ready([training(), training()])
        jax.profiler.stop_trace()
        training.stop()
        (trace,), (events,) = map(Path(folder).rglob, ("perfetto_trace.json.gz", "*.xplane.pb"))
        if out:
            shutil.copy(trace, out / "trace.json.gz")
        return top_kernels(jax.profiler.ProfileData.from_file(str(events)))


def top_kernels(trace, most: int = 15) -> list[Row]:
    """Work of a GPU's streams or, on a CPU, XLA's operations (a loop with what runs in it), summed
    over names that differ in a trailing number only."""
    calls, ns = Counter(), Counter()
    gpus = [plane for plane in trace.planes if plane.name.startswith("/device:GPU")]
    for line in (line for plane in gpus or trace.planes for line in plane.lines):
        for event in line.events:
            if line.name.startswith("Stream") if gpus else "hlo_op" in dict(event.stats):
                name = re.sub(r"[._]\d+$", "", event.name)
                calls[name] += 1
                ns[name] += event.duration_ns
    rows = [
        Row(f"kernel {name[:60]}", spent / 1e6, value=calls[name], unit="calls")
        for name, spent in ns.most_common(most)
    ]
    return [replace(row, note=f"{1e6 * row.ms / ns.total():.1%}") for row in rows]


def check_backends() -> float:
    """Every backend of attention passes the product's own test: full, windows, grouped heads."""
    config = GPTConfig(512, 2, 256, 2, 2, 1024, compute_dtype=compute_dtype())
    for backend in candidates():
        for changes in ({}, {"window_pattern": "S"}, {"num_kv_heads": 1}):
            log(check_attention(replace(config, **changes), backend)[1])
    return 0.0


def check_loss() -> float:
    """The tiled cross entropy and its gradients against the naive one."""
    x, head = common.random_arrays("float32", (4, 100, 256), (256, 1024))
    x, head = x.astype(compute_dtype()), head * 0.05
    targets = jax.random.randint(jax.random.key(2), (4, 100), -1, 1000)
    weights = jnp.ones((4, 100)) / 400

    def naive(x, head):
        return jnp.sum(cross_entropy_naive(x, head, targets, 1000) * weights)

    def tiled(x, head):
        return cross_entropy_sum(x, head, targets, weights, 1000, 32)

    forms = [jax.jit(jax.value_and_grad(form, (0, 1))) for form in (tiled, naive)]
    pairs = zip(*(jax.tree.leaves(form(x, head)) for form in forms), strict=True)
    return max(difference(a, b, 2e-2 if on_gpu() else 1e-5) for a, b in pairs)


def check_losses(tolerance: float, fp8_layers: tuple[str, ...] = ()) -> float:
    """Losses of learning one batch by heart in bfloat16, some layers in fp8, against float32's."""
    shape = replace(common.load_shape("tiny"), rows=8, accumulate=1)
    wide, losses = GPTConfig(512, 2, 128, 2, 2, 128), []
    for config in (wide, replace(wide, compute_dtype="bfloat16", fp8_layers=fp8_layers)):
        training = Training(replace(shape, model=config)).compile().start()
        losses.append([training.first_loss, *(float(training()) for _ in range(STEPS))])
    fell = losses[0][0] - losses[0][-1]
    assert fell > 1, f"float32 learns too little: its loss fell by {fell}"
    return difference(losses[1], losses[0], tolerance)


def check_decoding(variant: dict) -> float:
    """Log probabilities of what the engine wrote against one full forward pass over it."""
    config = GPTConfig(512, 3, 256, 2, 1, 512, compute_dtype=compute_dtype(), **variant)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    noise = common.random_arrays("float32", *(value.shape for value in params.values()))
    params = {k: v + 0.05 * n for (k, v), n in zip(params.items(), noise, strict=True)}
    engine = Engine(config, common.one_device(), slots=2, max_len=384, stop_ids=())
    engine.load(params)
    prompts = [common.random_batch(n, 1, n, 512)["inputs"][0].tolist() for n in (1, 40, 200)]
    answers = engine.generate([Request(prompt, 160, temperature=1.0) for prompt in prompts])
    ids = np.zeros((3, 384), np.int32)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[: len(prompt) + 160] = [*prompt, *answer.tokens]
    logits = jax.jit(lambda params, ids: bind(config, params)(ids))(params, ids)
    worst = 0.0
    for prompt, answer, full in zip(prompts, answers, jax.nn.log_softmax(logits), strict=True):
        at = np.arange(len(prompt) - 1, len(prompt) + 159)
        expected = full[at, np.array(answer.tokens)]
        worst = max(worst, difference(answer.logprobs, expected, 2e-2 if on_gpu() else 1e-4))
    return worst


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def compute_dtype() -> str:
    return "bfloat16" if on_gpu() else "float32"


def difference(a, b, tolerance: float) -> float:
    """The largest, as a fraction of b's largest value; AssertionError over tolerance."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    found = float(np.abs(a - b).max() / np.abs(b).max())
    assert found <= tolerance, f"differs by {found}, tolerance {tolerance}"
    return found


def main(make_parts=make_parts) -> None:
    began = time.monotonic()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--budget", type=float, default=450.0, help="seconds, for everything")
    parser.add_argument("--secs", type=float, help="of measuring, in each part (GPU: 6, CPU: 1)")
    parser.add_argument("--out", type=Path, help="folder for what is found")
    parser.add_argument("--parts", nargs="+", help="only those whose names contain one of these")
    args = parser.parse_args()
    log(start_runtime(compile_cache=True))
    found = Found(args.out, began + args.budget)
    log(json.dumps(found.machine))

    def time_is_up() -> None:
        found.save()
        found.show()
        os._exit(1)

    watch = threading.Timer(max(0.0, found.left()), time_is_up)
    watch.daemon = True
    watch.start()
    secs = (6.0 if on_gpu() else 1.0) if args.secs is None else args.secs
    parts, jobs = make_parts(found, secs)
    run_parts(
        [p for p in parts if not args.parts or any(a in p.name for a in args.parts)], jobs, found
    )
    watch.cancel()
    found.show()
    os._exit("FAILED" in found.parts.values())  # not to wait for what may still be compiling


if __name__ == "__main__":
    run_main(main)
