"""The 22 tasks of CORE as they lie in the evaluation bundle.

    core.yaml             which tasks, of what kind, with how many shots and which delimiter
    eval_meta_data.csv    what guessing scores, in percent
    eval_data/<uri>       one JSON object a line

Examples are shuffled with a fixed seed before any of them are left out, so the first n of a task
are the same n for everybody. Tasks: DCLM, arXiv 2406.11794, section 3.5; files:
mosaicml/llm-foundry and mlfoundations/dclm.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanochat_jax.common import UserError

SHUFFLE_SEED = 1337
# Number of examples of each task; a bundle with fewer measures something else. (The csv has a
# column for it, which repeats arc_easy's number for arc_challenge.)
NUM_EXAMPLES = {
    "hellaswag_zeroshot": 10_042,
    "jeopardy": 2_117,
    "bigbench_qa_wikidata": 20_321,
    "arc_easy": 2_376,
    "arc_challenge": 1_172,
    "copa": 100,
    "commonsense_qa": 1_221,
    "piqa": 1_838,
    "openbook_qa": 500,
    "lambada_openai": 5_153,
    "hellaswag": 10_042,
    "winograd": 273,
    "winogrande": 1_267,
    "bigbench_dyck_languages": 1_000,
    "agi_eval_lsat_ar": 230,
    "bigbench_cs_algorithms": 1_320,
    "bigbench_operators": 210,
    "bigbench_repeat_copy_logic": 32,
    "squad": 10_570,
    "coqa": 7_983,
    "boolq": 3_270,
    "bigbench_language_identification": 10_000,
}
# What an example of each kind must hold. "gold" is the index of the right choice or option.
FIELDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
_BUNDLE = "config.eval.core_dir must name a folder like the one in upstream's eval_bundle.zip"


@dataclass(frozen=True)
class CoreTask:
    """A task and the examples to evaluate, in order."""

    label: str
    kind: str  # a key of FIELDS
    uri: str
    num_shots: int
    delimiter: str  # between context and continuation
    baseline: float  # accuracy of guessing, in percent
    items: list[dict[str, Any]]
    num_available: int  # before any were left out

    def centered(self, accuracy: float) -> float:
        """0 for guessing, 1 for no mistake."""
        chance = 0.01 * self.baseline
        return (accuracy - chance) / (1 - chance)


def read_tasks(folder: Path, max_per_task: int = -1) -> list[CoreTask]:
    """The tasks that the bundle lists; one whose file is not there has no items.

    max_per_task: keep so many examples of each; 0 or less: all. Raises UserError for a file that is
    broken, and when what is kept is too little to draw the shots from.
    """
    folder = Path(folder)
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    tasks = []
    for entry in _read_list(folder):
        try:
            label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
            num_shots, baseline = int(entry["num_fewshot"][0]), baselines[label]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: got {entry} in the list of tasks ({error}); {_BUNDLE}"
            ) from None
        if kind not in FIELDS:
            known = ", ".join(FIELDS)
            raise UserError(f"{label}: got kind {kind!r}, expected one of {known}; {_BUNDLE}")
        path = folder / "eval_data" / uri
        items = read_items(path, kind) if path.exists() else []
        num_available = len(items)
        random.Random(SHUFFLE_SEED).shuffle(items)
        if max_per_task > 0:
            items = items[:max_per_task]
        if items and len(items) <= num_shots:
            raise UserError(
                f"{label}: got {len(items)} examples, expected at least {num_shots + 1} for its "
                f"{num_shots} shots; raise config.eval.core_per_task or give it a whole {path}"
            )
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(
            CoreTask(label, kind, uri, num_shots, delimiter, baseline, items, num_available)
        )
    return tasks


def read_items(path: Path, kind: str) -> list[dict[str, Any]]:
    """The examples of a task of that kind, in file order."""
    items = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
            except ValueError:
                item = line
            if not _is_item(item, kind):
                fields = ", ".join(
                    f"{name} ({type_.__name__})" for name, type_ in FIELDS[kind].items()
                )
                got = line.strip()[:60]
                raise UserError(
                    f"{path}:{number}: got {got!r}, expected JSON with {fields}; {_BUNDLE}"
                )
            items.append(item)
    return items


def _is_item(item: Any, kind: str) -> bool:
    if not isinstance(item, dict):
        return False
    if not all(isinstance(item.get(name), type_) for name, type_ in FIELDS[kind].items()):
        return False
    options = item.get("choices" if kind == "multiple_choice" else "context_options", [""])
    return all(isinstance(o, str) for o in options) and 0 <= item.get("gold", 0) < len(options)


def _read_list(folder: Path) -> list[Any]:
    path = min(folder.glob("core*.yaml"), default=folder / "core.yaml")  # core.yaml comes first
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no list of CORE tasks ({reason}); {_BUNDLE}") from None


def _read_baselines(path: Path) -> dict[str, float]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of random baselines ({error}); {_BUNDLE}") from None
