"""Parity of all that is text: tokenizer.json and text.json of a folder, every value exact."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat_jax.parity.reference import Reference, Row, collect
from nanochat_jax.tasks.base import mixture_order
from nanochat_jax.tasks.gsm8k import extract_answer
from nanochat_jax.tasks.humaneval import extract_imports, extract_program
from nanochat_jax.tokenizer import bpe, chat
from nanochat_jax.tools.calculator import calculate

Compute = Callable[[Any], tuple[Any, Any]]  # what the file has -> (ours, theirs), to be compared


def compare_text(folder: Path, ranks: Reference, text: Reference) -> Iterable[Row]:
    for key, compute in _computes(bpe.Tokenizer.load(folder), text).items():
        file = ranks if key in ("pattern", "ranks", "special") else text
        yield from collect(file.file, key, _row(file, key, compute))
    if text.get("num_docs"):
        yield Row(text.file, "num_docs", 0, 0.0, 0.0, "for information")


def _row(file: Reference, key: str, compute: Compute) -> Iterable[Row]:
    yield file.compare(key, *compute(file[key]))


def _computes(tokenizer: bpe.Tokenizer, text: Reference) -> dict[str, Compute]:
    pieces = [tokenizer.decode_bytes([rank]).hex() for rank in range(len(tokenizer.ranks))]
    merges, lengths = pieces[bpe.NUM_BYTE_TOKENS :], tokenizer.token_bytes()

    def ranks(content):
        ours = [value for _, rank in content for value in (pieces[rank], int(lengths[rank]))]
        return ours, [value for token, _ in content for value in (token, len(token) // 2)]

    def render(row):
        ids, mask = chat.render_conversation(tokenizer, row["conversation"])
        return ids[: row["max_tokens"]], mask[: row["max_tokens"]]

    def conversation(row):
        prompt = chat.render_for_completion(tokenizer, row["conversation"])
        return dict(zip(("ids", "mask"), render(row), strict=True)) | {"for_completion": prompt}

    def sft_collate(content):
        rows = [render(text["conversations"][index]) for index in content["rows"]]
        inputs, targets = chat.pad_batch(rows, tokenizer.special_id("<|assistant_end|>"))
        return content | {"inputs": inputs.tolist(), "targets": targets.tolist()}, content

    return {
        "pattern": lambda content: (bpe.SPLIT_PATTERN, content),
        "ranks": ranks,
        "special": lambda content: (tokenizer.special, content),
        "vocab_size": lambda content: (tokenizer.vocab_size, content),
        "special_tokens": lambda content: (tokenizer.special, content),
        "first_100_merges": lambda content: (merges[: len(content)], content),
        "last_merge": lambda content: (merges[-1], content),
        "encode": _entries(lambda row: {"ids": tokenizer.encode(row["text"])}),
        "encode_bos": _entries(lambda row: {"ids": tokenizer.encode(row["text"], bos=True)}),
        "conversations": _entries(conversation),
        "sft_collate": sft_collate,
        "gsm_extract": _entries(lambda row: {"out": extract_answer(row["text"])}),
        "extract_program": _entries(lambda row: {"out": extract_program(row["text"])}),
        "extract_imports": _entries(lambda row: {"out": extract_imports(row["text"])}),
        "calculator": _entries(lambda row: {"out": calculate(row["expr"])}),
        "mixture": _mixture,
    }


def _entries(compute: Callable[[dict], dict]) -> Compute:
    """Of a list of entries, every field that is no input, against what `compute` makes of it."""
    inputs = {"text", "expr", "conversation", "max_tokens"}

    def fields(entries: Iterable[dict]) -> dict[str, Any]:
        each = ((i, *field) for i, entry in enumerate(entries) for field in entry.items())
        return {f"{i} {name}": value for i, name, value in each if name not in inputs}

    return lambda content: (fields(map(compute, content)), fields(content))


def _mixture(content: list[list]) -> tuple[Any, Any]:
    """The shuffle undone shows in which order the tasks were listed, and their indices."""
    listed = [[]] * len(content)
    for (_, place), pair in zip(mixture_order([range(len(content))]), content, strict=True):
        listed[place] = pair
    indices: dict[str, list[int]] = {}
    for task, index in listed:
        indices.setdefault(task, []).append(index)
    names = list(indices)
    return [[names[task], index] for task, index in mixture_order(list(indices.values()))], content
