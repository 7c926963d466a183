"""From the few numbers a recipe states to all the numbers a run needs, each with its formula.

Scaling of the modern recipe: batch grows with the horizon^0.383 (arXiv 2505.13738), learning rates
with the square root of the batch, decay so that batch/(lr * decay * horizon) stays what it is at
depth 12 (arXiv 2405.13698).
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from nanochat_jax.common import UserError, log
from nanochat_jax.config import REMOVED, Recipe, flatten
from nanochat_jax.model import fp8
from nanochat_jax.model.accounting import param_counts
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.optim.build import OptimConfig

REFERENCE_DEPTH = 12  # where the modern recipe's numbers were tuned
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383

# What keys of these names may be at least; a 0 that is allowed means "all" or "as in base".
LEAST: dict[str, int] = {"chat_problems": 0, "num_steps": 0, "batch_rows": 0, "eval_questions": 0}
LEAST |= dict.fromkeys("base.num_steps total_batch_tokens device_batch_size".split(), 1)
LEAST |= dict.fromkeys("questions_per_step samples pass_rows slots eval_samples".split(), 1)
LEAST |= dict.fromkeys("max_new_tokens chat_slots chat_samples chat_max_new_tokens".split(), 1)


class Derived(NamedTuple):
    key: str
    text: str  # its value
    formula: str


def resolve(config: Recipe, *, platform: str, num_devices: int) -> list[Derived]:
    """Fill the keys that are None, in place; UserError for values that no run can have. platform:
    cpu or gpu."""
    _check_values(config)
    derived: list[Derived] = []

    def fill(section: str, key: str, value, formula: str) -> None:
        if config[section][key] is None:
            config[section][key] = value
            text = f"{value:,}" if isinstance(value, int) else value
            derived.append(Derived(f"{section}.{key}", text, formula))

    m, b, gpu = config.model, config.base, platform == "gpu"
    fill("model", "model_dim", *model_dim(m.depth, m.aspect_ratio, m.head_dim, m.round_width))
    fill("model", "num_heads", *num_heads(m.model_dim, m.head_dim, m.round_width))
    fill("model", "num_kv_heads", m.num_heads, "num_heads")
    fill("model", "compute_dtype", "bfloat16" if gpu else "float32", f"on {platform}")
    fill("model", "loss_tile_tokens", 8192 if gpu else 512, f"on {platform}")
    split = config.mesh.fsdp * config.mesh.tensor
    fill("mesh", "data", max(1, num_devices // split), f"{num_devices} devices / (fsdp * tensor)")
    if config.optim.scale_by_batch:
        formula = "2^round(log2(2^19 * (horizon / horizon of d12)^0.383))"
        fill("base", "total_batch_tokens", scaled_batch_tokens(config), formula)
    fill("base", "total_batch_tokens", REFERENCE_BATCH_TOKENS, "2^19")
    steps = max(1, horizon_tokens(config, m.depth) // b.total_batch_tokens)
    formula = f"{b.tokens_per_param:g} tokens x parameters ({b.horizon_params})"
    fill("base", "num_steps", steps, f"{formula} / total_batch_tokens")
    assert None not in flatten(config).values()
    return derived


def _check_values(config: Recipe) -> None:
    for key, value in flatten(config).items():
        least = LEAST.get(key, LEAST.get(key.split(".")[1], value))
        if value is not None and value < least:
            raise UserError(f"config.{key} got {value}, expected {least} or more")
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise UserError(f"config.{key} got {value!r}, expected strings in it")
    if (r := config.rl).samples % r.pass_rows:
        expected = f"a divisor of config.rl.samples ({r.samples})"
        raise UserError(f"config.rl.pass_rows got {r.pass_rows}, expected {expected}")
    if r.temperature <= 0:
        raise UserError(f"config.rl.temperature got {r.temperature}, expected more than 0")


def model_dim(depth: int, aspect_ratio: int, head_dim: int, round_width: bool) -> tuple[int, str]:
    width, formula = depth * aspect_ratio, "depth * aspect_ratio"
    if not round_width:
        return width, formula
    return -(-width // head_dim) * head_dim, f"{formula}, up to a multiple of head_dim"


def num_heads(width: int, head_dim: int, round_width: bool) -> tuple[int, str]:
    if round_width:
        return width // head_dim, "model_dim / head_dim"
    ideal = max(1, round(width / head_dim))
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    heads = min(divisors, key=lambda n: (abs(n - ideal), -n))
    return heads, f"divisor of model_dim nearest to model_dim / {head_dim}"


def gpt_config(config: Recipe) -> GPTConfig:
    """The model of a resolved recipe; a training step recomputes as its layout says."""
    m = config.model
    if m.model_dim % m.num_heads or m.num_heads % m.num_kv_heads:
        sizes = f"model_dim {m.model_dim}, num_heads {m.num_heads}, num_kv_heads {m.num_kv_heads}"
        raise UserError(f"config.model got {sizes}; expected each to be a multiple of the next")
    _expect("model.window_pattern", m.window_pattern, ("S", "L"), list(m.window_pattern) or [""])
    _expect("model.remat", m.remat, ("auto", *REMAT))
    _expect("model.fp8_layers", m.fp8_layers, tuple(fp8.LAYERS), m.fp8_layers)
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"remat"}
    keys = {name: m[name] for name in names if name in m}
    return GPTConfig(vocab_size=config.tokenizer.vocab_size, num_layers=m.depth, **keys)


def _expect(key: str, got, known: tuple[str, ...], parts: Sequence[str] | None = None) -> None:
    """UserError unless `got`, or each of its `parts`, is a known word."""
    if not {*([got] if parts is None else parts)} <= {*known}:
        raise UserError(f"config.{key} got {got!r}, expected {' | '.join(known)}")


def horizon_tokens(config: Recipe, depth: int) -> int:
    """Tokens to train for at `depth`, everything else as in the recipe."""
    counted = {"all": ("total",), "matrices_and_head": ("transformer_matrices", "lm_head")}
    kind = config.base.horizon_params
    _expect("base.horizon_params", kind, tuple(counted))
    counts = param_counts(gpt_config(_at_depth(config, depth)))
    return int(config.base.tokens_per_param * sum(counts[name] for name in counted[kind]))


def scaled_batch_tokens(config: Recipe) -> int:
    ratio = horizon_tokens(config, config.model.depth) / horizon_tokens(config, REFERENCE_DEPTH)
    return 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * ratio**BATCH_EXPONENT))


def lr_scale(config: Recipe) -> float:
    batch = config.base.total_batch_tokens / REFERENCE_BATCH_TOKENS
    return math.sqrt(batch) if config.optim.scale_by_batch else 1.0


def weight_decay(config: Recipe) -> float:
    """Muon's decay at step 0."""
    decay, scaled = config.optim.weight_decay, config.optim.scale_by_batch
    reference, horizon = (horizon_tokens(config, d) for d in (REFERENCE_DEPTH, config.model.depth))
    return decay * lr_scale(config) * (reference / horizon) if scaled else decay


