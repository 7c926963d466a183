"""Tasks by name, and mixtures of them.

    gsm8k train                 a task and one of its splits
    smoltalk train[:10000]      a slice of it, as Python slices
    mmlu auxiliary_train x3     every example three times
    identity train x2.5         every example twice, half of them (always the same) once more
    json ~/my/chats.jsonl x2    conversations of your own

A mixture lists every example as often as its specs say and shuffles the list with a fixed seed.
"""

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.common import UserError
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.base import SHUFFLE_SEED, Conversation, Task, mixture_order
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.sources import SOURCES, Rows, load_rows

_SPEC = re.compile(
    r"(?P<task>\S+)\s+(?P<split>\S.*?)"
    r"(?:\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?(?::(?P<step>[1-9]\d*)?)?\])?"
    r"(?:\s+x(?P<weight>\d+(?:\.\d+)?))?"
)
_GRAMMAR = 'expected "<task> <split>[slice] [x<weight>]", as in "gsm8k train[:1000] x2.5"'


class Origin(NamedTuple):
    """What a task is made from; each takes what it needs."""

    split: str
    task_dir: str
    persona: str


@dataclass(frozen=True)
class Entry:
    splits: tuple[str, ...]  # none: the split is a path
    open: Callable[[Origin], Task]


def _of_rows(name: str, task: Callable[[Rows], Task]) -> Entry:
    return Entry(
        tuple(SOURCES[name].splits), lambda it: task(load_rows(name, it.split, it.task_dir))
    )


def _generated(task: Callable[[Origin], Task]) -> Entry:
    return Entry(("train", "test"), task)


# Those below bring word lists or a sandbox along, which a run that has no use for them spares.


def _humaneval(rows: Rows) -> Task:
    from nanochat_jax.tasks.humaneval import HumanEval

    return HumanEval(rows)


def _spelling_bee(it: Origin) -> Task:
    from nanochat_jax.tasks.spelling import SpellingBee

    return SpellingBee(it.split)


def _simple_spelling(it: Origin) -> Task:
    from nanochat_jax.tasks.spelling import SimpleSpelling

    return SimpleSpelling(it.split)


def _arithmetic(it: Origin) -> Task:
    from nanochat_jax.tasks.arithmetic import Arithmetic

    return Arithmetic(it.split)


def _identity(it: Origin) -> Task:
    from nanochat_jax.tasks.identity import Identity

    return Identity(it.split, it.persona)


def _chitchat(it: Origin) -> Task:
    from nanochat_jax.tasks.chitchat import ChitChat

    return ChitChat(it.split)


TASKS = {
    "arc_easy": _of_rows("arc_easy", ARC),
    "arc_challenge": _of_rows("arc_challenge", ARC),
    "mmlu": _of_rows("mmlu", MMLU),
    "gsm8k": _of_rows("gsm8k", GSM8K),
    "humaneval": _of_rows("humaneval", _humaneval),
    "smoltalk": _of_rows("smoltalk", SmolTalk),
    "json": Entry((), lambda it: CustomJSON(it.split)),
    "spelling_bee": _generated(_spelling_bee),
    "simple_spelling": _generated(_simple_spelling),
    "arithmetic": _generated(_arithmetic),
    "identity": _generated(_identity),
    "chitchat": _generated(_chitchat),
}


class Selection(Task):
    """Some examples of a task, perhaps several times."""

    def __init__(self, task: Task, indices: Sequence[int]):
        self.task, self.indices = task, indices
        self.kind, self.chance = task.kind, task.chance

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> Conversation:
        return self.task.example(self.indices[index])

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        return self.task.grade([(self.indices[index], said) for index, said in answers])


class Part(NamedTuple):
    """A spec, opened."""

    spec: str
    name: str  # the spec without slice and weight
    task: Task
    indices: Sequence[int]  # of the examples that it selects


