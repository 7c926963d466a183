"""The rows that tasks are made of: from the Hugging Face hub, or from a folder.

    load_rows("gsm8k", "test", task_dir="")     the hub, kept in $NANOCHAT_BASE_DIR/data/tasks
    load_rows("gsm8k", "test", task_dir=DIR)    DIR/gsm8k/test.jsonl or .parquet, never the hub

SOURCES says which file and which columns, of which kind; a folder's rows are checked. Rows are
shuffled with a fixed seed, because several datasets are sorted by subject or origin and `[:500]`
should be a sample; the permutation is the one of `datasets.Dataset.shuffle(seed=42)`, so hub,
folder and upstream have the same rows at the same index as long as they hold them in the same
order.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.tasks.base import SHUFFLE_SEED

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")


class Split(NamedTuple):
    config: str | None  # on the hub
    name: str  # on the hub
    files: tuple[str, ...]  # in task_dir without suffix; several that match a * are joined


class Kind(NamedTuple):
    name: str
    holds: Callable[[Any], bool]  # of a module: worker processes get it by name


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_labelled(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_texts(value.get(key)) for key in ("text", "label"))


TEXT = Kind("text", _is_text)
TEXTS = Kind("a list of texts", _is_texts)
NUMBER = Kind("a whole number", _is_number)
LABELLED = Kind('{"text": [texts], "label": [texts]}', _is_labelled)
MESSAGES = Kind("a list of messages", _is_list)  # which tokenizer/chat.py checks


@dataclass(frozen=True)
class Source:
    repo_id: str
    columns: Mapping[str, Kind]
    splits: Mapping[str, Split]


def _arc(config: str, name: str) -> Source:
    train, dev, validation, test = (
        f"arc/{name}_{split}" for split in ("train", "dev", "validation", "test")
    )
    held_out = Split(config, "validation", (dev, validation))  # AI2 says dev, the hub validation
    return Source(
        "allenai/ai2_arc",
        {"question": TEXT, "choices": LABELLED, "answerKey": TEXT},
        {
            "train": Split(config, "train", (train,)),
            "validation": held_out,
            "dev": held_out,
            "test": Split(config, "test", (test,)),
        },
    )


SOURCES = {
    "arc_easy": _arc("ARC-Easy", "arc_easy"),
    "arc_challenge": _arc("ARC-Challenge", "arc_challenge"),
    "mmlu": Source(
        "cais/mmlu",
        {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": NUMBER},
        {
            "test": Split("all", "test", ("mmlu/test",)),
            "dev": Split("all", "dev", ("mmlu/dev",)),
            "validation": Split("all", "validation", ("mmlu/validation",)),
            "auxiliary_train": Split("all", "auxiliary_train", ("mmlu/auxiliary_train*",)),
        },
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        {"question": TEXT, "answer": TEXT},
        {name: Split("main", name, (f"gsm8k/{name}",)) for name in ("train", "test")},
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
        {"test": Split(None, "test", ("humaneval/HumanEval",))},
    ),
    "smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk",
        {"messages": MESSAGES},
        {name: Split(None, name, (f"chat/mixture/{name}",)) for name in ("train", "test")},
    ),
}


class Rows(Sequence[Row]):
    """Rows in shuffled order."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows
        self._order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        return self._rows[int(self._order[index])]


class _ParquetRows(Sequence[Row]):
    """Rows of parquet files that become objects when read; other processes get the paths."""

    def __init__(self, paths: list[Path], columns: Mapping[str, Kind]):
        self._made_of = (paths, columns)
        self._table = pa.concat_tables(_read_parquet(path, columns) for path in paths)

    def __reduce__(self):
        return _ParquetRows, self._made_of

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        row, (paths, columns) = self._table.slice(index, 1).to_pylist()[0], self._made_of
        _check_kinds(f"row {index} of {', '.join(map(str, paths))}", row, columns)
        return row


def load_rows(name: str, split: str, task_dir: str = "") -> Rows:
    """Rows of a split of SOURCES[name], from the folder `task_dir`, or from the hub for ""."""
    source = SOURCES[name]
    if task_dir:
        return Rows(_from_folder(source, source.splits[split], Path(task_dir).expanduser()))
    return Rows(_from_hub(source, source.splits[split]))


def _from_hub(source: Source, split: Split) -> Sequence[Row]:
    from datasets import load_dataset  # takes seconds
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(
            source.repo_id, split.config, split=split.name, cache_dir=str(data_dir() / "tasks")
        )
    except (OSError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source.repo_id} did not come from the Hugging Face hub ({reason}); check the "
            "network, or put the files into a folder and set config.data.task_dir"
        ) from None
    _check_columns(source.repo_id, dataset.column_names, source.columns)
    return dataset  # type: ignore[return-value]  # a sequence, on the disk, in all but name


def _from_folder(source: Source, split: Split, folder: Path) -> Sequence[Row]:
    wanted = [f"{file}{suffix}" for file in split.files for suffix in SUFFIXES]
    found = [paths for pattern in wanted if (paths := sorted(folder.glob(pattern)))]
    if len(found) != 1:
        got = " and ".join(str(path) for paths in found for path in paths) or "no such file"
        raise UserError(
            f"got {got}, expected in config.data.task_dir = {folder} one of {', '.join(wanted)}, "
            f"with rows of {source.repo_id}"
        )
    (paths,) = found
    if paths[0].suffix == ".parquet":
        return _ParquetRows(paths, source.columns)
    rows = []
    for path in paths:
        for where, row in read_jsonl(path):
            if not isinstance(row, dict):
                raise UserError(f"{where}: got {type(row).__name__}, expected an object")
            _check_columns(where, row, source.columns)
            _check_kinds(where, row, source.columns)
            rows.append(row)
    return rows


def _read_parquet(path: Path, columns: Mapping[str, Kind]) -> pa.Table:
    try:
        _check_columns(str(path), pq.read_schema(path).names, columns)
        return pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read ({reason}), expected a parquet file; copy it again"
        ) from None


def _check_columns(where: str, got: Sequence[str] | Row, expected: Mapping[str, Kind]) -> None:
    if not expected.keys() <= set(got):
        raise UserError(
            f"{where}: got {', '.join(got) or 'nothing'}, expected {', '.join(expected)}; "
            "rename what is there"
        )


def _check_kinds(where: str, row: Row, columns: Mapping[str, Kind]) -> None:
    for name, kind in columns.items():
        if not kind.holds(row[name]):
            got = repr(row[name])
            got = got if len(got) <= 60 else f"{got[:60]}..."
            raise UserError(f"{where}: {name} got {got}, expected {kind.name}; correct the row")


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
