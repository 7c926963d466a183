"""What a run would be, before anything is paid for: numbers from the recipe, without a GPU.

Closed forms give parameters, FLOPs, tokens, disk, hours and cost; with `compile_step` the training
step is compiled for as many (CPU) devices as there would be GPUs, from shapes alone, and XLA's own
analysis gives the memory. That is the CPU compiler's view: a GPU fuses attention, keeps bfloat16 as
it is and needs less. planning_scale.py says what more GPUs would bring.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nanochat_jax import hardware, recipe
from nanochat_jax.common import UserError
from nanochat_jax.config import Recipe
from nanochat_jax.data import datasets as registry
from nanochat_jax.launch.runtime import MEMORY_SHARE
from nanochat_jax.model.accounting import param_counts, state_bytes, train_flops_per_token
from nanochat_jax.model.gpt import param_shapes
from nanochat_jax.model.sharding import ROWS, make_mesh
from nanochat_jax.optim.build import build_optimizer
from nanochat_jax.plan_scale import GPUS_PER_NODE, NETWORKS, SAVED_VALUES, most_gpus, step_on
from nanochat_jax.train.layout import Layout, candidates
from nanochat_jax.train.memory import compile_lowered, compiled_bytes
from nanochat_jax.train.metrics import format_secs
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.state import abstract_state
from nanochat_jax.train.step import make_train_step

GIB = 2**30
CHARS_PER_TOKEN = 4.7  # of English with vocabularies of 32k to 65k; scripts/tok_eval.py measures it
BEST_FIT_KEPT_FRAC = 0.65  # best_fit packing cuts about a third of the text away
SCALE = (1, 8, 64, 1024)  # GPUs
# Values of model_dim kept per token and layer: scripts/bench_memory.py, tests/model/test_gpt.py.
SAVED = {"none": SAVED_VALUES, "names": 10, "full": 1}
LOGITS = 3  # float32 values for each logit of a tile of the loss: it, its softmax, its gradient

Lines = list[tuple[str, str]]


def plan(
    config: Recipe,
    *,
    gpu: str,
    num_gpus: int,
    mfu: float,
    compile_step: bool,
    network: str = "infiniband",
) -> str:
    """The plan of a recipe on `num_gpus` of `gpu` at a model FLOPs utilisation `mfu`, as text."""
    card = hardware.find_accelerator(gpu)
    if card is None:
        known = sorted({" ".join(row.words) for row in hardware.ACCELERATORS})
        raise UserError(f"--gpu got {gpu!r}, expected one of: {', '.join(known)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu got {mfu}, expected a fraction between 0 and 1")
    if network not in NETWORKS:
        raise UserError(f"--network got {network!r}, expected one of: {', '.join(NETWORKS)}")
    derived = recipe.resolve(config, platform="gpu", num_devices=num_gpus)
    shards = config.mesh.data * config.mesh.fsdp
    rows, most = recipe.rows_per_step(config, shards)
    layouts = candidates(rows // shards, most, config.model.seq_len, config.model.remat)
    sizes = {layout: _step_bytes(config, layout, rows // shards) for layout in layouts}
    taken = MEMORY_SHARE * card.memory_bytes
    fits = [layout for layout in layouts if sizes[layout] <= taken]
    layout, enough = (fits[0], "") if fits else (layouts[-1], ": too little")
    sections = {
        "derived": [(d.key, f"{_number(d.value):<14} {d.formula}") for d in derived],
        "model": _model(config),
        "text": _text(config),
        "memory per device": [
            *_memory(config, layout, sizes[layout], rows, compile_step),
            ("JAX takes of a device", f"{taken / GIB:6.1f} GiB{enough}"),
        ],
        f"pretraining on {num_gpus} x {gpu}": _time(config, card, num_gpus, mfu, rows, layout.rows),
        f"on more of them, nodes of {GPUS_PER_NODE}, {network}": _scale(config, card, mfu, network),
    }
    lines = [f"{config.run.name}: a plan, nothing has been started"]
    for title, entries in sections.items():
        lines += ["", title, *(f"  {name:<24} {value}" for name, value in entries)]
    return "\n".join(lines)


def _model(config: Recipe) -> Lines:
    c = recipe.gpt_config(config)
    counts = param_counts(c)
    shape = f"{c.num_layers} layers, width {c.model_dim}, {c.num_heads} heads of {c.head_dim}"
    lines = [("shape", f"{shape}, {c.seq_len} tokens a row")]
    lines += [(name.replace("_", " "), f"{n:>15,} parameters") for name, n in counts.items() if n]
    return [*lines, ("FLOPs per token", f"{train_flops_per_token(c):>15,}")]


def _text(config: Recipe) -> Lines:
    d, b = config.data, config.base
    tokens = b.num_steps * b.total_batch_tokens
    kept = BEST_FIT_KEPT_FRAC if d.packing == "best_fit" else 1.0
    chars = tokens * CHARS_PER_TOKEN / kept
    lines = [
        ("tokens", f"{tokens:,} in {b.num_steps:,} steps"),
        ("characters needed", f"{chars / 1e9:,.1f}B ({d.packing} packing)"),
    ]
    dataset = registry.get(d.name)
    if not dataset.repo_id:
        return [*lines, ("source", f"{d.name}, made on the machine")]
    have = d.num_shards * dataset.shard_chars
    needed = -(-int(chars) // dataset.shard_chars)
    enough = "enough" if have >= chars else f"{chars / have:.2f} epochs; one would take {needed}"
    disk = (d.num_shards + 1) * dataset.shard_bytes / 1e9
    return [
        *lines,
        ("shards", f"{d.num_shards} of {d.name} = {have / 1e9:,.1f}B characters: {enough}"),
        ("download and disk", f"{disk:,.1f} GB"),
    ]


def _held(config: Recipe) -> dict[str, float]:
    """Bytes of a device: masters and moments are shared out; the rest is whole while a step
    lasts."""
    m, state = config.mesh, state_bytes(recipe.gpt_config(config))
    devices = m.data * m.fsdp * m.tensor
    return {
        "params": state["params"] / devices,
        "optimizer": state["optimizer"] / devices,
        "weights gathered": state["params"] / 2 / m.tensor,
        "grads": state["grads"] / m.tensor,
    }


def _step_bytes(config: Recipe, layout: Layout, share: int) -> float:
    """A step of `share` rows a device in closed form, attention fused, everything in bfloat16."""
    c, held = recipe.gpt_config(config), _held(config)
    parts = held["grads"] if layout.rows < share else 0  # added up beside those of a part
    kept = layout.rows * c.seq_len * c.num_layers * SAVED[layout.remat] * 2 * c.model_dim
    logits = LOGITS * 4 * config.model.loss_tile_tokens * c.padded_vocab_size
    return sum(held.values()) + parts + (kept + logits) / config.mesh.tensor


def _memory(config: Recipe, layout: Layout, size: float, rows: int, compiled: bool) -> Lines:
    state = state_bytes(recipe.gpt_config(config))
    checkpoint = (state["params"] + state["optimizer"]) / GIB
    lines = [(name, f"{size / GIB:6.1f} GiB") for name, size in _held(config).items()]
    lines.append(("whole step, about", f"{size / GIB:6.1f} GiB: {layout}"))
    if compiled:
        needed = _compiled_step_bytes(config, layout, rows)
        lines.append(("whole step", f"{needed / GIB:6.1f} GiB by the CPU compiler's analysis"))
    else:
        lines.append(("whole step", "add --compile to have it compiled and analysed"))
    kept = f"kept: {config.base.keep_checkpoints} + 1"
    return [*lines, ("a checkpoint (disk)", f"{checkpoint:6.1f} GiB, {kept}")]


def _compiled_step_bytes(config: Recipe, layout: Layout, rows: int) -> int:
    m = config.mesh
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    model = replace(recipe.gpt_config(config), remat=layout.remat)
    tx = build_optimizer(
        param_shapes(model),
        model.model_dim,
        recipe.optim_config(config, "gpu"),
        lr_multiplier=lambda step: 1.0,
        momentum=lambda step: 0.95,
        weight_decay=lambda step: 0.0,
    )
    owners = Owners(model, mesh)
    step = make_train_step(
        owners,
        tx,
        remat=layout.remat,
        device_batch_size=layout.rows,
        tile_tokens=config.model.loss_tile_tokens,
        grad_clip=config.optim.grad_clip,
    )
    batch = jax.ShapeDtypeStruct(
        (rows, model.seq_len), jnp.int32, sharding=NamedSharding(mesh, ROWS)
    )
    with jax.set_mesh(mesh):
        state = abstract_state(owners, tx)
        lowered = step.lower(state, {"inputs": batch, "targets": batch})
        return compiled_bytes(compile_lowered(lowered))


def _time(config: Recipe, card, num_gpus: int, mfu: float, rows: int, at_once: int) -> Lines:
    b = config.base
    flops = train_flops_per_token(recipe.gpt_config(config)) * b.total_batch_tokens
    rate = num_gpus * card.peak_flops * mfu
    secs = b.num_steps * flops / rate
    parts = rows // (config.mesh.data * config.mesh.fsdp * at_once)
    dollars = secs / 3600 * num_gpus * card.usd_per_hour
    return [
        ("a step", f"{rows} rows: {at_once} a device at once, {parts} in turn"),
        ("all steps", f"{b.num_steps * flops:.3g} FLOPs"),
        ("speed assumed", f"{mfu:.0%} of {num_gpus} x {card.peak_flops / 1e12:,.0f} TFLOP/s"),
        ("tokens per second", f"{b.total_batch_tokens * rate / flops:,.0f}"),
        ("time", f"{format_secs(secs)}, without communication, evaluations, compiling"),
        ("cost", f"${dollars:,.2f} at ${card.usd_per_hour:.2f} a device and hour"),
    ]


def _scale(config: Recipe, card, mfu: float, network: str) -> Lines:
    """The pretraining on other numbers of GPUs, weights and batch divided over all of them."""
    b, model = config.base, recipe.gpt_config(config)
    tokens, rows = b.num_steps * b.total_batch_tokens, b.total_batch_tokens // model.seq_len
    kind = {"device_batch_size": b.device_batch_size, "mfu": mfu, "network": network}
    titles = (
        "rows",
        "model",
        "Muon",
        "reduce",
        "gather",
        "useful",
        "hidden",
        "GiB",
        "time",
        "cost",
    )
    lines = [("ms of a step, a GPU's", "".join(f"{title:>9}" for title in titles))]
    for num_gpus in SCALE:
        needed = -(-rows // num_gpus) * num_gpus  # at least a row for each
        s = step_on(model, card, num_gpus, batch_rows=needed, **kind)
        secs = tokens / (needed * model.seq_len) * s.secs
        terms = (s.model_secs, s.muon_secs, s.reduce_secs, s.gather_secs)
        cells = [f"{s.rows}", *(f"{1e3 * term:,.1f}" for term in terms)]
        cells += [f"{s.efficiency:.0%}", f"{s.overlapped_efficiency:.0%}"]
        cells += [f"{s.memory_bytes / GIB:.0f}", format_secs(secs)]
        cells += [f"${secs / 3600 * num_gpus * card.usd_per_hour:,.0f}"]
        note = "" if needed == rows else f"  batch x {needed / rows:g}: learns less from a token"
        lines.append(
            (
                f"{num_gpus:,} GPU{'s' * (num_gpus > 1)}",
                "".join(f"{cell:>9}" for cell in cells) + note,
            )
        )
    half, last = most_gpus(model, card, batch_rows=rows, **kind)
    return [
        *lines,
        ("assumed", "float32 gradients reduce-scattered, bfloat16 weights gathered, Muon divided"),
        ("useful, hidden", "share of the time in the model; the same if communication overlaps"),
        (
            "efficient up to",
            f"{half.num_gpus:,} GPUs: {half.efficiency:.0%} useful, {half.communication_frac:.0%} "
            "communication; twice as many work on the model less than half of the time"
            if half is not last
            else f"{half.num_gpus:,} GPUs: {half.efficiency:.0%} useful",
        ),
        (
            "rows for",
            f"{last.num_gpus:,} GPUs: {last.efficiency:.0%} useful; more need a larger batch",
        ),
    ]


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def later_flops(config: Recipe, name: str) -> float:
    """FLOPs of the stages after `name`."""
    return 0.0
