"""From the few numbers a recipe states to all the numbers a run needs, each with its formula.

depth -> width -> parameters -> horizon -> batch -> learning rates, decay, steps. `resolve` fills
every key that is still None and returns what it derived and how, so that a run can print it and a
checkpoint can hold the whole truth. Nothing here touches a device.

Scaling of the modern recipe: batch grows with the horizon^0.383 (arXiv 2505.13738), learning rates
with the square root of the batch, decay so that batch/(lr * decay * horizon) stays what it is at
depth 12 (arXiv 2405.13698).
"""

import copy
import math
from typing import NamedTuple

from nanochat_jax.common import UserError, log
from nanochat_jax.config import Recipe, flatten
from nanochat_jax.model import fp8
from nanochat_jax.model.accounting import param_counts
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.optim.build import OptimConfig

REFERENCE_DEPTH = 12  # where the modern recipe's numbers were tuned
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383

LEAST = {  # what a key may be at least; a 0 that is allowed means "all" or "as in base"
    **dict.fromkeys((f"{s}.num_steps" for s in ("mid", "sft", "rl")), 0),
    **dict.fromkeys(("mid.batch_rows", "sft.batch_rows"), 0),
    **dict.fromkeys(("rl.eval_questions", "eval.chat_problems"), 0),
    **dict.fromkeys(("base.num_steps", "base.total_batch_tokens"), 1),
    **dict.fromkeys((f"rl.{k}" for k in ("samples", "eval_samples", "slots", "max_new_tokens")), 1),
    **dict.fromkeys((f"eval.chat_{k}" for k in ("slots", "samples", "max_new_tokens")), 1),
}


class Derived(NamedTuple):
    key: str
    value: object
    formula: str


