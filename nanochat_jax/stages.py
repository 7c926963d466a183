"""START HERE: the stages, each a short story told in the order it happens.

  run_data -> run_tokenizer -> run_tok_eval -> run_base -> run_base_eval -> (report.py)

Each takes the whole recipe and hands its parts on as plain arguments. A stage that is complete says
so and returns; one that was interrupted continues; one whose recipe changed names the keys and
refuses. What a stage leaves lies in $NANOCHAT_BASE_DIR/runs/<config.run.name>/.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax import hardware, recipe
from nanochat_jax.common import (
    EXIT_RESUME_ME,
    UserError,
    locked,
    log,
    read_json,
    run_dir,
    sha256_file,
    write_json,
)
from nanochat_jax.config import Recipe, flatten
from nanochat_jax.data.pipeline import eval_batches, merge_states, train_batches
from nanochat_jax.data.prepare import ensure
from nanochat_jax.data.sources import Corpus
from nanochat_jax.eval import compression, ngram
from nanochat_jax.eval.bpb import make_bpb
from nanochat_jax.inference.sampling import generate_greedy
from nanochat_jax.model.accounting import param_counts, train_flops_per_token
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh, num_row_shards, param_shardings
from nanochat_jax.optim import schedules
from nanochat_jax.optim.build import build_optimizer
from nanochat_jax.provenance import RunInfo, only_one
from nanochat_jax.runtime import compile_step, require_memory, start_runtime
from nanochat_jax.tokenizer import bpe
from nanochat_jax.train.checkpoint import (
    CHECKSUMS,
    Checkpoints,
    damage,
    list_steps,
    read_data_states,
    read_host,
    restore_params,
    step_dir,
)
from nanochat_jax.train.loop import Evaluation, LoopState, fit
from nanochat_jax.train.metrics import Console, MetricsLog, format_secs
from nanochat_jax.train.state import abstract_state, create_state
from nanochat_jax.train.step import loss_tile, make_train_step, put_batch

# What may differ when a run is continued: it decides where and how often, never what is learned.
MAY_CHANGE = (
    "run.tracker",
    "run.compile_cache",
    "mesh.",
    "data.local_dir",
    "data.num_workers",
    "data.prefetch_batches",
    "base.device_batch_size",
    "base.eval_every",
    "base.sample_every",
    "base.save_every",
    "base.keep_checkpoints",
    "model.remat",
    "model.loss_tile_tokens",
    "eval.",
)
TOKENIZER_KEYS = ("tokenizer.", "data.name", "data.local_dir", "data.num_shards")


@dataclass
class Run:
    """What every stage on devices starts from."""

    config: Recipe  # resolved
    mesh: Mesh
    model: GPTConfig
    dir: Path
    is_main: bool


def run_data(config: Recipe) -> tuple[list[Path], Path]:
    """(training shards, validation shard); downloaded or built if they are not there."""
    d = config.data
    return ensure(d.name, num_shards=d.num_shards, local_dir=d.local_dir)


def run_tokenizer(config: Recipe) -> bpe.Tokenizer:
    """Train the tokenizer on the first characters of the training text, or load it."""
    folder = run_dir(config.run.name) / "tokenizer"
    wanted = {k: v for k, v in flatten(config).items() if k.startswith(TOKENIZER_KEYS)}
    with locked(folder / "tokenizer.json"):  # processes that ask at once wait for the one at work
        if not (folder / "tokenizer.json").exists():
            return _train_tokenizer(config, folder, wanted)
    made_with = read_json(folder / "config.json", f"delete {folder} to train it again")
    recipe.refuse_changes(made_with, wanted, ("data.local_dir",), f"the tokenizer in {folder}")
    log(f"tokenizer: {folder / 'tokenizer.json'} is there")
    return bpe.Tokenizer.load(folder)


def _train_tokenizer(config: Recipe, folder: Path, wanted: dict[str, Any]) -> bpe.Tokenizer:
    train_paths, _ = run_data(config)
    t = config.tokenizer
    log(f"tokenizer: training {t.vocab_size:,} tokens on up to {t.train_chars:,} characters")
    info = RunInfo(folder)
    texts = bpe.capped(documents(train_paths), t.train_chars, t.doc_chars)
    tokenizer = bpe.train(texts, t.vocab_size)
    write_json(folder / "config.json", wanted)
    tokenizer.save(folder)
    info.update()
    log(f"tokenizer: {tokenizer.vocab_size:,} tokens in {format_secs(info.values['wall_secs'])}")
    return tokenizer


def run_tok_eval(config: Recipe) -> None:
    """How many bytes a token holds, by kind of text, beside GPT-2's and GPT-4's encodings."""
    tokenizer = run_tokenizer(config)
    out = run_dir(config.run.name) / "eval" / "tokenizer.json"
    if out.exists() and read_json(out, "delete it").get("sha256") == tokenizer.sha256():
        log(f"tok_eval: {out} is there")
        return
    train_paths, val_path = run_data(config)
    slices = {
        "training text": "\n".join(itertools.islice(documents(train_paths), 200))[:200_000],
        "validation text": "\n".join(itertools.islice(documents([val_path]), 200))[:200_000],
    }
    result = compression.compare(tokenizer, slices)
    log(compression.table(result))
    write_json(out, {"sha256": tokenizer.sha256(), **result})


def run_base(config: Recipe) -> int:
    """Pretrain the base model; returns the exit status."""
    run = start(config)
    config, stage = run.config, run.dir / "base"
    with only_one(stage) if run.is_main else nullcontext():
        if (stage / "result.json").exists():
            saved = read_json(stage / "config.json", f"delete {stage} to start over")
            _same_recipe(config, saved, stage)
            log(f"base: complete, {stage / 'result.json'} is there")
            return 0
        return _train_base(run, stage)


def _train_base(run: Run, stage: Path) -> int:
    config, mesh, model = run.config, run.mesh, run.model
    b, d = config.base, config.data
    lr_multiplier = partial(
        schedules.lr_multiplier,
        num_steps=b.num_steps,
        warmup_steps=b.warmup_steps,
        warmdown_frac=b.warmdown_frac,
        final_frac=b.final_lr_frac,
    )
    tx = _optimizer(config, model, lr_multiplier)
    target = abstract_state(model, tx, mesh)
    require_memory(target, mesh)  # before the download that would be for nothing
    info = RunInfo(stage, run.is_main)
    tokenizer = run_tokenizer(config)
    train_paths, val_path = run_data(config)
    rows, rows_at_once = recipe.rows_per_step(config, num_row_shards(mesh))
    batches = train_batches(
        train_paths,
        tokenizer,
        seq_len=model.seq_len,
        batch_rows=rows,
        packing=d.packing,
        buffer_docs=d.buffer_docs,
        num_lanes=d.num_lanes,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=d.num_workers,
        prefetch=d.prefetch_batches,
    )

    train_step = make_train_step(
        model,
        tx,
        mesh,
        device_batch_size=rows_at_once,
        tile_tokens=config.model.loss_tile_tokens,
        grad_clip=config.optim.grad_clip,
    )
    checkpoints = Checkpoints(stage / "checkpoints", b.keep_checkpoints)
    found, loop_state = checkpoints.latest_intact(), LoopState()
    if found is not None:
        host = read_host(checkpoints.directory, found)
        _same_run(config, tokenizer, host, stage)
        batches.set_state(merge_states(read_data_states(checkpoints.directory, found)))
        loop_state = LoopState(**host["loop"])
        log(f"base: continuing from the checkpoint at step {found}")
    batches.start_prefetch()  # the first batches are packed while the step is compiled

    train_step = compile_step(train_step, target, rows, model.seq_len, mesh)
    if found is None:
        state = create_state(model, tx, mesh, config.run.seed)
    else:
        state = checkpoints.restore(target, found)

    if run.is_main:
        write_json(stage / "config.json", config.to_dict())
    flops = train_flops_per_token(model)
    device = mesh.devices.flat[0]
    peak, peak_source = hardware.compute_ceiling(device.platform, device.device_kind, mesh.size)
    info.values |= {
        "params": param_counts(model),
        "flops_per_token": flops,
        "tokens_per_step": b.total_batch_tokens,
        "num_steps": b.num_steps,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
    }
    info.update()
    step_flops = flops * b.total_batch_tokens
    log(f"base: a step is {step_flops / 1e12:,.1f} TFLOP; MFU is against {peak_source}")
    if peak:
        at_best = b.num_steps * step_flops / peak
        log(f"base: {peak / 1e12:,.2f} TFLOP/s, so all steps take {format_secs(at_best)} at best")
    metrics = MetricsLog(
        stage / "metrics.jsonl", int(state.step), config.run.tracker, config.run.name, run.is_main
    )
    console = Console(b.num_steps, int(state.step), flops, peak)
    bpb, samples = _bpb(run, tokenizer, val_path), _samples(run, tokenizer)
    with closing(batches), closing(metrics), closing(console):
        result = fit(
            state=state,
            loop_state=loop_state,
            train_step=train_step,
            batches=batches,
            put=partial(put_batch, mesh=mesh),
            num_steps=b.num_steps,
            lr_multiplier=lr_multiplier,
            evaluations=[
                Evaluation("bpb", b.eval_every, lambda params: {"val_bpb": bpb(params)}),
                Evaluation("samples", b.sample_every, lambda params: {"samples": samples(params)}),
            ],
            save_every=b.save_every,
            checkpoints=checkpoints,
            on_save=info.update,
            host_info={"config": config.to_dict(), "tokenizer_sha256": tokenizer.sha256()},
            metrics=metrics,
            console=console,
            tokens_per_step=b.total_batch_tokens,
        )
    info.values["documents"] = counts = batches.counts()
    info.update()
    log("base: text read so far: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    if not result.finished:
        log(f"base: stopped at step {result.step}, saved; run the same command to continue")
        return EXIT_RESUME_ME
    if run.is_main:
        write_json(
            stage / "result.json", {"step": result.step, "elapsed_secs": loop_state.elapsed_secs}
        )
    return 0


def run_base_eval(config: Recipe) -> None:
    """Evaluate the base model: bits per byte on both texts, a trigram as yardstick, samples."""
    run = start(config)
    config, out = run.config, run.dir / "eval" / "base.json"
    folder = run.dir / "base" / "checkpoints"
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; run scripts/train.py with this recipe first")
    if lines := damage(folder, steps[-1]):
        done = run.dir / "base" / "result.json"
        raise UserError(f"{lines[0]}; delete {done} and run scripts/train.py again")
    settings = {
        "checkpoint": sha256_file(step_dir(folder, steps[-1]) / CHECKSUMS),
        **recipe.flat_json(config, "eval."),
    }
    if out.exists() and read_json(out, "delete it").get("settings") == settings:
        log(f"base_eval: {out} is there, of step {steps[-1]}")
        return
    began = time.monotonic()
    tokenizer = run_tokenizer(config)
    _same_run(config, tokenizer, read_host(folder, steps[-1]), run.dir / "base")
    train_paths, val_path = run_data(config)
    shardings = param_shardings(run.mesh, param_shapes(run.model))
    params = restore_params(folder, steps[-1], shardings)

    values: dict[str, Any] = {"step": steps[-1]}
    values["val_bpb"] = _bpb(run, tokenizer, val_path)(params)
    values["train_bpb"] = _bpb(run, tokenizer, train_paths[0])(params)
    if config.eval.trigram_tokens:
        values |= _trigrams(run, tokenizer, train_paths, val_path)
    values["samples"] = _samples(run, tokenizer)(params)
    for name, value in values.items():
        if isinstance(value, float):
            log(f"base_eval: {name} {value:.4f}")
    for sample in values["samples"]:
        log(f"  {sample['prompt']!r} -> {sample['text']!r}")
    values |= {"eval_secs": time.monotonic() - began, "settings": settings}
    if run.is_main:
        write_json(out, values)


def start(config: Recipe) -> Run:
    """Devices, mesh and the resolved recipe; prints what was derived and how."""
    m = config.mesh
    start_runtime(
        compile_cache=config.run.compile_cache,
        coordinator=m.coordinator,
        num_processes=m.num_processes,
        process_id=m.process_id,
    )
    for key, value, formula in recipe.resolve(
        config, platform=jax.default_backend(), num_devices=jax.device_count()
    ):
        log(f"  {key} = {value:,}  ({formula})" if isinstance(value, int) else f"  {key} = {value}")
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    if num_row_shards(mesh) % jax.process_count():
        raise UserError(
            f"config.mesh got data x fsdp = {num_row_shards(mesh)} row shards for "
            f"{jax.process_count()} processes, expected a multiple; lower config.mesh.tensor"
        )
    folder = run_dir(config.run.name)
    return Run(config, mesh, recipe.gpt_config(config), folder, jax.process_index() == 0)


def documents(paths: list[Path]) -> Iterator[str]:
    """The texts of some shards, in order."""
    corpus = Corpus(paths)
    for group in range(len(corpus.row_groups)):
        yield from corpus.read(group).texts


def _optimizer(config: Recipe, model: GPTConfig, lr_multiplier):
    b, o = config.base, config.optim
    decay = recipe.weight_decay(config)
    return build_optimizer(
        param_shapes(model),
        model.model_dim,
        recipe.optim_config(config, jax.default_backend()),
        lr_multiplier=lr_multiplier,
        momentum=partial(
            schedules.muon_momentum,
            num_steps=b.num_steps,
            warmdown_frac=b.warmdown_frac,
            start=o.momentum_start,
            peak=o.momentum,
            end=o.momentum_end,
            warmup_steps=o.momentum_warmup_steps,
        ),
        weight_decay=lambda step: decay * schedules.cosine_to_zero(step, num_steps=b.num_steps),
    )


def _bpb(run: Run, tokenizer: bpe.Tokenizer, path: Path) -> Callable[[dict], float]:
    """params -> bits per byte over the first eval.val_tokens of the shard at `path`."""
    e, model = run.config.eval, run.model
    rows = e.device_batch_size * num_row_shards(run.mesh)
    batches = eval_batches(
        path,
        tokenizer,
        seq_len=model.seq_len,
        batch_rows=rows,
        num_batches=max(1, e.val_tokens // (rows * model.seq_len)),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    tile = loss_tile(run.config.model.loss_tile_tokens, e.device_batch_size, model.seq_len)
    bpb = make_bpb(model, run.mesh, tokenizer.token_bytes(), tile)
    return lambda params: bpb(params, (put_batch(batch, run.mesh) for batch in batches))


def _samples(run: Run, tokenizer: bpe.Tokenizer) -> Callable[[dict], list[dict[str, str]]]:
    """params -> the recipe's prompts with their greedy continuations."""
    e = run.config.eval
    ids = [tokenizer.encode(prompt, bos=True) for prompt in e.prompts]

    def samples(params: dict) -> list[dict[str, str]]:
        new = generate_greedy(run.model, params, ids, e.sample_tokens)
        # Too little text makes a smaller vocabulary than the model's: the ids above mean nothing.
        texts = [tokenizer.decode([i for i in row if i < tokenizer.vocab_size]) for row in new]
        return [{"prompt": p, "text": t} for p, t in zip(e.prompts, texts, strict=True)]

    return samples


