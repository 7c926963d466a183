"""How well a tokenizer compresses: bytes per token by kind of text, beside GPT-2's and GPT-4's.

More bytes per token are better at the same vocabulary size: fewer tokens to train on and generate.
A larger vocabulary compresses more but costs parameters, so each result carries the sizes too. The
short samples lie in samples.toml; slices of training and validation text are the caller's.
"""

import threading
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from nanochat_jax.common import aligned, log
from nanochat_jax.tokenizer.bpe import Tokenizer

OURS = "ours"
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name -> tiktoken's name
LOAD_TIMEOUT_SECS = 15.0  # tiktoken downloads them on first use and itself waits without a limit
SAMPLES = tomllib.loads((Path(__file__).parent / "samples.toml").read_text(encoding="utf-8"))


def load_baselines(
    get_encoding: Callable[[str], Any], timeout_secs: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """The encodings that could be loaded by name, and for each of the others the reason why not."""
    loaded, reasons = {}, {}

    def load() -> None:
        for name, encoding in BASELINES.items():
            try:
                loaded[name] = get_encoding(encoding)
            except Exception as error:  # whatever a network can do; told below
                said = str(error).partition("\n")[0][:120]
                said = "no network" if isinstance(error, OSError) else said
                reasons[name] = f"{type(error).__name__}: {said}"

    # A daemon thread: a download that hangs must hold up neither this call nor the exit.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout_secs)
    available, late = dict(loaded), f"no answer within {timeout_secs:g} s"
    missing = {name: reasons.get(name, late) for name in BASELINES if name not in available}
    for name, reason in missing.items():
        log(f"tok_eval: {name}'s encoding is left out, it could not be loaded ({reason})")
    return available, missing


def compare(
    tokenizer: Tokenizer,
    texts_by_kind: Mapping[str, str],
    get_encoding: Callable[[str], Any] = tiktoken.get_encoding,
    timeout_secs: float = LOAD_TIMEOUT_SECS,
) -> dict[str, Any]:
    """Tokens and bytes per token of each text, and of SAMPLES, under each encoding; JSON-able.

    {"vocab_size": {name: n}, "missing": {name: reason},
     "kinds": {kind: {"bytes": n, "tokens": {name: n}, "bytes_per_token": {name: ratio}}}}
    Our own tokenizer goes by the name OURS. Empty texts are left out.
    """
    encodings, missing = load_baselines(get_encoding, timeout_secs)
    vocab_size, encoders = {OURS: tokenizer.vocab_size}, {OURS: tokenizer.encode}
    for name, encoding in encodings.items():
        vocab_size[name], encoders[name] = encoding.n_vocab, encoding.encode_ordinary
    kinds = {}
    for kind, text in (SAMPLES | dict(texts_by_kind)).items():
        if num_bytes := len(text.encode(errors="replace")):
            tokens = {name: len(encode(text)) for name, encode in encoders.items()}
            ratios = {name: num_bytes / count for name, count in tokens.items()}
            kinds[kind] = {"bytes": num_bytes, "tokens": tokens, "bytes_per_token": ratios}
    return {"vocab_size": vocab_size, "missing": missing, "kinds": kinds}


def table(result: Mapping[str, Any]) -> str:
    """The result of `compare` for people: bytes per token, and how much more or less ours holds."""
    sizes = result["vocab_size"]
    others = [name for name in sizes if name != OURS]
    rows = [["kind", "bytes", OURS], ["vocabulary", "", f"{sizes[OURS]:,}"]]
    for name in others:
        rows[0] += [name, "ours vs it"]
        rows[1] += [f"{sizes[name]:,}", ""]
    for kind, row in result["kinds"].items():
        ratios = row["bytes_per_token"]
        rows.append([kind, f"{row['bytes']:,}", f"{ratios[OURS]:.3f}"])
        for name in others:
            rows[-1] += [f"{ratios[name]:.3f}", f"{ratios[OURS] / ratios[name] - 1:+.1%}"]
    return "\n".join(aligned(rows))
