"""The first stages: text to train on, a tokenizer for it, and how well that compresses."""

import itertools
from pathlib import Path

from nanochat_jax import recipe
from nanochat_jax.common import locked, log, read_json, run_dir, write_json
from nanochat_jax.config import Recipe, flatten
from nanochat_jax.data.datasets import ensure
from nanochat_jax.data.sources import Corpus
from nanochat_jax.eval import compression
from nanochat_jax.launch.provenance import RunInfo
from nanochat_jax.tokenizer import bpe
from nanochat_jax.train.metrics import format_secs

TOKENIZER_KEYS = ("tokenizer.", "data.name", "data.local_dir", "data.num_shards")


def run_data(config: Recipe) -> tuple[list[Path], Path]:
    """(training shards, validation shard); downloaded or built if they are not there."""
    d = config.data
    return ensure(d.name, num_shards=d.num_shards, local_dir=d.local_dir)


def run_tokenizer(config: Recipe) -> bpe.Tokenizer:
    """Train the tokenizer on the first characters of the training text, or load it."""
    folder = run_dir(config.run.name) / "tokenizer"
    wanted = {k: v for k, v in flatten(config).items() if k.startswith(TOKENIZER_KEYS)}
    with locked(path := folder / "tokenizer.json"):  # who asks at the same time waits
        if path.exists():
            made_with = read_json(folder / "config.json", f"delete {folder} to train it again")
            what = f"the tokenizer in {folder}"
            recipe.refuse_changes(made_with, wanted, ("data.local_dir",), what)
            log(f"tokenizer: {path} is there")
            return bpe.Tokenizer.load(folder)
        train_paths, t = run_data(config)[0], config.tokenizer
        log(f"tokenizer: training {t.vocab_size:,} tokens on up to {t.train_chars:,} characters")
        info = RunInfo(folder)
        texts = bpe.capped(Corpus(train_paths).texts(), t.train_chars, t.doc_chars)
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
    texts = {"training text": train_paths, "validation text": [val_path]}
    slices = {kind: itertools.islice(Corpus(paths).texts(), 200) for kind, paths in texts.items()}
    beginnings = {kind: "\n".join(documents)[:200_000] for kind, documents in slices.items()}
    result = compression.compare(tokenizer, beginnings)
    log(compression.table(result))
    write_json(out, {"sha256": tokenizer.sha256(), **result})
