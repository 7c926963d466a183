"""The training step of a run on GPUs that are not there, compiled as the run will compile it."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding

from nanochat_jax import hardware, recipe
from nanochat_jax.ahead.gpus import GPUS, absent_gpus
from nanochat_jax.ahead.program import RATES, Program, Work
from nanochat_jax.common import log
from nanochat_jax.config import Recipe
from nanochat_jax.launch.runtime import MEMORY_SHARE
from nanochat_jax.model.accounting import train_flops_per_token
from nanochat_jax.model.attention import choose_backend
from nanochat_jax.model.sharding import ROWS, make_mesh, num_row_shards
from nanochat_jax.stages.train import optimizer
from nanochat_jax.train.layout import Layout, LayoutRecord, candidates, choose
from nanochat_jax.train.memory import compile_lowered, compiled_bytes, format_bytes, held_bytes
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state
from nanochat_jax.train.step import make_train_step

MIB = 2**20


def compile_run(config: Recipe, *, gpu: str, num_gpus: int) -> str:
    """What base's training step is on `num_gpus` of `gpu`, as text."""
    name = gpu.lower()
    with absent_gpus(name, num_gpus) as devices:
        jax.config.update("jax_compiler_enable_remat_pass", False)  # as launch/runtime.py
        recipe.resolve(config, platform="gpu", num_devices=num_gpus)
        m, model = config.mesh, recipe.gpt_config(config)
        mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor, devices=devices)
        backend = choose_backend(config.model.attention, jnp.dtype(model.compute_dtype))
        model = replace(model, attention_backend=backend)
        if model.fp8_layers:
            hardware.check_fp8(devices[0], model.compute_dtype)
        owners = Owners(model, mesh)
        tx, _ = optimizer(config, model, "base", config.base.num_steps)
        state, rows = abstract_state(owners, tx), recipe.rows_per_step(config, num_row_shards(mesh))
        most_rows, remat = config.base.device_batch_size, config.model.remat
        layouts = candidates(rows // num_row_shards(mesh), most_rows, model.seq_len, remat)
        programs: dict[Layout, tuple[int, float, str]] = {}  # bytes, seconds to compile, text

        ids = ShapeDtypeStruct((rows, model.seq_len), jnp.int32, sharding=NamedSharding(mesh, ROWS))

        def compile(layout: Layout) -> int:
            log(f"compiling for {num_gpus} x {gpu}: {layout} ...")
            began, options = time.monotonic(), {"tile_tokens": config.model.loss_tile_tokens}
            options |= {"device_batch_size": layout.rows, "grad_clip": config.optim.grad_clip}
            step: Any = make_train_step(owners, tx, remat=layout.remat, **options)
            with jax.set_mesh(mesh):
                done = compile_lowered(step.lower(state, {"inputs": ids, "targets": ids}))
            secs = time.monotonic() - began
            programs[layout] = compiled_bytes(done), secs, done.as_text()
            return programs[layout][0]

        available = MEMORY_SHARE * GPUS[name]["device_memory_size"]
        with tempfile.TemporaryDirectory() as folder:
            record = LayoutRecord(Path(folder) / "layout.json", {}, layouts)
            taken = choose(record, compile, held_bytes(state), lambda: available)
        for layout in layouts:  # the first of each kind, to compare
            if layout.remat not in {known.remat for known in programs}:
                compile(layout)
    lines = [f"{config.run.name}: the step of base, compiled for {num_gpus} x {gpu}", ""]
    lines += [f"layouts, of {format_bytes(available)} that JAX takes of a GPU"]
    for layout, (size, secs, _) in programs.items():
        mark = "  <- taken" if layout == taken else ""
        lines += [f"  {layout!s:<32} {format_bytes(size):>10}, compiled in {secs:,.0f} s{mark}"]
    card = hardware.find_accelerator(name)
    assert card
    flops = rows * model.seq_len * train_flops_per_token(model) / num_gpus
    program = Program(programs[taken][2], peak_flops=card.peak_flops, bandwidth=card.bandwidth)
    return "\n".join(lines + tell(program.work(), flops, card.peak_flops))


def tell(work: Work, model_flops: float, peak_flops: float) -> list[str]:
    """Lines about a step; model_flops: of a GPU, as MFU counts them."""
    lines = ["", "a step of a GPU, by kind of kernel: how many, what they move, at least"]
    for kind, secs in sorted(work.secs.items(), key=lambda item: -item[1]):
        moved = work.bytes[kind] / MIB
        lines += [
            f"  {kind:<28} {work.kernels[kind]:>7,} {moved:>11,.0f} MiB {1e3 * secs:>9.1f} ms"
        ]
    secs, kernels = sum(work.secs.values()), sum(work.kernels.values())
    moved = sum(work.bytes.values()) / MIB
    lines += [f"  {'all':<28} {kernels:>7,} {moved:>11,.0f} MiB {1e3 * secs:>9.1f} ms"]
    lines += ["", "sent by a GPU: in how many calls, how much, beside how long kernels"]
    for kind, count in work.collectives.items():
        beside = f"{1e3 * work.beside[kind]:>9.1f} ms" if work.beside[kind] else "not asynchronous"
        lines += [f"  {kind:<28} {count:>7,} {work.sent[kind] / MIB:>11,.0f} MiB {beside}"]
    lines += [] if work.collectives else ["  nothing"]
    stops = ", ".join(f"{n:,} x {kind}" for kind, n in work.stops.items() if n) or "never"
    lines += ["", f"the host is waited for: {stops}"]
    share = model_flops / peak_flops / secs
    lines += [f"roofline: {1e3 * secs:,.0f} ms, {share:.0%} MFU at best ({RATES})"]
    return lines
