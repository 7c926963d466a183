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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
KINDS = ("multiple_choice", "schema", "language_modeling")


class Example(NamedTuple):
    options: list[tuple[str, str]]  # (context, continuation); language modelling has one
    gold: int  # which of them is right


@dataclass(frozen=True)
class CoreTask:
    """A task and the examples to evaluate, in order."""

    label: str
    kind: str  # one of KINDS
    uri: str
    num_shots: int
    delimiter: str  # between context and continuation
    baseline: float  # accuracy of guessing, in percent
    items: list[Example]
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
    table = folder / "eval_meta_data.csv"
    with _reading(table), open(table, encoding="utf-8", newline="") as file:
        baselines = {r["Eval Task"]: float(r["Random baseline"]) for r in csv.DictReader(file)}
    listing = min(folder.glob("core*.yaml"), default=folder / "core.yaml")  # core.yaml comes first
    with _reading(listing):
        entries = yaml.safe_load(listing.read_text(encoding="utf-8"))["icl_tasks"]
        return [_read_task(folder, entry, baselines, max_per_task) for entry in entries]


def _read_task(
    folder: Path, entry: dict[str, Any], baselines: dict[str, float], max_per_task: int
) -> CoreTask:
    label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    num_shots, baseline = int(entry["num_fewshot"][0]), baselines[label]
    path, items = folder / "eval_data" / uri, []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                with _reading(f"{path}:{number}"):
                    items.append(to_example(kind, json.loads(line)))
    num_available = len(items)
    random.Random(SHUFFLE_SEED).shuffle(items)
    items = items[:max_per_task] if max_per_task > 0 else items
    if items and len(items) <= num_shots:
        raise UserError(
            f"{label}: got {len(items)} examples, expected at least {num_shots + 1} for its "
            f"{num_shots} shots; raise config.eval.core_per_task or give it a whole {path}"
        )
    delimiter = entry.get("continuation_delimiter", " ")
    return CoreTask(label, kind, uri, num_shots, delimiter, baseline, items, num_available)


def to_example(kind: str, item: dict[str, Any]) -> Example:
    """An example as the bundle has it, a JSON object; raises LookupError, TypeError, ValueError."""
    if kind == "multiple_choice":
        options = [(item["query"], choice) for choice in item["choices"]]
    elif kind == "schema":
        options = [(context, item["continuation"]) for context in item["context_options"]]
    elif kind == "language_modeling":
        options = [(item["context"], item["continuation"])]
    else:
        raise ValueError(f"the kind {kind!r}, not one of {', '.join(KINDS)}")
    gold = 0 if kind == "language_modeling" else item["gold"]
    if not all(isinstance(text, str) for option in options for text in option):
        raise TypeError("something else than texts in the options")
    if gold not in range(len(options)):
        raise ValueError(f"the right answer {gold!r} of {len(options)} options")
    return Example(options, gold)


@contextmanager
def _reading(place: Path | str) -> Iterator[None]:
    """Whatever goes wrong inside is told in one line, with the file it is about."""
    try:
        yield
    except UserError:
        raise
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{place}: got {reason}; config.eval.core_dir must name a folder like the one in "
            "upstream's eval_bundle.zip"
        ) from None
