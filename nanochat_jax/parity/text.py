"""Parity of all that is text: tokenizer.json and text.json of a folder of reference numbers.

Every comparison is exact, so a row's difference is the number of values that differ. Nothing here
knows the sizes, conversations or expressions of one particular folder; a key that it does not know
is a miss.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat_jax.common import UserError, read_json
from nanochat_jax.parity.rows import Row, not_comparable
from nanochat_jax.tasks.base import mixture_order
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.humaneval import extract_imports, extract_program
from nanochat_jax.tokenizer import bpe, chat
from nanochat_jax.tools.calculator import calculate

TOKENIZER_FILE = bpe.FILE_NAME
TEXT_FILE = "text.json"
# The reference does not say in which order a mixture lists its tasks: up to so many tasks every
# order is tried, beyond that only the alphabetical one.
MAX_PERMUTED_TASKS = 6

# What each entry of a list may hold; more than that would go uncompared.
FIELDS = {
    "encode": {"text", "ids"},
    "encode_bos": {"text", "ids"},
    "conversations": {"conversation", "max_tokens", "ids", "mask", "for_completion"},
    "gsm_extract": {"text", "out"},
    "extract_program": {"text", "out"},
    "extract_imports": {"text", "out"},
    "calculator": {"expr", "out"},
}

Pairs = Iterable[tuple[Any, Any]]  # (what we compute, what the reference says)
Compare = Callable[[Any], Pairs]


def compare_text(goldens_dir: Path) -> list[Row]:
    """Rows for everything in the two files; a broken or missing file is a row that misses."""
    goldens_dir = Path(goldens_dir)
    instruction = "a folder of reference numbers holds it"
    try:
        reference = read_json(goldens_dir / TOKENIZER_FILE, instruction)
        tokenizer = bpe.Tokenizer.load(goldens_dir)
    except UserError as error:
        return [not_comparable(TOKENIZER_FILE, "all", str(error))]
    rows = _rows(TOKENIZER_FILE, reference, _tokenizer_comparisons(tokenizer))
    try:
        text = read_json(goldens_dir / TEXT_FILE, instruction)
    except UserError as error:
        return [*rows, not_comparable(TEXT_FILE, "all", str(error))]
    return rows + _rows(TEXT_FILE, text, _text_comparisons(tokenizer, text))


def _rows(file: str, content: Any, comparisons: dict[str, Compare | None]) -> list[Row]:
    if not isinstance(content, dict):
        return [not_comparable(file, "all", "not an object")]
    rows = []
    for key, reference in content.items():
        if key not in comparisons:
            rows.append(not_comparable(file, key))
        elif (compare := comparisons[key]) is None:
            rows.append(Row(file, key, 0, 0.0, 0.0, "for information"))
        else:
            rows.append(_row(file, key, reference, compare))
    missing = [key for key, compare in comparisons.items() if compare and key not in content]
    return rows + [not_comparable(file, key, "missing") for key in missing]


def _row(file: str, key: str, reference: Any, compare: Compare) -> Row:
    try:
        fields = {field for entry in reference for field in entry} if key in FIELDS else set()
        if unknown := fields - FIELDS.get(key, set()):
            return not_comparable(file, key, f"unknown {', '.join(sorted(unknown))}")
        pairs = list(compare(reference))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return not_comparable(file, key, f"{type(error).__name__}: {error}")
    if not pairs:
        return not_comparable(file, key, "nothing in it")
    misses = [pair for pair in pairs if pair[0] != pair[1]]
    note = ""
    if misses:
        note = f"first miss: {_short(misses[0][0])}, reference {_short(misses[0][1])}"
    return Row(file, key, len(pairs), float(len(misses)), 0.0, note)


def _tokenizer_comparisons(tokenizer: bpe.Tokenizer) -> dict[str, Compare | None]:
    def ranks(reference):
        lengths = tokenizer.token_bytes()
        for token, rank in reference:
            yield tokenizer.decode_bytes([rank]).hex(), token
            yield int(lengths[rank]), len(token) // 2

    return {
        "pattern": lambda reference: [(bpe.SPLIT_PATTERN, reference)],
        "ranks": ranks,
        "special": lambda reference: _mapping_pairs(tokenizer.special, reference),
    }


def _text_comparisons(tokenizer: bpe.Tokenizer, text: Any) -> dict[str, Compare | None]:
    merges = [
        tokenizer.decode_bytes([rank]).hex()
        for rank in range(bpe.NUM_BYTE_TOKENS, len(tokenizer.ranks))
    ]

    def rendered(row):
        return chat.render_conversation(tokenizer, row["conversation"], row["max_tokens"])

    def conversations(reference):
        for row in reference:
            ids, mask = rendered(row)
            yield ids, row["ids"]
            yield mask, row["mask"]
            prompt = chat.render_for_completion(tokenizer, row["conversation"])
            yield prompt, row["for_completion"]

    def sft_collate(reference):
        rows = [rendered(text["conversations"][index]) for index in reference["rows"]]
        inputs, targets = chat.pad_batch(rows, tokenizer.special_id("<|assistant_end|>"))
        yield sorted(reference), ["inputs", "rows", "targets"]
        yield inputs.tolist(), reference["inputs"]
        yield targets.tolist(), reference["targets"]

    def calls(function, argument):
        return lambda reference: [(function(row[argument]), row["out"]) for row in reference]

    return {
        "vocab_size": lambda reference: [(tokenizer.vocab_size, reference)],
        "special_tokens": lambda reference: _mapping_pairs(tokenizer.special, reference),
        "num_docs": None,
        "first_100_merges": lambda reference: zip(merges[: len(reference)], reference, strict=True),
        "last_merge": lambda reference: [(merges[-1], reference)],
        "encode": lambda reference: [
            (tokenizer.encode(row["text"]), row["ids"]) for row in reference
        ],
        "encode_bos": lambda reference: [
            (tokenizer.encode(row["text"], bos=True), row["ids"]) for row in reference
        ],
        "conversations": conversations,
        "sft_collate": sft_collate,
        "gsm_extract": calls(extract_answer, "text"),
        "extract_program": calls(extract_program, "text"),
        "extract_imports": calls(extract_imports, "text"),
        "calculator": calls(calculate, "expr"),
        "mixture": _mixture_pairs,
    }


def _mapping_pairs(ours: dict, reference: dict) -> Pairs:
    return [(ours.get(key), reference.get(key)) for key in ours | reference]


def _mixture_pairs(reference: list[list]) -> Pairs:
    """The tasks are read off the reference: their names, and the indices each takes part with."""
    names = sorted({name for name, _ in reference})
    indices = {name: sorted(index for task, index in reference if task == name) for name in names}
    orders = itertools.permutations(names) if len(names) <= MAX_PERMUTED_TASKS else [tuple(names)]
    candidates = []
    for order in orders:
        shuffled = mixture_order([indices[name] for name in order])
        ours = [[order[task], index] for task, index in shuffled]
        candidates.append(list(zip(ours, reference, strict=True)))
    return min(candidates, key=lambda pairs: sum(ours != theirs for ours, theirs in pairs))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
