"""What a task is: a sequence of conversations, and a verdict on what a model answers.

  chat         conversations to learn from
  categorical  the last message is the letter of the right choice
  generative   the answer is written freely and graded

A conversation is {"messages": [{"role", "content"}, ...]} as in tokenizer/chat.py, plus what the
verdict needs. A task has the same example at an index at every call, on every machine.
"""

import random
import tomllib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.data.shards import HASH_RANGE, text_hash
from nanochat_jax.tokenizer.chat import ROLES

Conversation = dict[str, Any]
SHUFFLE_SEED = 42
SPLITS = ("train", "test")  # of tasks that split their examples themselves


class Task(Sequence[Conversation]):
    kind: Literal["chat", "categorical", "generative"] = "chat"
    chance = 0.0  # accuracy of guessing

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def example(self, index: int) -> Conversation:
        """The conversation at 0 <= index < len; a categorical one also has "letters"."""

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        """Verdicts on (index, what the model said), in order; only generative tasks have them."""
        raise NotImplementedError(f"{type(self).__name__} is {self.kind}, not generative")

    def __getitem__(self, index: Any) -> Any:
        """The example at an index, a list of them for a slice."""
        chosen = range(len(self))[index]
        return self.example(chosen) if isinstance(chosen, int) else [*map(self.example, chosen)]


class RowTask(Task):
    """A task of rows: conversations as they are, or what a subclass makes one of."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Conversation:
        return self.rows[index]


class GeneratedTask(Task):
    seed: str  # of the generators, with the split and the index
    sizes: dict[str, int]  # of the splits

    def __init__(self, split: str):
        self.split = split

    def __len__(self) -> int:
        return self.sizes[self.split]

    def example(self, index: int) -> Conversation:
        return self.draw(random.Random(f"{self.seed} {self.split} {index}"))

    @abstractmethod
    def draw(self, rng: random.Random) -> Conversation:
        """An example of the task's split."""


def messages(*contents: Any) -> Conversation:
    """The conversation in which user and assistant say these in turn."""
    said = enumerate(contents)
    return {"messages": [{"role": ROLES[i % 2], "content": content} for i, content in said]}


def read_toml(name: str) -> dict[str, Any]:
    """The words of a generated task, from the file `name` beside this one."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def split_of(content: str) -> str:
    """The split that content belongs to: by its hash, a tenth of all is test.

    What data/shards.py holds out of pretraining, by the same hash, is in the test split here.
    """
    return "test" if text_hash(content) < 0.1 * HASH_RANGE else "train"


def mixture_order(tasks: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(task, index) pairs of a mixture, shuffled, given the indices of each task's examples."""
    pairs = [(task, index) for task, indices in enumerate(tasks) for index in indices]
    random.Random(SHUFFLE_SEED).shuffle(pairs)
    return pairs
