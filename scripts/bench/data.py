"""The data pipeline, text in, batches out, on the CPU alone; one JSON line last.

  python scripts/bench/data.py --config=configs/gpt2.py                        synthetic text
  python scripts/bench/data.py --config=configs/d20.py --shard=FILE.parquet    your own

Tokens are those of the batches handed out, N of them with --tokens=N; packing that drops tokens
encodes more. A core-second is one of CPU time. For comparison: an H100 trains on at most 184,000
tokens/s of d20 (65% of its peak), eight on 983,000 of gpt2 (upstream's dev/LEADERBOARD.md, fp8).
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax import config as cfg
from nanochat_jax.common import run_main
from nanochat_jax.data.lanes import DataOrder
from nanochat_jax.data.pipeline import TrainBatches
from nanochat_jax.data.shards import write_shard
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tokenizer import bpe
from scripts.bench import common

TEXTS = 5_000  # that the tokenizer is trained on


def run(config: cfg.Recipe, shard: Path, num_tokens: int) -> list[dict]:
    corpus, d, seq_len = Corpus([shard]), config.data, config.model.seq_len
    tokenizer = bpe.train(islice(corpus.texts(), TEXTS), config.tokenizer.vocab_size)
    batch_rows = d.num_lanes * config.base.device_batch_size
    order = DataOrder(corpus, tokenizer, seq_len, d.packing, d.buffer_docs, d.num_lanes)
    batches = TrainBatches(order, batch_rows=batch_rows, prefetch=d.prefetch_batches)
    for _ in range(d.prefetch_batches + 2):  # buffers filled, threads running
        next(batches)
    num_batches = max(1, num_tokens // (batch_rows * seq_len))
    cropped = batches.counts()["cropped_tokens"]
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    secs, cpu = time.perf_counter() - began, time.process_time() - cpu
    cropped = batches.counts()["cropped_tokens"] - cropped
    batches.close()
    tokens = num_batches * batch_rows * seq_len
    by_a_core = {"unit": "tok/core-second"}
    return [
        {"what": "batches", "value": tokens / secs, "unit": "tok/s"},
        {"what": "batches, by a core", "value": tokens / cpu} | by_a_core,
        {"what": "encoded for them", "value": (tokens + cropped) / cpu} | by_a_core,
    ]


def make_shard(path: Path) -> Path:
    """About 20 MB of words of Zipf's frequencies, in documents of log-normal length."""
    rng, letters = np.random.default_rng(0), list("etaoinshrdlcumwfgypbvk")
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(20_000)])
    lengths = rng.lognormal(6.1, 0.9, 8_000).astype(int) + 20
    write_shard(path, [" ".join(words[rng.zipf(1.2, n) % len(words)]) for n in lengths])
    return path


def main() -> None:
    path, overrides, rest = cfg.parse_argv(sys.argv[1:], __doc__)
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    args, config = parser.parse_args(rest), cfg.load(path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        shard = args.shard or make_shard(Path(folder) / "shard_00000.parquet")
        rows = run(config, shard, args.tokens)
    common.finish("data", rows, text=str(args.shard or "synthetic"), config=cfg.flatten(config))


if __name__ == "__main__":
    run_main(main)
