"""Bytes per token against encodings whose compression is known beforehand."""

import json
import threading
import time

from nanochat_jax.eval.compression import SAMPLES, compare, table
from nanochat_jax.tokenizer.bpe import Tokenizer

BYTES_ONLY = Tokenizer({bytes([byte]): byte for byte in range(256)})
TEXTS = {"train": "Grüße, 漢字!", "empty": ""}


class Halves:
    """An encoding that spends one token on every two bytes."""

    n_vocab = 65536

    def encode_ordinary(self, text):
        return [0] * (len(text.encode()) // 2)


def test_known_ratios_and_a_baseline_that_cannot_be_loaded():
    def get_encoding(name):
        if name == "gpt2":
            return Halves()
        raise OSError("no route to host\nand more")

    result = compare(BYTES_ONLY, TEXTS, get_encoding)
    assert result["vocab_size"] == {"ours": 265, "GPT-2": 65536}
    assert set(result["missing"]) == {"GPT-4"}
    assert set(result["kinds"]) == {*SAMPLES, "train"}
    for kind, row in result["kinds"].items():
        size = len((SAMPLES | TEXTS)[kind].encode())
        assert row["bytes"] == size
        assert row["tokens"] == {"ours": size, "GPT-2": size // 2}
        assert row["bytes_per_token"] == {"ours": 1.0, "GPT-2": size / (size // 2)}
    assert json.loads(json.dumps(result)) == result
    assert table(result).splitlines()[-1].split() == ["train", "16", "1.000", "2.000", "-50.0%"]


def test_a_download_that_hangs_does_not_hold_up():
    released, start = threading.Event(), time.monotonic()
    result = compare(BYTES_ONLY, TEXTS, lambda name: released.wait(30), timeout_secs=0.1)
    released.set()
    assert time.monotonic() - start < 10
    assert set(result["missing"]) == {"GPT-2", "GPT-4"} and set(result["vocab_size"]) == {"ours"}
