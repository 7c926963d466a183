"""Measure the data pipeline: text in, batches out, on the CPU alone.

  python scripts/bench_data.py                        synthetic text
  python scripts/bench_data.py --shard=FILE.parquet   your own, e.g. a shard of fineweb_edu

Prints a sum against what eight H100s eat, then one JSON line. `tokens_per_sec` are those of the
batches handed out, by the clock; `tokens_per_core_sec` the same by the CPU time of this process and
its workers. Best-fit packing drops tokens, so more are encoded: `encoded_tokens_per_core_sec`. Of
the parts, `encode_tokens_per_core_sec` is the tokenizer's and `pack_tokens_per_core_sec` the
packer's alone. The tokenizer is trained on the text unless --tokenizer names a folder with one.

The sum: tokens_per_core_sec over the tokens/s of one GPU is `times_a_gpu`, how often one core feeds
a process of one GPU; the tokens/s of all over tokens_per_core_sec is `cores_for_all`, what feeding
them takes, in one process or eight.
"""

import argparse
import json
import os
import random
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nanochat_jax.common import log, run_main
from nanochat_jax.data.packing import PACKERS, Document
from nanochat_jax.data.pipeline import train_batches
from nanochat_jax.data.shards import write_shard
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tokenizer import bpe

GPUS = 8
# Tokens/s that an H100 trains on: in d20 65% of its bfloat16 peak of 989 TFLOP/s at 3.492 GFLOP a
# token, more than has been published; in gpt2 upstream's fastest run, 5.84G tokens in 99 minutes on
# eight, with fp8 (its dev/LEADERBOARD.md).
EATEN_BY_A_GPU = {"d20": 184_000, "gpt2": 5.84e9 / (99 * 60) / 8}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", type=Path, help="a parquet file with a text column")
    parser.add_argument("--tokenizer", type=Path, help="a run's tokenizer folder")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--seq-len", type=int, default=2_048)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--packing", choices=sorted(PACKERS), default="best_fit")
    parser.add_argument("--buffer-docs", type=int, default=1_000)
    parser.add_argument("--num-lanes", type=int, default=1)
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="to measure over")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shard = args.shard or make_shard(Path(folder) / "shard_00000.parquet")
        result = measure(args, shard)
    for name, sums in result["eaten"].items():
        log(
            f"{name}: {GPUS} H100s eat {sums['tokens_per_sec']:,} tokens/s; a core makes "
            f"{sums['times_a_gpu']:.1f} times what one eats, {sums['cores_for_all']:.2f} cores "
            "feed all"
        )
    print(json.dumps(result))


def eaten(tokens_per_core_sec: float) -> dict[str, dict[str, float]]:
    """What a core can feed, in each recipe."""
    return {
        name: {
            "tokens_per_sec": round(GPUS * each),
            "times_a_gpu": round(tokens_per_core_sec / each, 2),
            "cores_for_all": round(GPUS * each / tokens_per_core_sec, 2),
        }
        for name, each in EATEN_BY_A_GPU.items()
    }


def measure(args: argparse.Namespace, shard: Path) -> dict[str, Any]:
    texts = sample(shard, num_chars=20_000_000)
    if args.tokenizer:
        tokenizer = bpe.Tokenizer.load(args.tokenizer)
    else:
        tokenizer = bpe.train(iter(texts), args.vocab_size)
    batches = train_batches(
        [shard],
        tokenizer,
        seq_len=args.seq_len,
        batch_rows=args.batch_rows,
        packing=args.packing,
        buffer_docs=args.buffer_docs,
        num_lanes=args.num_lanes,
        prefetch=args.prefetch,
    )
    for _ in range(args.prefetch + 2):  # warm-up: buffers filled, imports done, threads running
        next(batches)
    batch_tokens = args.batch_rows * args.seq_len
    num_batches = max(1, args.tokens // batch_tokens)
    cropped = batches.counts()["cropped_tokens"]
    start, start_cpu = time.perf_counter(), cpu_secs()
    for _ in range(num_batches):
        next(batches)
    wall, cpu = time.perf_counter() - start, cpu_secs() - start_cpu
    cropped = batches.counts()["cropped_tokens"] - cropped
    batches.close()
    tokens = num_batches * batch_tokens
    encode, pack = measure_parts(args, texts, tokenizer)
    settings = {k: v for k, v in vars(args).items() if k not in ("shard", "tokenizer", "tokens")}
    return {
        "bench": "data",
        "tokens_per_sec": round(tokens / wall),
        "tokens_per_core_sec": round(tokens / cpu),
        "encoded_tokens_per_core_sec": round((tokens + cropped) / cpu),
        "encode_tokens_per_core_sec": round(encode),
        "pack_tokens_per_core_sec": round(pack),
        "eaten": eaten(tokens / cpu),
        "cropped_frac": round(cropped / (tokens + cropped), 4),
        "tokens": tokens,
        "wall_secs": round(wall, 3),
        "cpu_secs": round(cpu, 3),
        "cores": os.cpu_count(),
        "text": str(args.shard or "synthetic"),
        **settings,
        "vocab_size": tokenizer.vocab_size,
    }


def measure_parts(args: argparse.Namespace, texts: list[str], tokenizer) -> tuple[float, float]:
    """Tokens per CPU second of the tokenizer alone and of the packer alone, each after warm-up."""
    tokenizer.encode_batch(texts[:128], bos=True)
    start = time.process_time()
    encoded = [ids for i in range(0, len(texts), 128) for ids in
               tokenizer.encode_batch(texts[i : i + 128], bos=True)]  # fmt: skip
    encode = sum(map(len, encoded)) / (time.process_time() - start)
    documents = cycle([Document((0, i), np.array(ids, np.int32)) for i, ids in enumerate(encoded)])
    packer = PACKERS[args.packing](args.seq_len + 1, args.buffer_docs)
    packer.next_row(lambda: next(documents))
    num_rows = max(1, 4_000_000 // args.seq_len)
    start = time.process_time()
    for _ in range(num_rows):
        packer.next_row(lambda: next(documents))
    return encode, num_rows * args.seq_len / (time.process_time() - start)


def cpu_secs() -> float:
    """CPU time of this process and its children, user and system."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def sample(shard: Path, num_chars: int) -> list[str]:
    corpus, texts = Corpus([shard]), []
    for group in range(len(corpus.row_groups)):
        texts += corpus.read(group).texts
        if sum(map(len, texts)) > num_chars:
            break
    return texts


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


if __name__ == "__main__":
    run_main(main)