def optim_config(
    config: Recipe, platform: str, *, lr_frac: float = 1.0, scalar_frac: float = 1.0, **own: float
) -> OptimConfig:
    """Learning rates at the start. Stages after base give their `own` embed_lr and unembed_lr and
    the fraction of the other rates that they take; they do not scale rates by the batch."""
    o = config.optim
    _expect("optim.recipe", o.recipe, ("classic", "modern"))
    if config.model.extras and o.recipe == "classic":
        what = "expected modern: it alone has settings for the extra parameters"
        raise UserError(f"config.optim.recipe got classic with model.extras, {what}")
    rates = {"embed_lr": o.embed_lr, "unembed_lr": o.unembed_lr} | own
    return OptimConfig(
        recipe=o.recipe,
        embed_lr=lr_frac * rates["embed_lr"],
        unembed_lr=lr_frac * rates["unembed_lr"],
        matrix_lr=lr_frac * o.matrix_lr,
        scalar_lr=lr_frac * scalar_frac * o.scalar_lr,
        smear_lr=lr_frac * scalar_frac * o.smear_lr,
        lr_scale=1.0 if own else lr_scale(config),
        ns_dtype="bfloat16" if platform == "gpu" else "float32",
    )


def rows_per_step(config: Recipe, row_shards: int) -> int:
    """Rows of a step of base."""
    tokens, seq_len = config.base.total_batch_tokens, config.model.seq_len
    if tokens % (row_shards * seq_len):
        what = f"{row_shards} row shards x seq_len {seq_len} = {row_shards * seq_len}"
        raise UserError(
            f"config.base.total_batch_tokens got {tokens}, expected a multiple of {what}"
        )
    return tokens // seq_len


def _at_depth(config: Recipe, depth: int) -> Recipe:
    """The recipe at another depth, width and heads derived anew."""
    if depth == config.model.depth:
        return config
    config = copy.deepcopy(config)
    m = config.model
    m.depth = depth
    m.model_dim = model_dim(depth, m.aspect_ratio, m.head_dim, m.round_width)[0]
    m.num_heads = m.num_kv_heads = num_heads(m.model_dim, m.head_dim, m.round_width)[0]
    return config


def refuse_changes(before: dict, now: dict, may_change: tuple[str, ...], what: str) -> None:
    """UserError if `what` was made with another recipe, both flat; prints the changes allowed.
    may_change: keys, or prefixes of keys, that decide where and how often but never what."""
    refused = []
    for key in [key for key in before | now if key not in REMOVED]:
        was, value = _plain(before.get(key)), _plain(now.get(key))
        line = f"config.{key} was {was!r}, now {value!r}"
        if was != value and key.startswith(may_change):
            log(f"  {line} (allowed)")
        elif was != value:
            refused.append(line)
    if refused:
        allowed = f" (may change: {', '.join(may_change)})" if may_change else ""
        how = f"take these back, or choose another --config.run.name{allowed}"
        raise UserError(f"{what} was made with another recipe: {'; '.join(refused)}; {how}")


def flat_json(config: Recipe, prefix: str) -> dict:
    """The keys below `prefix`, as they come back from JSON."""
    return {k: _plain(v) for k, v in flatten(config).items() if k.startswith(prefix)}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