def _trigrams(
    run: Run, tokenizer: bpe.Tokenizer, train_paths: list[Path], val_path: Path
) -> dict[str, float]:
    """Bits per byte on the validation rows of trigram models of the same training text."""
    e, model = run.config.eval, run.model

    def rows(paths: list[Path], tokens: int, packing: str) -> list[np.ndarray]:
        batches = eval_batches(
            paths,
            tokenizer,
            packing=packing,
            seq_len=model.seq_len,
            batch_rows=e.device_batch_size,
            num_batches=max(1, tokens // (e.device_batch_size * model.seq_len)),
        )
        return [np.concatenate([b["inputs"], b["targets"][:, -1:]], axis=1) for b in batches]

    # Trained on the rows the model trains on, scored on the rows it is scored on.
    train = rows(train_paths, e.trigram_tokens, run.config.data.packing)
    val = rows([val_path], e.val_tokens, "best_fit")
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    pieces = [p if n else b"" for p, n in zip(pieces, tokenizer.token_bytes(), strict=True)]
    token_bytes = tokenizer.token_bytes()
    return {
        "trigram_val_bpb": ngram.trigram_bpb(
            train, val, token_bytes=token_bytes, vocab_size=tokenizer.vocab_size
        ),
        "byte_trigram_val_bpb": ngram.byte_trigram_bpb(train, val, pieces=pieces),
    }


def _same_recipe(config: Recipe, saved: dict[str, Any], stage: Path) -> None:
    before = {f"{s}.{k}": v for s, keys in saved.items() for k, v in keys.items()}
    recipe.refuse_changes(before, flatten(config), MAY_CHANGE, f"the run in {stage}")


def _same_run(config: Recipe, tokenizer: bpe.Tokenizer, host: dict[str, Any], stage: Path) -> None:
    """A checkpoint can be continued: same recipe, same tokenizer."""
    _same_recipe(config, host["config"], stage)
    if host["tokenizer_sha256"] != tokenizer.sha256():
        raise UserError(
            f"the checkpoint in {stage} was trained with another tokenizer (SHA-256 "
            f"{host['tokenizer_sha256'][:12]}..., now {tokenizer.sha256()[:12]}...); put that one "
            "back, or choose another --config.run.name"
        )
