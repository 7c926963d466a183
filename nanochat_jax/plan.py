"""What a run would be, before anything is paid for: numbers from the recipe, without a GPU.

A training step is taken as four terms, one after the other:

  model    FLOPs of forward and backward, divided by the GPUs, at a given utilisation
  muon     its matrices divided among the GPUs, whole ones: some have one more than others
  reduce   float32 gradients, summed and left divided (reduce-scatter)
  gather   bfloat16 working copies of the weights, from the divided masters (all-gather)

Latencies are left out, and so is what kernels lose when a GPU has few rows.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from nanochat_jax import hardware, recipe
from nanochat_jax.common import UserError
from nanochat_jax.config import Recipe
from nanochat_jax.data import datasets
from nanochat_jax.hardware import Accelerator
from nanochat_jax.launch.runtime import MEMORY_SHARE
from nanochat_jax.model.accounting import param_counts, state_bytes, train_flops_per_token
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.optim.build import label
from nanochat_jax.train.layout import Layout, candidates
from nanochat_jax.train.metrics import format_secs

GIB = 2**30
CHARS_PER_TOKEN = 4.7  # of English with vocabularies of 32k to 65k; scripts/tok_eval.py measures it
BEST_FIT_KEPT_FRAC = 0.65  # best_fit packing cuts about a third of the text away
SAVED_VALUES = {"none": 17, "names": 10, "full": 1}  # bfloat16 of model_dim, per token and layer
LOGIT_VALUES = 3  # float32 for each logit of a tile of the loss: it, its softmax, its gradient
MUON_ITERATIONS = 5
MUON_UTILISATION = 0.6  # of the peak, by its square bfloat16 products
GPUS_PER_NODE = 8
SCALE = (1, 8, 64, 1024)  # GPUs in the table
# Bytes/s per GPU and direction. In a node: bus bandwidth that NCCL reaches on NVLink, or over PCIe
# 4 x16. Between nodes: line rates, of Ethernet 100 Gbit/s for a node of eight.
NVLINK = {
    "a100": 230e9,
    "h100": 370e9,
    "h200": 370e9,
    "gh200": 370e9,
    "b200": 700e9,
    "gb200": 700e9,
}
PCIE = 20e9
NETWORKS = {"infiniband": 50e9, "ethernet": 12.5e9 / GPUS_PER_NODE}

# Assumed by stage_costs. On a CPU writing a token takes as long as training on one
# (dev/BENCHMARKS.md); on a GPU, where decoding waits for memory, ten times as long: a guess.
WRITE_COST = {"cpu": 1, "gpu": 10}
TASK_ROWS = {"smoltalk train": 460_341, "mmlu auxiliary_train": 99_842, "gsm8k train": 7_473}
OTHER_ROWS = 2_000  # of a task that is not listed and not cut to [first:last]
CHAT_FRAC = 0.3  # of seq_len: tokens of a conversation
ANSWER_FRAC = 0.5  # of max_new_tokens: tokens of an answer, and of a prompt in rl
CORE_TASKS, CORE_ROWS, CORE_TOKENS = 22, 4_000, 1_500  # rows of a task, tokens of a row's choices


@dataclass(frozen=True)
class Step:
    """One training step on some GPUs, in the fastest layout that fits, else in the smallest."""

    num_gpus: int
    share: int  # rows of a row shard
    rows: int  # of all of them
    tokens: int
    layout: Layout
    memory: dict[str, float]  # bytes of a GPU, by what takes them
    fits: bool  # on the GPU
    terms: dict[str, float]  # seconds

    @property
    def secs(self) -> float:
        return sum(self.terms.values())

    @property
    def efficiency(self) -> float:
        return self.terms["model"] / self.secs


def step_on(config: Recipe, card: Accelerator, num_gpus: int, *, mfu: float, network: str) -> Step:
    """A step of a resolved recipe; more GPUs than rows get a row each, which enlarges the batch."""
    model, b = recipe.gpt_config(config), config.base
    shards = num_gpus // config.mesh.tensor
    share = -(-b.total_batch_tokens // (model.seq_len * shards))
    layouts = candidates(share, b.device_batch_size, model.seq_len, config.model.remat)
    sizes = {layout: step_bytes(config, layout, share, num_gpus) for layout in layouts}
    available = MEMORY_SHARE * card.memory_bytes
    fitting = [layout for layout in layouts if sum(sizes[layout].values()) <= available]
    layout = (fitting or layouts[-1:])[0]
    rows = share * shards
    tokens, params = rows * model.seq_len, param_counts(model)["total"]
    matrices, muon_flops = muon_work(model)
    most = -(-matrices // num_gpus) / matrices  # of the GPU that has most of Muon's matrices
    terms = {
        "model": tokens * train_flops_per_token(model) / (num_gpus * card.peak_flops * mfu),
        "muon": most * muon_flops / (card.peak_flops * MUON_UTILISATION),
        "reduce": collective_secs(4 * params, num_gpus, card, network),
        "gather": collective_secs(2 * params, num_gpus, card, network),
    }
    return Step(num_gpus, share, rows, tokens, layout, sizes[layout], bool(fitting), terms)


def step_bytes(config: Recipe, layout: Layout, share: int, num_gpus: int) -> dict[str, float]:
    """Bytes of a GPU with fused attention and everything in bfloat16. Masters and moments are
    shared out over all GPUs, the rest is whole while a step lasts (split by tensor alone)."""
    c, tensor = recipe.gpt_config(config), config.mesh.tensor
    state, tokens = state_bytes(c), layout.rows * c.seq_len
    parts = 1 if layout.rows == share else 2  # the sum over parts lies beside a part's gradients
    kept = tokens * c.num_layers * SAVED_VALUES[layout.remat] * 2 * c.model_dim
    logits = LOGIT_VALUES * 4 * config.model.loss_tile_tokens * c.padded_vocab_size
    return {
        "params": state["params"] / num_gpus,
        "optimizer": state["optimizer"] / num_gpus,
        "weights gathered": state["params"] / 2 / tensor,
        "gradients": parts * state["grads"] / tensor,
        "kept for backward": kept / tensor,
        "logits of a tile": logits / tensor,
    }


def collective_secs(size: float, num_gpus: int, card: Accelerator, network: str) -> float:
    """Seconds to reduce-scatter or all-gather `size` bytes over all GPUs: each moves its part over
    the links of its node of G, then 1/G of it over its share of the network between nodes."""
    in_node = min(num_gpus, GPUS_PER_NODE)
    nodes = num_gpus / in_node
    link = PCIE if "pcie" in card.words else NVLINK.get(card.words[0], PCIE)
    within = size * (in_node - 1) / in_node / link
    return within + size / in_node * (nodes - 1) / nodes / NETWORKS[network]


@functools.cache
def muon_work(model: GPTConfig) -> tuple[int, int]:
    """(number of Muon's matrices, FLOPs to orthogonalise them): for m x n, m <= n, an iteration
    takes 2 m m n for X X' and for (...) X, 2 m^3 for the square of X X'."""
    shapes = [leaf.shape for path, leaf in param_shapes(model).items() if label(path) == "muon"]
    flops = sum(4 * m * m * n + 2 * m**3 for m, n in map(sorted, shapes))
    return len(shapes), MUON_ITERATIONS * flops


def stage_costs(config: Recipe, platform: str) -> dict[str, float]:
    """What each part of a whole run takes, in their order, as tokens that base trains on in the
    same time. A recipe's own numbers of steps count; the rest is assumed (see the constants above).
    Compiling, starting and preparing data are left out."""
    b, e, r, seq_len = config.base, config.eval, config.rl, config.model.seq_len
    validation, write = e.val_tokens / 3, WRITE_COST[platform]  # reading: a third of training

    def checks(section, steps: float) -> float:  # validations, the one at the end included
        return 1 + (steps // section.eval_every if section.eval_every else 0)

    def answers(count: float, max_new_tokens: int) -> float:
        return count * max_new_tokens * ANSWER_FRAC * write

    core = CORE_TOKENS * CORE_TASKS / 3 if e.core else 0
    in_base = b.num_steps // b.core_every * core * e.core_loop_per_task if b.core_every else 0
    costs = {"base": _base_tokens(config) + checks(b, b.num_steps) * validation + in_base}
    costs["base_eval"] = 2 * validation + core * (e.core_per_task or CORE_ROWS)
    problems = sum(min(_rows(spec), e.chat_problems or OTHER_ROWS) for spec in e.chat_tasks)
    chat_eval = answers(problems * e.chat_samples, e.chat_max_new_tokens)
    for name, section in (("mid", config.mid), ("sft", config.sft)):
        if section.mixture:
            rows = section.batch_rows or b.total_batch_tokens // seq_len
            frac = CHAT_FRAC if section.packing == "rows" else 1.0  # of a row that is filled
            all_steps = sum(map(_rows, section.mixture)) * CHAT_FRAC / frac / rows
            steps = min(section.num_steps or all_steps, all_steps)
            costs[name] = steps * rows * seq_len * frac + checks(section, steps) * validation
            costs[f"{name}_eval"] = chat_eval
    if r.task:
        steps = r.num_steps or _rows(r.task) // r.questions_per_step
        count = r.questions_per_step * r.samples
        practice = count * r.max_new_tokens * (1 + ANSWER_FRAC) + answers(count, r.max_new_tokens)
        asked = (1 + checks(r, steps)) * (r.eval_questions or OTHER_ROWS) * r.eval_samples
        costs |= {"rl": steps * practice + answers(asked, r.max_new_tokens), "rl_eval": chat_eval}
    return costs


def later_tokens(config: Recipe, stage: str) -> float:
    """Tokens that base would train on while the parts of a run after `stage` last, about."""
    costs = stage_costs(config, "cpu" if config.model.compute_dtype == "float32" else "gpu")
    return sum(list(costs.values())[list(costs).index(stage) + 1 :])


def _rows(spec: str) -> int:
    """Conversations of "name split[first:last] xtimes", about."""
    cut = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?(?: x(\d+))?", spec)
    assert cut
    name, first, last, times = cut.groups()
    count = int(last or TASK_ROWS.get(name, OTHER_ROWS)) - int(first or 0)
    return max(0, count) * int(times or 1)


def plan(config: Recipe, *, gpu: str, num_gpus: int, mfu: float, network: str) -> str:
    """The plan of a recipe on `num_gpus` of `gpu` at a model FLOPs utilisation `mfu`, as text."""
    card = hardware.find_accelerator(gpu)
    if card is None:
        known = sorted({" ".join(row.words) for row in hardware.ACCELERATORS})
        raise UserError(f"--gpu got {gpu!r}, expected one of: {', '.join(known)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu got {mfu}, expected a fraction between 0 and 1")
    derived, m = recipe.resolve(config, platform="gpu", num_devices=num_gpus), config.mesh
    if (size := m.data * m.fsdp * m.tensor) != num_gpus:
        raise UserError(f"config.mesh got data x fsdp x tensor = {size}, expected {num_gpus}")
    recipe.rows_per_step(config, m.data * m.fsdp)  # UserError unless the batch divides evenly
    on = functools.partial(step_on, config, card, mfu=mfu, network=network)
    step, price = on(num_gpus), f"${card.usd_per_hour:.2f} each and hour"
    counts = param_counts(recipe.gpt_config(config))
    sections = {
        "derived": {d.key: f"{d.text:<14} {d.formula}" for d in derived},
        "parameters": {k.replace("_", " "): f"{n:>15,}" for k, n in counts.items() if n},
        "text": _text(config),
        "memory per device": _memory(config, card, step),
        f"on {num_gpus} x {gpu}, {price}": _time(config, card, step, mfu),
        f"pretraining on more, nodes of {GPUS_PER_NODE}, {network}": _scale(config, card, on),
    }
    lines = [f"{config.run.name}: a plan, nothing has been started"]
    for title, entries in sections.items():
        lines += ["", title, *(f"  {name:<24} {value}" for name, value in entries.items())]
    return "\n".join(lines)


def _base_tokens(config: Recipe) -> int:
    return config.base.num_steps * config.base.total_batch_tokens


def _text(config: Recipe) -> dict[str, str]:
    d, tokens, dataset = config.data, _base_tokens(config), datasets.get(config.data.name)
    chars = tokens * CHARS_PER_TOKEN / (BEST_FIT_KEPT_FRAC if d.packing == "best_fit" else 1)
    lines = {"tokens": f"{tokens:,} in {config.base.num_steps:,} steps"}
    lines["characters needed"] = f"{chars / 1e9:,.1f}B ({d.packing} packing)"
    if not dataset.repo_id:
        return lines | {"source": f"{d.name}, made on the machine"}
    have, needed = d.num_shards * dataset.shard_chars, -(-int(chars) // dataset.shard_chars)
    enough = "enough" if have >= chars else f"{chars / have:.2f} epochs; one would take {needed}"
    lines["shards"] = f"{d.num_shards} of {d.name} = {have / 1e9:,.1f}B characters: {enough}"
    disk = (d.num_shards + 1) * dataset.shard_bytes / 1e9
    return lines | {"download and disk": f"{disk:,.1f} GB"}


def _memory(config: Recipe, card: Accelerator, step: Step) -> dict[str, str]:
    state, too_much = state_bytes(recipe.gpt_config(config)), "" if step.fits else ", too much"
    sizes = step.memory | {"whole step": sum(step.memory.values())}
    sizes["JAX takes of a device"] = MEMORY_SHARE * card.memory_bytes
    sizes["a checkpoint (disk)"] = state["params"] + state["optimizer"]
    lines = {name: f"{size / GIB:6.1f} GiB" for name, size in sizes.items()}
    lines["whole step"] += f": {step.layout}{too_much}"
    lines["a checkpoint (disk)"] += f", kept: {config.base.keep_checkpoints} + 1"
    return lines


def _time_and_cost(tokens: float, card: Accelerator, step: Step) -> tuple[str, str]:
    secs = tokens / step.tokens * step.secs
    return format_secs(secs), f"${secs / 3600 * step.num_gpus * card.usd_per_hour:,.2f}"


def _time(config: Recipe, card: Accelerator, step: Step, mfu: float) -> dict[str, str]:
    flops = train_flops_per_token(recipe.gpt_config(config))
    rows, peak = step.layout.rows, f"{step.num_gpus} x {card.peak_flops / 1e12:,.0f} TFLOP/s"
    lines = {"a step": f"{step.rows} rows: {rows} a device at once, {step.share // rows} in turn"}
    lines["speed of the model"] = f"{mfu:.0%} of {peak}, {flops:,} FLOPs a token"
    if not step.fits:
        return lines | {"time and cost": "none: a step does not fit into the memory"}
    lines["tokens per second"] = f"{step.tokens / step.secs:,.0f}, communication included"
    costs = stage_costs(config, "gpu")
    costs["all of it"] = sum(costs.values())
    costs = {f"{name.replace('_', ' ')}, about": tokens for name, tokens in costs.items()}
    for name, tokens in ({"pretraining alone": _base_tokens(config)} | costs).items():
        lines[name] = "{:>7}  {}".format(*_time_and_cost(tokens, card, step))
    return lines


def _scale(config: Recipe, card: Accelerator, on: Callable[[int], Step]) -> dict[str, str]:
    """The pretraining on other numbers of GPUs, weights and batch divided over all of them."""
    table = {"ms of a step, a GPU's": "rows model Muon reduce gather useful GiB time cost".split()}
    for step in (on(n) for n in SCALE if n % config.mesh.tensor == 0):
        time, cost = _time_and_cost(_base_tokens(config), card, step)
        cells = [f"{step.share}", *(f"{1e3 * secs:,.1f}" for secs in step.terms.values())]
        cells += [f"{step.efficiency:.0%}", f"{sum(step.memory.values()) / GIB:.0f}"]
        cells += [time, cost[:-3]] if step.fits else ["too much", "-"]
        times = step.tokens / config.base.total_batch_tokens
        cells += [f"  batch x {times:g}: learns less from a token"] * (times > 1)
        table[f"{step.num_gpus:,} GPUs"] = cells
    lines = {name: "".join(f"{cell:>10}" for cell in cells) for name, cells in table.items()}
    lines["useful"] = "share of the time in the model; more if communication overlaps with it"
    best = most_gpus(config, on)
    efficient = f"{best.num_gpus:,} GPUs: {best.efficiency:.0%} useful"
    none = "none: too much for the memory"
    return lines | {"efficient up to": efficient if best.fits else none}


def most_gpus(config: Recipe, on: Callable[[int], Step]) -> Step:
    """On the most GPUs, doubling, that have rows and work on the model half of the time."""
    rows, tensor = config.base.total_batch_tokens // config.model.seq_len, config.mesh.tensor
    counts = [tensor * 2**n for n in range(rows.bit_length()) if rows % 2**n == 0]
    efficient = takewhile(lambda step: step.efficiency >= 0.5, map(on, counts))
    return [on(tensor), *efficient][-1]