class Mixture(Task):
    """The examples of several specs, shuffled."""

    def __init__(self, parts: Sequence[Part], seed: int = SHUFFLE_SEED):
        self.parts = parts
        self.order = mixture_order([part.indices for part in parts], seed)

    def __len__(self) -> int:
        return len(self.order)

    def example(self, index: int) -> Conversation:
        part, inner = self.order[index]
        return self.parts[part].task.example(inner)

    def name(self, index: int) -> str:
        """Where an example is from: `gsm8k train 123` is open_task("gsm8k train")[123]."""
        part, inner = self.order[index]
        return f"{self.parts[part].name} {inner}"

    def counts(self) -> dict[str, int]:
        """How many examples each spec contributes."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts[part.spec] += len(part.indices)
        return dict(counts)


def open_task(spec: str, *, task_dir: str = "", persona: str = "") -> Task:
    """The task of a spec. UserError for a wrong spec, or for data that cannot be had.

    `task_dir`: folder of the data sets, "" for the Hugging Face hub (sources.py); `persona`: path
    of a persona file, "" for ours (identity.py).
    """
    part = _open(spec, task_dir, persona)
    whole = part.indices == range(len(part.task))
    return part.task if whole else Selection(part.task, part.indices)


def mixture(
    specs: Sequence[str], *, task_dir: str = "", persona: str = "", seed: int = SHUFFLE_SEED
) -> Mixture:
    """The examples of all specs in one shuffled sequence; errors as `open_task`."""
    if not specs:
        raise UserError(f"got no task for the mixture, {_GRAMMAR}")
    for spec in specs:
        _parse(spec)  # a wrong spec is told before anything is loaded
    return Mixture([_open(spec, task_dir, persona) for spec in specs], seed)


def _parse(spec: str) -> re.Match[str]:
    parsed = _SPEC.fullmatch(spec.strip())
    name = parsed["task"] if parsed else spec.strip()
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise UserError(f"got task {name!r}{_nearest(name, TASKS)}, expected one of {known}")
    splits = TASKS[name].splits
    listed = ", ".join(splits) or "the path of a .jsonl file"
    if parsed is None:
        raise UserError(f"got {spec!r}, {_GRAMMAR}; {name} has {listed}")
    if splits and parsed["split"] not in splits:
        near = _nearest(parsed["split"], splits)
        raise UserError(f"got split {parsed['split']!r} of {name}{near}, expected one of {listed}")
    return parsed


def _nearest(name: str, known: Sequence[str] | dict[str, Entry]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (perhaps {near[0]}?)" if near else ""


def _open(spec: str, task_dir: str, persona: str) -> Part:
    parsed = _parse(spec)
    task = TASKS[parsed["task"]].open(Origin(parsed["split"], task_dir, persona))
    bounds = (int(parsed[key]) if parsed[key] else None for key in ("start", "stop", "step"))
    indices = _weighted(range(len(task))[slice(*bounds)], Fraction(parsed["weight"] or 1))
    if not indices:
        raise UserError(f"got {spec!r}, which selects none of {len(task)} examples; correct it")
    return Part(spec, f"{parsed['task']} {parsed['split']}", task, indices)


def _weighted(indices: range, weight: Fraction) -> Sequence[int]:
    """Every index as often as the whole part of the weight, and a sample of them once more."""
    if weight == 1:
        return indices
    times, rest = divmod(weight, 1)
    sample = random.Random(SHUFFLE_SEED).sample(indices, round(rest * len(indices)))
    return [*indices] * int(times) + sorted(sample)


def file_stamps(specs: Sequence[str], persona: str = "") -> list[list]:
    """[path, bytes, time of change] of the user's own files that the specs read.

    The persona file, given or ours, is among them where a spec is of the task identity. What was
    made from them is out of date when these differ.
    """
    parsed = [_parse(spec) for spec in specs]
    paths = [spec["split"] for spec in parsed if not TASKS[spec["task"]].splits]
    if any(spec["task"] == "identity" for spec in parsed):
        from nanochat_jax.tasks.identity import PERSONA

        paths.append(persona or str(PERSONA))
    files = [path for path in (Path(name).expanduser() for name in paths) if path.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
