"""The rows that tasks are made of: from the Hugging Face hub, or from a folder.

    load_rows("gsm8k", "test", task_dir="")     the hub
    load_rows("gsm8k", "test", task_dir=DIR)    DIR/gsm8k/test.jsonl or .parquet, never the hub

Either way `datasets` keeps them in $NANOCHAT_BASE_DIR/data/tasks. Rows are shuffled with a fixed
seed, because several datasets are sorted by subject or origin and `[:500]` should be a sample; hub,
folder and upstream have the same row at the same index if they hold the rows in the same order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax.common import UserError, data_dir
from nanochat_jax.tasks.base import SHUFFLE_SEED


class Source(NamedTuple):
    repo_id: str
    config: str | None  # on the hub
    row: Mapping[str, Any]  # an example of one: its columns and the types of their values
    files: Mapping[str, tuple[str, ...]]  # of each split, in task_dir without suffix: one of them
    hub_names: Mapping[str, str] = {}  # of splits that have another name there


def _arc(config: str, file: str) -> Source:
    held_out = (f"{file}_dev", f"{file}_validation")
    files = {"train": (f"{file}_train",), "validation": held_out, "dev": held_out}
    return Source(
        "allenai/ai2_arc",
        config,
        {"question": "", "choices": {"text": [""], "label": [""]}, "answerKey": ""},
        files | {"test": (f"{file}_test",)},
        {"dev": "validation"},
    )


SOURCES = {
    "arc_easy": _arc("ARC-Easy", "arc/arc_easy"),
    "arc_challenge": _arc("ARC-Challenge", "arc/arc_challenge"),
    "mmlu": Source(
        "cais/mmlu",
        "all",
        {"question": "", "choices": [""], "answer": 0},
        {name: (f"mmlu/{name}",) for name in ("test", "dev", "validation")}
        | {"auxiliary_train": ("mmlu/auxiliary_train*",)},
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        "main",
        {"question": "", "answer": ""},
        {"train": ("gsm8k/train",), "test": ("gsm8k/test",)},
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        None,
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), ""),
        {"test": ("humaneval/HumanEval",)},
    ),
    "smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk",
        None,
        {"messages": [{"role": "", "content": ""}]},
        {"train": ("chat/mixture/train",), "test": ("chat/mixture/test",)},
    ),
}


def load_rows(name: str, split: str, task_dir: str = "") -> Sequence[dict[str, Any]]:
    """Rows of a split of SOURCES[name], from the folder `task_dir`, or from the hub for ""."""
    from datasets import load_dataset  # takes a second
    from datasets.exceptions import DatasetsError

    source = SOURCES[name]
    if task_dir:
        files = _files(source, split, Path(task_dir).expanduser())
        origin, advice = ", ".join(files), "correct it, or copy it again"
        reader = "parquet" if origin.endswith(".parquet") else "json"
        what: dict[str, Any] = {"path": reader, "data_files": files, "split": "train"}
    else:
        origin = source.repo_id
        advice = "check the network, or put the files into a folder and set config.data.task_dir"
        hub_split = source.hub_names.get(split, split)
        what = {"path": source.repo_id, "name": source.config, "split": hub_split}
    try:
        rows = load_dataset(**what, cache_dir=str(data_dir() / "tasks"))
    except (OSError, ValueError, DatasetsError) as error:
        # For a malformed file, what the library raised first says where it is malformed.
        first = error.__cause__ or error.__context__
        reason = str(first if first and not isinstance(error, OSError) else error)
        reason = " ".join(reason.split())
        raise UserError(f"{origin} cannot be read ({reason}); {advice}") from None
    _check(rows, source.row, origin)
    rows = rows.select_columns(list(source.row))
    return rows.shuffle(seed=SHUFFLE_SEED, keep_in_memory=True)


def _files(source: Source, split: str, folder: Path) -> list[str]:
    wanted = [f"{file}{end}" for file in source.files[split] for end in (".jsonl", ".parquet")]
    found = [paths for pattern in wanted if (paths := sorted(map(str, folder.glob(pattern))))]
    if len(found) != 1:
        got = " and ".join(path for paths in found for path in paths) or "no such file"
        raise UserError(
            f"got {got}, expected in config.data.task_dir = {folder} one of {', '.join(wanted)}, "
            f"with rows of {source.repo_id}"
        )
    return found[0]


def _check(rows, example: Mapping[str, Any], origin: str) -> None:
    """Columns have a type each, so that the first row speaks for all, but for missing values."""
    if not example.keys() <= {*rows.column_names} or not len(rows):
        got = ", ".join(rows.column_names) if len(rows) else "no rows"
        raise UserError(f"{origin} got {got}, expected rows of {', '.join(example)}; correct it")
    for name, like in example.items():
        missing = rows.data.column(name).null_count
        if missing or not _has_type_of(rows[0][name], like):
            got = f"{missing:,} rows without a value" if missing else repr(rows[0][name])[:60]
            raise UserError(f"{origin}: {name} got {got}, expected the type of {like}; correct it")


def _has_type_of(value: Any, like: Any) -> bool:
    if isinstance(value, dict) and isinstance(like, dict):
        return all(_has_type_of(value.get(key), like[key]) for key in like)
    if isinstance(value, list) and isinstance(like, list):
        return all(_has_type_of(item, like[0]) for item in value)
    return type(value) is type(like)
