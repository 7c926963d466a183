"""Parity of all that is text: tokenizer.json and text.json of a folder of reference numbers.

Every comparison is exact. Nothing here knows the sizes, conversations or expressions of one
particular folder.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat_jax.parity.reference import Comparison, Reference, collect
from nanochat_jax.tasks.base import mixture_order
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.humaneval import extract_imports, extract_program
from nanochat_jax.tokenizer import bpe, chat
from nanochat_jax.tools.calculator import calculate

# The reference does not say in which order a mixture lists its tasks: up to so many tasks every
# order is tried, beyond that only the alphabetical one.
MAX_PERMUTED_TASKS = 6

Compute = Callable[[Any], tuple[Any, Any]]  # what the file has -> (ours, theirs), to be compared


def compare_text(folder: Path, ranks: Reference, text: Reference) -> Iterable[Comparison]:
    for key, compute in _computes(bpe.Tokenizer.load(folder), text).items():
        file = ranks if key in ("pattern", "ranks", "special") else text
        yield from collect(file.file, key, _row(file, key, compute))
    if "num_docs" in text:
        text.take("num_docs")
        yield Comparison(text.file, "num_docs", 0, 0.0, 0.0, "for information")


def _row(file: Reference, key: str, compute: Compute) -> Iterable[Comparison]:
    content = file.take(key) if key in file else file.under(f"{key}.")
    yield file.compare(key, *compute(content))


def _computes(tokenizer: bpe.Tokenizer, text: Reference) -> dict[str, Compute]:
    pieces = [tokenizer.decode_bytes([rank]).hex() for rank in range(len(tokenizer.ranks))]
    merges, lengths = pieces[bpe.NUM_BYTE_TOKENS :], tokenizer.token_bytes()

    def ranks(content):
        ours = [value for _, rank in content for value in (pieces[rank], int(lengths[rank]))]
        return ours, [value for token, _ in content for value in (token, len(token) // 2)]

    def render(row):
        return chat.render_conversation(tokenizer, row["conversation"], row["max_tokens"])

    def conversation(row):
        ids, mask = render(row)
        prompt = chat.render_for_completion(tokenizer, row["conversation"])
        return {"ids": ids, "mask": mask, "for_completion": prompt}

    def sft_collate(content):
        given = text.take("conversations")
        rows = [render(given[index]) for index in content["rows"]]
        inputs, targets = chat.pad_batch(rows, tokenizer.special_id("<|assistant_end|>"))
        ours = {"inputs": inputs.tolist(), "targets": targets.tolist(), "rows": content["rows"]}
        return ours, content

    def out(function, argument="text"):
        return _entries([argument], lambda row: {"out": function(row[argument])})

    return {
        "pattern": lambda content: (bpe.SPLIT_PATTERN, content),
        "ranks": ranks,
        "special": lambda content: (tokenizer.special, content),
        "vocab_size": lambda content: (tokenizer.vocab_size, content),
        "special_tokens": lambda content: (tokenizer.special, content),
        "first_100_merges": lambda content: (merges[: len(content)], content),
        "last_merge": lambda content: (merges[-1], content),
        "encode": _entries(["text"], lambda row: {"ids": tokenizer.encode(row["text"])}),
        "encode_bos": _entries(["text"], lambda row: {"ids": tokenizer.encode(row["text"], True)}),
        "conversations": _entries(["conversation", "max_tokens"], conversation),
        "sft_collate": sft_collate,
        "gsm_extract": out(extract_answer),
        "extract_program": out(extract_program),
        "extract_imports": out(extract_imports),
        "calculator": out(calculate, "expr"),
        "mixture": _mixture,
    }


def _entries(inputs: Iterable[str], compute: Callable[[dict], dict]) -> Compute:
    """Of a list of entries, every field that is no input, against what `compute` makes of it."""

    def flat(entries: Iterable[dict]) -> dict[str, Any]:
        return {
            f"{i} {k}": v for i, e in enumerate(entries) for k, v in e.items() if k not in inputs
        }

    return lambda content: (flat(map(compute, content)), flat(content))


def _mixture(content: list[list]) -> tuple[Any, Any]:
    """The tasks are read off the reference: their names, and the indices each takes part with."""
    names = sorted({name for name, _ in content})
    indices = {name: sorted(index for task, index in content if task == name) for name in names}
    orders = itertools.permutations(names) if len(names) <= MAX_PERMUTED_TASKS else [names]
    candidates = [
        [[order[task], index] for task, index in mixture_order([indices[name] for name in order])]
        for order in map(list, orders)
    ]
    return max(candidates, key=lambda ours: sum(map(list.__eq__, ours, content))), content
