"""The data pipeline, text in, batches out, on the CPU alone; one JSON line last.

  python scripts/bench/data.py --config=configs/gpt2.py                        synthetic text
  python scripts/bench/data.py --config=configs/d20.py --shard=FILE.parquet    your own

Tokens are those of the batches handed out, N of them with --tokens=N; packing that drops tokens
encodes more. A core-second is one of CPU time. The last rows compare with what eight H100s train
on: how many GPUs one core feeds, and how many cores feed all of them.
"""

import argparse
import random
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax import config as cfg
from nanochat_jax.common import run_main
from nanochat_jax.data.lanes import DataOrder
from nanochat_jax.data.pipeline import train_batches
from nanochat_jax.data.shards import write_shard
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tokenizer import bpe
from scripts.bench import common
from scripts.bench.common import Row

GPUS = 8
TEXTS = 5_000  # that the tokenizer is trained on
# Tokens/s that an H100 trains on: in d20 65% of its bfloat16 peak of 989 TFLOP/s at 3.492 GFLOP a
# token, more than has been published; in gpt2 upstream's fastest run, 5.84G tokens in 99 minutes on
# eight, with fp8 (its dev/LEADERBOARD.md).
TRAINED_BY_A_GPU = {"d20": 184_000, "gpt2": 5.84e9 / (99 * 60) / 8}


def run(config: cfg.Recipe, shard: Path, num_tokens: int) -> list[Row]:
    corpus, d, seq_len = Corpus([shard]), config.data, config.model.seq_len
    tokenizer = bpe.train(islice(corpus.texts(), TEXTS), config.tokenizer.vocab_size)
    batch_rows = d.num_lanes * config.base.device_batch_size
    order = DataOrder(corpus, tokenizer, seq_len, d.packing, d.buffer_docs, d.num_lanes)
    batches = train_batches(order, batch_rows=batch_rows, prefetch=d.prefetch_batches)
    for _ in range(d.prefetch_batches + 2):  # buffers filled, threads running
        next(batches)
    num_batches = max(1, num_tokens // (batch_rows * seq_len))
    cropped, cpu, began = batches.counts()["cropped_tokens"], cpu_secs(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    secs, cpu = time.perf_counter() - began, cpu_secs() - cpu
    cropped = batches.counts()["cropped_tokens"] - cropped
    batches.close()
    tokens = num_batches * batch_rows * seq_len
    rows = [
        Row("batches", value=tokens / secs, unit="tok/s"),
        Row("batches, by a core", value=tokens / cpu, unit="tok/core-second"),
        Row("encoded for them", value=(tokens + cropped) / cpu, unit="tok/core-second"),
    ]
    for name, each in TRAINED_BY_A_GPU.items():
        rows.append(Row(f"fed by a core, {name}", value=tokens / cpu / each, unit="GPUs"))
        rows.append(Row(f"feed {GPUS} GPUs", value=GPUS * each * cpu / tokens, unit="cores"))
    return rows


def cpu_secs() -> float:
    """CPU time of this process and its children, user and system."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def make_shard(path: Path) -> Path:
    """About 30 MB of words of Zipf's frequencies, in documents of log-normal length."""
    rng = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    texts = []
    for _ in range(8_000):
        words = rng.choices(vocabulary, weights, k=int(rng.lognormvariate(6.1, 0.9)) + 20)
        texts.append(". ".join(" ".join(words[i : i + 15]) for i in range(0, len(words), 15)))
    write_shard(path, texts)
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
