"""The rows that tasks are made of: from the Hugging Face hub, a folder, or a file of your own.

    load_rows("gsm8k", "test", task_dir="")     the hub, kept in $NANOCHAT_BASE_DIR/data/tasks
    load_rows("gsm8k", "test", task_dir=DIR)    DIR/gsm8k/test.jsonl or .parquet, never the hub

Rows are shuffled with a fixed seed, as upstream's: several datasets are sorted by subject or
origin, and `[:500]` should be a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.data.local import read_jsonl
from nanochat_jax.tasks.base import SHUFFLE_SEED, SPLITS, Conversation
from nanochat_jax.tokenizer.chat import check


class Source(NamedTuple):
    repo_id: str
    config: str | None  # on the hub
    row: Mapping[str, Any]  # an example of one: its columns and the types of their values
    files: Mapping[str, tuple[str, ...]]  # of each split, in task_dir without suffix: one of them
    hub_names: Mapping[str, str] = {}  # of splits that have another name there


def _files(pattern: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (pattern.format(split),) for split in splits}


def _arc(config: str, file: str) -> Source:
    """On the hub, the split "dev" is called "validation"; a folder may call it either."""
    row = {"question": "", "choices": {"text": [""], "label": [""]}, "answerKey": ""}
    held_out = dict.fromkeys(("validation", "dev"), (f"{file}_dev", f"{file}_validation"))
    files = _files(f"{file}_{{}}", "train") | held_out | _files(f"{file}_{{}}", "test")
    return Source("allenai/ai2_arc", config, row, files, {"dev": "validation"})


_MMLU = _files("mmlu/{}", "test", "dev", "validation") | _files("mmlu/{}*", "auxiliary_train")
_PROBLEM = dict.fromkeys(["task_id", "prompt", "canonical_solution", "test", "entry_point"], "")
SOURCES = {
    "arc_easy": _arc("ARC-Easy", "arc/arc_easy"),
    "arc_challenge": _arc("ARC-Challenge", "arc/arc_challenge"),
    "mmlu": Source("cais/mmlu", "all", {"question": "", "choices": [""], "answer": 0}, _MMLU),
    "gsm8k": Source(
        "openai/gsm8k", "main", {"question": "", "answer": ""}, _files("gsm8k/{}", *SPLITS)
    ),
    "humaneval": Source(
        "openai/openai_humaneval", None, _PROBLEM, _files("humaneval/HumanEval", "test")
    ),
    "smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk", None, {"messages": []}, _files("chat/mixture/{}", *SPLITS)
    ),
}


def load_rows(name: str, split: str, task_dir: str = "") -> Sequence[dict[str, Any]]:
    """Rows of a split of SOURCES[name], from the folder `task_dir`, or from the hub for ""."""
    source = SOURCES[name]
    if not task_dir:
        advice = "check the network, or put the files into a folder and set config.data.task_dir"
        hub_split = source.hub_names.get(split, split)
        return _load(source, source.repo_id, advice, name=source.config, split=hub_split)
    files = _find_files(source, split, Path(task_dir).expanduser())
    if files[0].suffix == ".parquet":
        paths = [str(file) for file in files]
        return _load(source, "parquet", "copy it again", data_files=paths, split="train")
    rows = []
    for where, row in [line for file in files for line in read_jsonl(file)]:
        _check_row(where, row, source.row)
        rows.append({column: row[column] for column in source.row})
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))  # Dataset.shuffle's
    return [rows[i] for i in order]


def _load(source: Source, path: str, advice: str, **what: Any) -> Sequence[dict[str, Any]]:
    """Shuffled rows from the library `datasets`, which reads them from the disk when asked."""
    from datasets import load_dataset  # takes a second
    from datasets.exceptions import DatasetsError

    origin = ", ".join(what.get("data_files", [path]))
    try:
        rows = load_dataset(path, **what, cache_dir=str(data_dir() / "tasks"))
    except (OSError, pa.ArrowException, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{origin} cannot be read ({reason}); {advice}") from None
    # A column has one type, so the first row speaks for all, but for missing values.
    _check_row(origin, rows[0] if len(rows) else None, source.row)
    if empty := [column for column in source.row if rows.data.column(column).null_count]:
        raise UserError(f"{origin}: got rows without {', '.join(empty)}, expected all; {advice}")
    return rows.select_columns(list(source.row)).shuffle(seed=SHUFFLE_SEED, keep_in_memory=True)


def _find_files(source: Source, split: str, folder: Path) -> list[Path]:
    wanted = [f"{file}{end}" for file in source.files[split] for end in (".jsonl", ".parquet")]
    found = [paths for pattern in wanted if (paths := sorted(folder.glob(pattern)))]
    if len(found) != 1:
        got = " and ".join(str(path) for path in sum(found, [])) or "no such file"
        raise UserError(
            f"got {got}, expected in config.data.task_dir = {folder} one of {', '.join(wanted)}, "
            f"with rows of {source.repo_id}"
        )
    return found[0]


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Conversations of your own, one a line of a .jsonl file: {"messages": [...]} or the list.

    UserError, with file and line, for one that breaks the rules of tokenizer/chat.py or in which
    the assistant says nothing.
    """
    for where, value in read_jsonl(Path(path).expanduser()):
        conversation = {"messages": value} if isinstance(value, list) else value
        try:
            if len(check(conversation)) < 2:
                raise UserError("got no message of the assistant, expected one to learn from")
        except UserError as error:
            raise UserError(f"{where}: {error}; correct or remove the line") from None
        yield conversation


def _check_row(where: str, row: Any, example: Mapping[str, Any]) -> None:
    columns = row if isinstance(row, dict) else {}
    if wrong := [n for n, like in example.items() if not _has_type_of(columns.get(n), like)]:
        raise UserError(
            f"{where}: {', '.join(wrong)} wrong or missing: got {repr(row)[:100]}, expected a row "
            f"like {dict(example)}; correct it"
        )


def _has_type_of(value: Any, like: Any) -> bool:
    if isinstance(value, dict) and isinstance(like, dict):
        return all(_has_type_of(value.get(key), like[key]) for key in like)
    if isinstance(value, list) and isinstance(like, list):
        return all(_has_type_of(item, like[0]) for item in value if like)
    return type(value) is type(like)
