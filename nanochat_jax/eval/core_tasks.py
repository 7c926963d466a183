"""The 22 tasks of CORE: the evaluation bundle's files -> examples -> candidates to be scored.

    core.yaml             which tasks, of what kind, with how many shots and which delimiter
    eval_meta_data.csv    what guessing scores, in percent
    eval_data/<uri>       one JSON object a line

Examples are shuffled with a fixed seed before any of them are left out, so the first n of a task
are the same n for everybody. A candidate is BOS, the shots (other examples of the task with their
right answer, each followed by a blank line, drawn with a seed of its own for every example), and
one option of the example as context, delimiter, continuation. Scored is

  multiple choice      from where the options begin to differ
  schema               from where they are all the same again
  language modelling   what the context alone does not hold

Spans are found in tokens, not in text, because tokens do not end where strings do. Tasks: DCLM,
arXiv 2406.11794, section 3.5; files: mosaicml/llm-foundry and mlfoundations/dclm.
"""

import csv
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from nanochat_jax.common import UserError
from nanochat_jax.eval.core_score import Candidate
from nanochat_jax.tokenizer.bpe import Tokenizer

SHUFFLE_SEED = 1337
SHOTS_SEED = 1234  # plus the example's place
EXAMPLES_AT_ONCE = 256  # rendered and tokenised together
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
    num_shots, path, items = int(entry["num_fewshot"][0]), folder / "eval_data" / uri, []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                with _reading(f"{path}:{number}"):
                    items.append(to_example(kind, json.loads(line)))
    random.Random(SHUFFLE_SEED).shuffle(items)
    kept = items[:max_per_task] if max_per_task > 0 else items
    if kept and len(kept) <= num_shots:
        raise UserError(
            f"{label}: got {len(kept)} examples, expected at least {num_shots + 1} for its "
            f"{num_shots} shots; raise config.eval.core_per_task or give it a whole {path}"
        )
    delimiter = entry.get("continuation_delimiter", " ")
    return CoreTask(label, kind, uri, num_shots, delimiter, baselines[label], kept, len(items))


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


def render(task: CoreTask, index: int) -> list[str]:
    """The prompts of example `index`: one for each option; of language modelling two, without its
    continuation and with it."""
    is_text = task.kind == "language_modeling"

    def text(context: str, continuation: str) -> str:
        return (context.strip() if is_text else context) + task.delimiter + continuation

    rng, before = random.Random(SHOTS_SEED + index), ""
    others = rng.sample(range(len(task.items) - 1), task.num_shots) if task.num_shots else []
    for shot in [task.items[i + (i >= index)] for i in others]:  # never itself
        before += text(*shot.options[shot.gold]) + "\n\n"
    options = task.items[index].options
    # A blank at the end would be part of the continuation's first token.
    alone = [(before + text(options[0][0], "")).strip()] if is_text else []
    return alone + [before + text(*option) for option in options]


def make_candidates(task: CoreTask, tokenizer: Tokenizer) -> Iterator[list[Candidate]]:
    """The candidates of each example, one for each option, in order."""
    for first in range(0, len(task.items), EXAMPLES_AT_ONCE):
        examples = range(first, min(first + EXAMPLES_AT_ONCE, len(task.items)))
        prompts = [render(task, index) for index in examples]
        texts = [text for of_example in prompts for text in of_example]
        tokens = iter(tokenizer.encode_batch(texts, bos=True, num_threads=os.cpu_count() or 1))
        for of_example in prompts:
            found = find_spans(task.kind, [np.array(next(tokens), np.int32) for _ in of_example])
            if task.kind == "language_modeling" and found[0].start == found[0].end:
                raise UserError(
                    f"{task.label}: got nothing to score in {of_example[-1][-60:]!r}, expected a "
                    "continuation; mend the example or leave it out"
                )
            yield found


def find_spans(kind: str, tokens: list[np.ndarray]) -> list[Candidate]:
    """The candidates, given the tokens of the prompts that `render` made."""
    if kind == "schema":
        shared = common_prefix([ids[::-1] for ids in tokens])
        return [Candidate(ids, len(ids) - shared, len(ids)) for ids in tokens]
    # Where the prompt alone ends within a token of the whole, the span begins with that token;
    # upstream stops with an assertion there.
    start = common_prefix(tokens)
    scored = tokens[1:] if kind == "language_modeling" else tokens
    return [Candidate(ids, start, len(ids)) for ids in scored]


def common_prefix(rows: list[np.ndarray]) -> int:
    """How many leading tokens all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(same.argmin())
