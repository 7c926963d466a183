"""Tasks by name, and mixtures of them, shuffled with a fixed seed.

gsm8k train                 a task and one of its splits
smoltalk train[:10000]      a slice of it, as Python slices
identity train x2.5         every example twice, half of them (always the same) once more
json ~/my/chats.jsonl x2    conversations of your own
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from nanochat_jax.common import UserError
from nanochat_jax.tasks.arithmetic import Arithmetic
from nanochat_jax.tasks.base import SHUFFLE_SEED, SPLITS, Conversation, RowTask, Task, mixture_order
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import PERSONA, Identity
from nanochat_jax.tasks.multiple_choice import ARC, MMLU
from nanochat_jax.tasks.sources import SOURCES, load_rows, read_conversations
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee

# Each is called with rows (those in SOURCES), a path (json), or a split, and a persona (identity).
TASKS: dict[str, Callable[..., Task]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "mmlu": MMLU,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "smoltalk": RowTask,  # conversations made with a large model for small ones (arXiv 2502.02737)
    "json": lambda path: RowTask(list(read_conversations(path))),
    "spelling_bee": SpellingBee,
    "simple_spelling": SimpleSpelling,
    "arithmetic": Arithmetic,
    "identity": Identity,
    "chitchat": ChitChat,
}
_SPEC = re.compile(
    r"(?P<task>\S+)\s+(?P<split>\S.*?)"
    r"(?:\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?(?::(?P<step>[1-9]\d*)?)?\])?"
    r"(?:\s+x(?P<weight>\d+(?:\.\d+)?))?"
)
_GRAMMAR = 'expected "<task> <split>[slice] [x<weight>]", as in "gsm8k train[:1000] x2.5"'


class Selection(Task):
    """What a spec selects: some examples of a task, perhaps several times."""

    def __init__(self, spec: str, source: str, task: Task, indices: Sequence[int]):
        self.spec, self.source = spec, source  # the source is the spec without slice and weight
        self.task, self.indices = task, indices
        self.kind, self.chance = task.kind, task.chance

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> Conversation:
        return self.task.example(self.indices[index])

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        return self.task.grade([(self.indices[index], said) for index, said in answers])


class Mixture(Task):
    """The examples of several specs; arguments and errors as those of `open_task`."""

    def __init__(self, specs: Sequence[str], *, task_dir: str = "", persona: str = ""):
        if not specs:
            raise UserError(f"got no task for the mixture, {_GRAMMAR}")
        for spec in specs:
            _parse(spec)  # a wrong spec is told before anything is loaded
        self.parts = [open_task(spec, task_dir=task_dir, persona=persona) for spec in specs]
        self.order = mixture_order([part.indices for part in self.parts])

    def __len__(self) -> int:
        return len(self.order)

    def example(self, index: int) -> Conversation:
        part, inner = self.order[index]
        return self.parts[part].task.example(inner)

    def name(self, index: int) -> str:
        """Where an example is from: `gsm8k train 123` is open_task("gsm8k train")[123]."""
        part, inner = self.order[index]
        return f"{self.parts[part].source} {inner}"

    def counts(self) -> dict[str, int]:
        """How many examples each spec contributes."""
        return Counter(part.spec for part in self.parts for _ in part.indices)


def open_task(spec: str, *, task_dir: str = "", persona: str = "") -> Selection:
    """The task of a spec. UserError for a wrong spec, or for data that cannot be had.

    `task_dir` as in sources.py, `persona` as in identity.py.
    """
    parsed = _parse(spec)
    name, split = parsed["task"], parsed["split"]
    made_of = load_rows(name, split, task_dir) if name in SOURCES else split
    task = TASKS[name](made_of, persona) if name == "identity" else TASKS[name](made_of)
    bounds = (int(parsed[key]) if parsed[key] else None for key in ("start", "stop", "step"))
    chosen = range(len(task))[slice(*bounds)]
    times, rest = divmod(Fraction(parsed["weight"] or 1), 1)
    once_more = random.Random(SHUFFLE_SEED).sample(chosen, round(rest * len(chosen)))
    indices = [*chosen] * int(times) + sorted(once_more)
    if not indices:
        raise UserError(f"got {spec!r}, which selects none of {len(task)} examples; correct it")
    return Selection(spec, f"{name} {split}", task, indices)


def file_stamps(specs: Sequence[str], persona: str = "") -> list[list]:
    """[path, bytes, time of change] of the user's files that specs read: own chats, persona."""
    parsed = list(map(_parse, specs))
    paths = [spec["split"] for spec in parsed if spec["task"] == "json"]
    paths += [persona or PERSONA] * any(spec["task"] == "identity" for spec in parsed)
    files = [file for path in paths if (file := Path(path).expanduser()).is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _parse(spec: str) -> re.Match[str]:
    parsed = _SPEC.fullmatch(spec.strip())
    name = parsed["task"] if parsed else spec.strip()
    if name not in TASKS:
        raise UserError(f"got task {name!r}, expected one of {', '.join(TASKS)}")
    splits = SOURCES[name].files if name in SOURCES else SPLITS
    listed = "the path of a .jsonl file" if name == "json" else ", ".join(splits)
    if parsed is None or (name != "json" and parsed["split"] not in splits):
        raise UserError(f"got {spec!r}, {_GRAMMAR}; {name} has {listed}")
    return parsed
