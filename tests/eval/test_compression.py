"""Bytes per token against encodings whose compression is known beforehand."""

import json
import threading
import time

import pytest

from nanochat_jax.eval import compression
from nanochat_jax.tokenizer.bpe import Tokenizer

BYTES_ONLY = Tokenizer({bytes([byte]): byte for byte in range(256)})
TEXTS = {"train": "Grüße, 漢字!", "empty": ""}


class Halves:
    """An encoding that spends one token on every two bytes."""

    n_vocab = 65536

    def encode_ordinary(self, text):
        return [0] * (len(text.encode()) // 2)


def test_known_ratios():
    result = compression.compare(BYTES_ONLY, TEXTS, ({"GPT-2": Halves()}, {"GPT-4": "no network"}))
    assert result["vocab_size"] == {"ours": 265, "GPT-2": 65536}
    assert result["missing"] == {"GPT-4": "no network"}
    assert set(result["kinds"]) == {*compression.SAMPLES, "train"}
    for kind, row in result["kinds"].items():
        size = len((compression.SAMPLES | TEXTS)[kind].encode())
        assert row["bytes"] == size
        assert row["tokens"] == {"ours": size, "GPT-2": size // 2}
        assert row["bytes_per_token"] == {"ours": 1.0, "GPT-2": size / (size // 2)}
    assert json.loads(json.dumps(result)) == result


def test_the_table():
    result = compression.compare(BYTES_ONLY, TEXTS, ({"GPT-2": Halves()}, {}))
    lines = compression.table(result).splitlines()
    assert lines[0].split() == ["kind", "bytes", "ours", "GPT-2", "ours", "vs", "it"]
    assert lines[1].split() == ["vocabulary", "265", "65,536"]
    assert lines[-1].split() == ["train", "16", "1.000", "2.000", "-50.0%"]
    assert len(lines) == 2 + len(compression.SAMPLES) + 1


def test_samples_are_different_kinds_of_text():
    assert len(compression.SAMPLES) >= 6
    assert all(300 < len(sample.encode()) < 2000 for sample in compression.SAMPLES.values())
    compile(compression.SAMPLES["code"], "sample", "exec")


def test_a_baseline_that_cannot_be_loaded_is_told(monkeypatch, capsys):
    def get_encoding(name):
        if name == "gpt2":
            return Halves()
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(compression.tiktoken, "get_encoding", get_encoding)
    result = compression.compare(BYTES_ONLY, TEXTS)
    assert result["vocab_size"] == {"ours": 265, "GPT-2": 65536}
    assert result["missing"] == {"GPT-4": "OSError: no route to host"}
    printed = capsys.readouterr().out
    assert "GPT-4" in printed and "no route to host" in printed and "GPT-2" not in printed


@pytest.mark.parametrize("timeout_secs", [0.0, 0.2])
def test_a_download_that_hangs_does_not_hold_up(monkeypatch, timeout_secs):
    released = threading.Event()
    monkeypatch.setattr(compression.tiktoken, "get_encoding", lambda name: released.wait(30))
    start = time.monotonic()
    available, missing = compression.load_baselines(timeout_secs)
    assert time.monotonic() - start < timeout_secs + 1
    assert available == {} and set(missing) == set(compression.BASELINES)
    released.set()
