"""How well a tokenizer compresses: bytes per token by kind of text, beside GPT-2's and GPT-4's.

More bytes per token are better at the same vocabulary size: fewer tokens to train on and generate.
A larger vocabulary compresses more but costs parameters, so each result carries the sizes too. The
short samples are written for this file; slices of training and validation text are the caller's.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import tiktoken

from nanochat_jax.common import log
from nanochat_jax.tokenizer.bpe import Tokenizer

OURS = "ours"
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name -> tiktoken's name
LOAD_TIMEOUT_SECS = 15.0  # tiktoken downloads them on first use and itself waits without a limit

SAMPLES = {
    "news": (
        "The harbour town of Elmsworth will reopen its old ferry terminal in May, eleven years "
        "after a storm tore the roof from the waiting hall. Mayor Ruth Calder said on Tuesday that "
        'the council had voted 9-4 to spend $3.2 million on the repair. "People have asked me '
        'about that boat every single week," she told reporters. Fishermen were less pleased: the '
        "new timetable takes two of their berths, and talks about compensation broke down last "
        "month. The first crossing is planned for 6:30 a.m. on the 12th, weather permitting."
    ),
    "korean": (
        "비가 그친 뒤 시장 골목에는 따뜻한 빵 냄새가 퍼졌다. 할머니는 작은 의자에 앉아 지나가는 "
        "사람들에게 인사를 건넸고, 아이들은 웅덩이를 뛰어넘으며 집으로 달려갔다. 오늘은 토요일이라 "
        "가게마다 손님이 많았다. 나는 사과 다섯 개와 신문 한 부를 사서 천천히 강가로 걸어갔다."
    ),
    "german": (
        "Wer früh genug aufsteht, hört über den Dächern noch die Amseln, bevor die erste "
        "Straßenbahn um die Ecke quietscht. Die Bäckerin öffnet ihre Tür, grüßt müde und stellt "
        "die Körbe mit den Brötchen heraus. Später, gegen zehn, gehört der Platz den Händlern; "
        "dann riecht es nach Käse, Äpfeln und frisch gemahlenem Kaffee."
    ),
    "code": (
        "from collections import deque\n\n\n"
        "def shortest_path(graph: dict[str, list[str]], start: str, goal: str) -> list[str]:\n"
        '    """Breadth-first search; returns the nodes from start to goal."""\n'
        "    queue = deque([[start]])\n"
        "    seen = {start}\n"
        "    while queue:\n"
        "        path = queue.popleft()\n"
        "        if path[-1] == goal:\n"
        "            return path\n"
        "        for neighbour in graph.get(path[-1], []):\n"
        "            if neighbour not in seen:\n"
        "                seen.add(neighbour)\n"
        "                queue.append(path + [neighbour])\n"
        "    return []\n\n\n"
        'if __name__ == "__main__":\n'
        '    print(shortest_path({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a", "d"))\n'
    ),
    "maths": (
        "\\begin{theorem}\nFor every integer $n \\ge 1$ we have "
        "$\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}$.\n\\end{theorem}\n"
        "\\begin{proof}\nFor $n = 1$ both sides are $1$. Suppose the claim holds for $n$. Then\n"
        "\\[ \\sum_{k=1}^{n+1} k^2 = \\frac{n(n+1)(2n+1)}{6} + (n+1)^2 "
        "= \\frac{(n+1)(2n^2 + 7n + 6)}{6} = \\frac{(n+1)(n+2)(2n+3)}{6}, \\]\n"
        "which is the claim for $n + 1$. \\qed\n\\end{proof}\n"
        "Check: $1 + 4 + 9 + 16 + 25 = 55$ and $5 \\cdot 6 \\cdot 11 / 6 = 55$."
    ),
    "science": (
        "Chlorophyll absorbs mostly red and blue light, which is why leaves look green. The energy "
        "captured in photosystem II splits water and releases oxygen, while the electrons travel "
        "through cytochrome b6f to photosystem I; the proton gradient that builds up across the "
        "thylakoid membrane drives ATP synthase. At 25 °C and saturating light a C3 leaf fixes "
        "about 20 µmol of CO2 per square metre and second. Above 35 °C photorespiration rises, "
        "because rubisco binds oxygen more readily relative to carbon dioxide."
    ),
}


def load_baselines(
    timeout_secs: float = LOAD_TIMEOUT_SECS,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The encodings that could be loaded by name, and for each of the others the reason why not."""
    loaded: dict[str, Any] = {}
    missing = {name: f"no answer within {timeout_secs:g} s" for name in BASELINES}

    def load(name: str) -> None:
        try:
            loaded[name] = tiktoken.get_encoding(BASELINES[name])
        except Exception as error:  # whatever a network can do; told below
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]

    # Daemon threads: a download that hangs must hold up neither this call nor the exit.
    threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in BASELINES]
    deadline = time.monotonic() + timeout_secs
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    available = {name: loaded[name] for name in BASELINES if name in loaded}
    reasons = {name: missing[name] for name in BASELINES if name not in available}
    for name, reason in reasons.items():
        log(f"tok_eval: {name}'s encoding is left out, it could not be loaded ({reason})")
    return available, reasons


def compare(
    tokenizer: Tokenizer,
    texts_by_kind: Mapping[str, str],
    baselines: tuple[dict[str, Any], dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Tokens and bytes per token of each text, and of SAMPLES, under each encoding; JSON-able.

    {"vocab_size": {name: n}, "missing": {name: reason},
     "kinds": {kind: {"bytes": n, "tokens": {name: n}, "bytes_per_token": {name: ratio}}}}
    Our own tokenizer goes by the name OURS. Empty texts are left out. `baselines` is what
    `load_baselines` returns; None calls it.
    """
    encodings, missing = load_baselines() if baselines is None else baselines
    encoders = {OURS: tokenizer.encode}
    encoders |= {name: encoding.encode_ordinary for name, encoding in encodings.items()}
    kinds = {}
    for kind, text in (SAMPLES | dict(texts_by_kind)).items():
        raw = text.encode(errors="replace")
        if not raw:
            continue
        tokens = {name: len(encode(text)) for name, encode in encoders.items()}
        kinds[kind] = {
            "bytes": len(raw),
            "tokens": tokens,
            "bytes_per_token": {name: len(raw) / count for name, count in tokens.items()},
        }
    vocab_size = {OURS: tokenizer.vocab_size}
    vocab_size |= {name: encoding.n_vocab for name, encoding in encodings.items()}
    return {"vocab_size": vocab_size, "missing": missing, "kinds": kinds}


def table(result: Mapping[str, Any]) -> str:
    """The result of `compare` for people: bytes per token, and how much more or less ours holds."""
    others = [name for name in result["vocab_size"] if name != OURS]
    header = ["kind", "bytes", OURS] + [cell for name in others for cell in (name, "ours vs it")]
    sizes = ["vocabulary", "", f"{result['vocab_size'][OURS]:,}"]
    for name in others:
        sizes += [f"{result['vocab_size'][name]:,}", ""]
    lines = [header, sizes]
    for kind, row in result["kinds"].items():
        ratios = row["bytes_per_token"]
        cells = [kind, f"{row['bytes']:,}", f"{ratios[OURS]:.3f}"]
        for name in others:
            cells += [f"{ratios[name]:.3f}", f"{ratios[OURS] / ratios[name] - 1:+.1%}"]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )
