"""The training steps of gpu_check.py: compiled on other threads, made to fit, measured, profiled.

A step that needs more than there is gets smaller microbatches, and more of them: the tokens of a
step stay. What a card is bought for is required of the compiled text: attention by cuDNN, and
products in fp8 by cuBLAS where fp8 was asked for.
"""

import gzip
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_train
import jax

from nanochat_jax import bench
from nanochat_jax.common import log
from nanochat_jax.launch.runtime import (
    available_bytes,
    compile_lowered,
    compiled_bytes,
    is_out_of_memory,
)
from nanochat_jax.model.attention_check import check_attention
from nanochat_jax.model.gpt import param_shapes

# How XLA's text names what a library computes, and products that it generates code for itself.
KERNELS = {
    "f8": r'"__cublas\$lt\$matmul\$f8"',
    "cublas": r'"__cublas\$(lt\$matmul|gemm)"',
    "cudnn": r'"__cudnn\$fmhaSoftmax',
    "triton": r'"__triton(_nested)?_gemm(_fusion)?"',
}
NO_TRITON = ", no Triton"  # at the end of a label


class Training:
    """Training steps by label, like "d20 fp8"; `futures` are those being compiled."""

    def __init__(self, pool: ThreadPoolExecutor, futures: dict[str, Future], secs: float):
        self.pool, self.futures, self.secs = pool, futures, secs
        self.shapes: dict[str, bench.Shape] = {}  # as measured, once that is known
        self.fitted: dict[str, Any] = {}

    def start(self, name: str, kinds: list[str]) -> None:
        """Choose the attention of a shape, begin to compile its steps: "d20 bf16", "d20 fp8"."""
        base = bench.get_shape(name)
        base = replace(base, model=check_attention(base.model, "auto"))
        for kind in kinds:
            self.submit(f"{name} {kind}", bench_train.with_options(base, in_fp8=kind == "fp8"))

    def submit(self, label: str, shape: bench.Shape) -> None:
        self.shapes[label] = shape
        self.futures[label] = self.pool.submit(self.compile, label)

    def compile(self, label: str):
        lowered = bench_train.lower_step(self.shapes[label])
        if label.endswith(NO_TRITON):
            return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
        return compile_lowered(lowered)

    def ready(self, label: str, timeout: float) -> tuple[bench.Shape, Any]:
        """A step and its shape, compiled once more if it does not fit; TimeoutError when late."""
        if label not in self.fitted:
            step, shape = self.futures[label].result(timeout), self.shapes[label]
            needed, available = compiled_bytes(step), available_bytes(bench.one_device())
            if needed > available:
                rows = rows_that_fit(shape, held_bytes(shape, step), needed, available)
                size = f"{needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"
                log(f"{label}: {shape.rows} rows at once need {size}; {rows} instead")
                self.shapes[label] = with_rows(shape, rows)
                step = self.compile(label)
            self.fitted[label] = step
        return self.shapes[label], self.fitted[label]

    def measure(self, label: str, timeout: float) -> dict:
        """What bench_train finds, and `kernels`; halves the rows once when memory runs out."""
        try:
            return self._measure(label, timeout)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or self.shapes[label].rows == 1:
                raise
            log(f"{label}: {str(error).splitlines()[0]}; half the rows at once instead")
        # Only here has the error let go of what it held on the device.
        self.shapes[label] = with_rows(self.shapes[label], self.shapes[label].rows // 2)
        self.fitted[label] = self.compile(label)
        return self._measure(label, timeout)

    def _measure(self, label: str, timeout: float) -> dict:
        shape, step = self.ready(label, timeout)
        found = bench_train.run(shape, self.secs, rivals=False, compiled=step)
        kernels = count_kernels(step.as_text())
        log(f"{label}: " + ", ".join(f"{count} {name}" for name, count in kernels.items()))
        if jax.default_backend() == "gpu":
            required = ["cudnn", "f8"] if shape.model.fp8_layers else ["cudnn"]
            missing = [name for name in required if not kernels[name]]
            rate = f"{found['tokens_per_sec']:,.0f} tok/s"
            assert not missing, f"{label} runs at {rate}, but without {' and '.join(missing)}"
        return found | {"kernels": kernels, "attention": shape.model.attention_backend}

    def write_text(self, label: str, folder: Path) -> None:
        """What XLA made of the step, for those who read a profile."""
        folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / f"{label.replace(' ', '_')}.hlo.gz", "wt") as file:
            file.write(self.fitted[label].as_text())


def count_kernels(text: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, text)) for name, pattern in KERNELS.items()}


def held_bytes(shape: bench.Shape, step) -> int:
    """What does not shrink with the rows: the state, and gradients added up beside new ones."""
    params = sum(p.size for p in param_shapes(shape.model).values())
    return step.memory_analysis().argument_size_in_bytes + 2 * 4 * params


def rows_that_fit(shape: bench.Shape, held: int, needed: int, available: float) -> int:
    """The most rows at once that divide the step's; bytes are `held` and as much for each row."""
    total, per_row = shape.rows * shape.accumulate, max(0, needed - held) / shape.rows
    return max(
        (
            rows
            for rows in range(1, shape.rows)
            if total % rows == 0 and held + per_row * rows <= available
        ),
        default=1,
    )


def with_rows(shape: bench.Shape, rows: int) -> bench.Shape:
    """The same step in other microbatches."""
    return replace(shape, rows=rows, accumulate=shape.rows * shape.accumulate // rows)
