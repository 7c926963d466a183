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
    _check(rows, source.columns, origin)
    rows = rows.select_columns(list(source.columns))
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


def _check(rows, columns: Mapping[str, str], origin: str) -> None:
    """Columns have a type each, so that the first row speaks for all, but for missing values."""
    if not columns.keys() <= {*rows.column_names} or not len(rows):
        got = ", ".join(rows.column_names) if len(rows) else "no rows"
        raise UserError(f"{origin} got {got}, expected rows of {', '.join(columns)}; correct it")
    for name, kind in columns.items():
        missing = rows.data.column(name).null_count
        got = f"{missing:,} rows without a value" if missing else repr(rows[0][name])[:60]
        if missing or not _is(kind, rows[0][name]):
            raise UserError(f"{origin}: {name} got {got}, expected {kind}; correct it")


def _is(kind: str, value: Any) -> bool:
    if kind == NUMBER:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == LABELLED:
        return isinstance(value, dict) and all(_is(TEXTS, value.get(k)) for k in ("text", "label"))
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, {TEXT: str, MESSAGES: list}[kind])