def resolve(config: Recipe, *, platform: str, num_devices: int) -> list[Derived]:
    """Fill the keys that are None, in place. platform: "cpu" or "gpu". UserError for values that
    no run can have."""
    _check_values(config)
    derived: list[Derived] = []

    def fill(section: str, key: str, value, formula: str) -> None:
        if config[section][key] is None:
            config[section][key] = value
            derived.append(Derived(f"{section}.{key}", value, formula))

    m = config.model
    gpu = platform == "gpu"
    fill("model", "model_dim", *model_dim(m.depth, m.aspect_ratio, m.head_dim, m.round_width))
    fill("model", "num_heads", *num_heads(m.model_dim, m.head_dim, m.round_width))
    fill("model", "num_kv_heads", m.num_heads, "num_heads")
    fill("model", "compute_dtype", "bfloat16" if gpu else "float32", f"on {platform}")
    fill("model", "loss_tile_tokens", 8192 if gpu else 512, f"on {platform}")

    split = config.mesh.fsdp * config.mesh.tensor
    fill("mesh", "data", max(1, num_devices // split), f"{num_devices} devices / (fsdp * tensor)")

    horizon = horizon_tokens(config, config.model.depth)
    if config.optim.scale_by_batch:
        batch = scaled_batch_tokens(config)
        formula = "2^round(log2(2^19 * (horizon / horizon of d12)^0.383))"
    else:
        batch, formula = REFERENCE_BATCH_TOKENS, "2^19"
    fill("base", "total_batch_tokens", batch, formula)
    steps = horizon // config.base.total_batch_tokens
    params = config.base.horizon_params
    fill(
        "base",
        "num_steps",
        max(1, steps),
        f"{config.base.tokens_per_param:g} tokens x parameters ({params}) / total_batch_tokens",
    )
    missing = [key for key, value in flatten(config).items() if value is None]
    assert not missing, missing
    return derived


def _check_values(config: Recipe) -> None:
    for key, value in flatten(config).items():
        if value is not None and value < LEAST.get(key, value):
            raise UserError(f"config.{key} got {value}, expected {LEAST[key]} or more")
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise UserError(f"config.{key} got {value!r}, expected strings in it")


def model_dim(depth: int, aspect_ratio: int, head_dim: int, round_width: bool) -> tuple[int, str]:
    width = depth * aspect_ratio
    if not round_width:
        return width, "depth * aspect_ratio"
    return -(-width // head_dim) * head_dim, "depth * aspect_ratio, up to a multiple of head_dim"


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
        raise UserError(
            f"config.model got model_dim {m.model_dim}, num_heads {m.num_heads}, num_kv_heads "
            f"{m.num_kv_heads}; expected each to be a multiple of the next"
        )
    if set(m.window_pattern) - {"S", "L"} or not m.window_pattern:
        raise UserError(f"config.model.window_pattern got {m.window_pattern!r}, expected S and L")
    if m.remat not in ("auto", *REMAT):
        raise UserError(
            f"config.model.remat got {m.remat!r}, expected auto, {', '.join(REMAT[:-1])} or "
            f"{REMAT[-1]}"
        )
    if unknown := set(m.fp8_layers) - set(fp8.LAYERS):
        raise UserError(
            f"config.model.fp8_layers got {', '.join(sorted(unknown))}, expected some of "
            f"{', '.join(fp8.LAYERS)}, or () for none"
        )
    return GPTConfig(
        vocab_size=config.tokenizer.vocab_size,
        num_layers=m.depth,
        model_dim=m.model_dim,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        seq_len=m.seq_len,
        rope_base=m.rope_base,
        window_pattern=m.window_pattern,
        qk_scale=m.qk_scale,
        extras=m.extras,
        embed_init_std=m.embed_init_std,
        fc_init_scale=m.fc_init_scale,
        compute_dtype=m.compute_dtype,
        fp8_layers=m.fp8_layers,
    )


def horizon_tokens(config: Recipe, depth: int) -> int:
    """Tokens to train for at `depth`, everything else as in the recipe."""
    kind = config.base.horizon_params
    if kind not in ("all", "matrices_and_head"):
        raise UserError(
            f"config.base.horizon_params got {kind!r}, expected all or matrices_and_head"
        )
    counts = param_counts(gpt_config(_at_depth(config, depth)))
    counted = {
        "all": counts["total"],
        "matrices_and_head": counts["transformer_matrices"] + counts["lm_head"],
    }[kind]
    return int(config.base.tokens_per_param * counted)


def scaled_batch_tokens(config: Recipe) -> int:
    ratio = horizon_tokens(config, config.model.depth) / horizon_tokens(config, REFERENCE_DEPTH)
    return 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * ratio**BATCH_EXPONENT))


def lr_scale(config: Recipe) -> float:
    if not config.optim.scale_by_batch:
        return 1.0
    return math.sqrt(config.base.total_batch_tokens / REFERENCE_BATCH_TOKENS)


def weight_decay(config: Recipe) -> float:
    """Muon's decay at step 0."""
    if not config.optim.scale_by_batch:
        return config.optim.weight_decay
    horizons = horizon_tokens(config, REFERENCE_DEPTH) / horizon_tokens(config, config.model.depth)
    return config.optim.weight_decay * lr_scale(config) * horizons


def optim_config(
    config: Recipe,
    platform: str,
    *,
    embed_lr: float | None = None,
    unembed_lr: float | None = None,
    lr_frac: float = 1.0,
    scalar_frac: float = 1.0,
) -> OptimConfig:
    """Learning rates at the start; a stage after base has its own embed_lr and unembed_lr, takes a
    fraction, of the scalars' perhaps a fraction of that, and does not scale by the batch."""
    o = config.optim
    if o.recipe not in ("classic", "modern"):
        raise UserError(f"config.optim.recipe got {o.recipe!r}, expected classic or modern")
    if config.model.extras and o.recipe == "classic":
        raise UserError(
            "config.model.extras=True got config.optim.recipe=classic, expected modern: only that "
            "one has settings for the extra parameters"
        )
    return OptimConfig(
        recipe=o.recipe,
        embed_lr=lr_frac * (o.embed_lr if embed_lr is None else embed_lr),
        unembed_lr=lr_frac * (o.unembed_lr if unembed_lr is None else unembed_lr),
        matrix_lr=lr_frac * o.matrix_lr,
        scalar_lr=lr_frac * scalar_frac * o.scalar_lr,
        smear_lr=lr_frac * scalar_frac * o.smear_lr,
        lr_scale=lr_scale(config) if embed_lr is None else 1.0,
        ns_dtype="bfloat16" if platform == "gpu" else "float32",
    )


def rows_per_step(config: Recipe, row_shards: int) -> tuple[int, int]:
    """(rows of a step of base, the most a device works on at once)."""
    tokens, seq_len = config.base.total_batch_tokens, config.model.seq_len
    rows = tokens // seq_len
    if tokens % seq_len or rows % row_shards or not rows:
        raise UserError(
            f"config.base.total_batch_tokens got {tokens}, expected a multiple of {row_shards} row "
            f"shards x seq_len {seq_len} = {row_shards * seq_len}"
        )
    return rows, rows_at_once("base", rows, row_shards, config.base.device_batch_size)


def rows_at_once(stage: str, rows: int, row_shards: int, limit: int) -> int:
    """The most rows a device works on at once: the largest divisor of its share that `limit`
    allows."""
    if rows % row_shards:
        raise UserError(f"{stage}: got {rows} rows a step, expected a multiple of {row_shards}")
    if limit < 1:
        raise UserError(f"config.{stage}.device_batch_size got {limit}, expected at least 1")
    share = rows // row_shards
    return max(n for n in range(1, min(share, limit) + 1) if share % n == 0)


def check_rl(config: Recipe) -> None:
    r = config.rl
    if r.questions_per_step < 1:
        raise UserError(
            f"config.rl.questions_per_step got {r.questions_per_step}, expected 1 or more"
        )
    if r.pass_rows < 1 or r.samples % r.pass_rows:
        raise UserError(
            f"config.rl.pass_rows got {r.pass_rows}, expected a divisor of config.rl.samples "
            f"({r.samples})"
        )
    if r.temperature <= 0:
        raise UserError(f"config.rl.temperature got {r.temperature}, expected more than 0")


def _at_depth(config: Recipe, depth: int) -> Recipe:
    """The recipe at another depth, width and heads derived anew unless they are this depth's."""
    if depth == config.model.depth:
        return config
    config = copy.deepcopy(config)
    m = config.model
    m.depth = depth
    m.model_dim = model_dim(depth, m.aspect_ratio, m.head_dim, m.round_width)[0]
    m.num_heads = m.num_kv_heads = num_heads(m.model_dim, m.head_dim, m.round_width)[0]
    return config


def refuse_changes(before: dict, now: dict, may_change: tuple[str, ...], what: str) -> None:
    """Continue `what` only under the recipe it was made with, both flat; prints the changes
    allowed.

    may_change: keys, or prefixes of keys, that decide where and how often but never what.
    """
    changed = [k for k in before | now if _plain(before.get(k)) != _plain(now.get(k))]
    shown = [f"config.{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed]
    refused = [line for k, line in zip(changed, shown, strict=True) if not k.startswith(may_change)]
    if refused:
        raise UserError(
            f"{what} was made with another recipe: {'; '.join(refused)}; take these back, or "
            "choose another --config.run.name"
            + (f" (these may change: {', '.join(may_change)})" if may_change else "")
        )
    for line in shown:
        log(f"  {line} (allowed)")


def flat_json(config: Recipe, prefix: str) -> dict:
    """The keys below `prefix`, as they come back from JSON."""
    return {k: _plain(v) for k, v in flatten(config).items() if k.startswith(prefix)}


def _plain(value):
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value
