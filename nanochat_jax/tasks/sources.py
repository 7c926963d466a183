"""The rows that tasks are made of: from the Hugging Face hub, or from a folder.

    load_rows("gsm8k", "test", task_dir="")     the hub, kept in $NANOCHAT_BASE_DIR/data/tasks
    load_rows("gsm8k", "test", task_dir=DIR)    DIR/gsm8k/test.jsonl or .parquet, never the hub

Rows of a folder are checked against the kinds of columns in SOURCES. Rows are shuffled with a fixed
seed, because several datasets are sorted by subject or origin and `[:500]` should be a sample. The
permutation is that of `datasets.Dataset.shuffle(seed=42)`, so hub, folder and upstream have the
same row at the same index if they hold the rows in the same order.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.tasks.base import SHUFFLE_SEED

Row = dict[str, Any]

# Kinds of columns, as errors name them.
TEXT = "text"
NUMBER = "a whole number"
TEXTS = "a list of texts"
LABELLED = '{"text": [texts], "label": [texts]}'
MESSAGES = "a list of messages"  # which tokenizer/chat.py checks


class Source(NamedTuple):
    repo_id: str
    config: str | None  # on the hub
    columns: Mapping[str, str]  # name: kind
    files: Mapping[str, tuple[str, ...]]  # of each split, in task_dir without suffix: one of them
    hub_names: Mapping[str, str] = {}  # of splits that have another name there


def _arc(config: str, file: str) -> Source:
    held_out = (f"{file}_dev", f"{file}_validation")
    files = {"train": (f"{file}_train",), "validation": held_out, "dev": held_out}
    return Source(
        "allenai/ai2_arc",
        config,
        {"question": TEXT, "choices": LABELLED, "answerKey": TEXT},
        files | {"test": (f"{file}_test",)},
        {"dev": "validation"},
    )


SOURCES = {
    "arc_easy": _arc("ARC-Easy", "arc/arc_easy"),
    "arc_challenge": _arc("ARC-Challenge", "arc/arc_challenge"),
    "mmlu": Source(
        "cais/mmlu",
        "all",
        {"question": TEXT, "choices": TEXTS, "answer": NUMBER},
        {name: (f"mmlu/{name}",) for name in ("test", "dev", "validation")}
        | {"auxiliary_train": ("mmlu/auxiliary_train*",)},
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        "main",
        {"question": TEXT, "answer": TEXT},
        {"train": ("gsm8k/train",), "test": ("gsm8k/test",)},
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        None,
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
        {"test": ("humaneval/HumanEval",)},
    ),
    "smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk",
        None,
        {"messages": MESSAGES},
        {"train": ("chat/mixture/train",), "test": ("chat/mixture/test",)},
    ),
}


class Rows(Sequence[Row]):
    """Rows in shuffled order, each checked when it is read; `origin` is for errors."""

    def __init__(self, rows: Sequence[Row], columns: Mapping[str, str], origin: str):
        self._rows, self._columns, self._origin = rows, columns, origin
        self._order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        number = int(self._order[index])
        row = self._rows[number]
        for name, kind in self._columns.items():
            if not _is(kind, row[name]):
                got = repr(row[name])
                got = got if len(got) <= 60 else f"{got[:60]}..."
                raise UserError(
                    f"{self._origin}, row {number + 1}: {name} got {got}, expected {kind}; "
                    "correct the row"
                )
        return row


def load_rows(name: str, split: str, task_dir: str = "") -> Rows:
    """Rows of a split of SOURCES[name], from the folder `task_dir`, or from the hub for ""."""
    source = SOURCES[name]
    if task_dir:
        paths = _files(source, split, Path(task_dir).expanduser())
        origin = ", ".join(map(str, paths))
        if paths[0].suffix == ".jsonl":
            return Rows(list(_read_rows(paths, source.columns)), source.columns, origin)
        what, advice = {"path": "parquet", "data_files": [*map(str, paths)]}, "copy it again"
        split = "train"  # so the library calls files without a split
    else:
        origin, split = source.repo_id, source.hub_names.get(split, split)
        what = {"path": source.repo_id, "name": source.config}
        advice = "check the network, or put the files into a folder and set config.data.task_dir"
    from datasets import load_dataset  # takes a second
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(**what, split=split, cache_dir=str(data_dir() / "tasks"))
    except (OSError, DatasetsError, pa.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{origin} cannot be read ({reason}); {advice}") from None
    _check_columns(origin, dataset.column_names, source.columns)
    dataset = dataset.select_columns(list(source.columns))
    return Rows(dataset, source.columns, origin)  # type: ignore[arg-type]  # rows, on the disk


def _files(source: Source, split: str, folder: Path) -> list[Path]:
    wanted = [f"{file}{end}" for file in source.files[split] for end in (".jsonl", ".parquet")]
    found = [paths for pattern in wanted if (paths := sorted(folder.glob(pattern)))]
    if len(found) != 1:
        got = " and ".join(str(path) for paths in found for path in paths) or "no such file"
        raise UserError(
            f"got {got}, expected in config.data.task_dir = {folder} one of {', '.join(wanted)}, "
            f"with rows of {source.repo_id}"
        )
    return found[0]


def _read_rows(paths: list[Path], columns: Mapping[str, str]) -> Iterator[Row]:
    for path in paths:
        for where, row in read_jsonl(path):
            if not isinstance(row, dict):
                raise UserError(f"{where}: got {type(row).__name__}, expected an object")
            _check_columns(where, row, columns)
            yield row


def _check_columns(where: str, got: Iterable[str], expected: Mapping[str, str]) -> None:
    if not expected.keys() <= set(got):
        raise UserError(
            f"{where}: got {', '.join(got) or 'nothing'}, expected {', '.join(expected)}; "
            "rename what is there"
        )


def _is(kind: str, value: Any) -> bool:
    if kind == NUMBER:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == LABELLED:
        return isinstance(value, dict) and all(_is(TEXTS, value.get(k)) for k in ("text", "label"))
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, {TEXT: str, MESSAGES: list}[kind])


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("path:line", value) of each line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path}:{number}: not JSON ({error}), expected one JSON value a line; "
                        "correct or remove the line"
                    ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), expected a .jsonl file; correct the path"
        ) from None
