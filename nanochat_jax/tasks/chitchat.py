"""Small talk between people, from the package chitchat-dataset (the `demo` extra).

    Hi! How was your weekend?        user
    Good, I went hiking. And yours?  assistant

Tidied as for pretraining in data/demo.py and cut into short pieces, which start with a greeting or
a question and end with an answer. Whole conversations belong to one split, so what is validation in
the demo's pretraining is in no training example here (split_of). Making the pieces takes seconds:
they are kept in $NANOCHAT_BASE_DIR/data/tasks/chitchat.json.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from nanochat_jax.common import data_dir, locked, read_json, sha256_file, write_json
from nanochat_jax.data import demo
from nanochat_jax.tasks.base import RowTask, messages, split_of

MAX_CHARS = 700  # of a piece: with the demo tokenizer nearly all are within its 256 tokens
_MAX_MESSAGE_CHARS = 400  # longer ones are stories, not small talk
_OPENING = re.compile(r"(?:hi|hey|hello|howdy|good (?:morning|afternoon|evening))\b|.*\?", re.I)
# Talk about the place where the conversations were held, and corrections of one's own typing.
_SETTING = re.compile(
    r"disconnect|\bprompts?\b|\bbots?\b|\bconnected\b|\btyping|\bcontest\b|\bbyu\b|\blds\b|gospel"
    r"|\bmission|\*\w|\w'haha",
    re.IGNORECASE,
)


class ChitChat(RowTask):
    """Two or more messages each, roles in turn. UserError when the package is not installed."""

    def __init__(self, split: str):
        super().__init__([messages(*piece) for key, piece in _pieces() if split_of(key) == split])


def _pieces() -> list[tuple[str, list[str]]]:
    """(key of the conversation, messages) of every piece, in the order of the keys."""
    sources = (demo.dataset_file(), Path(demo.__file__), demo.TABLES, Path(__file__))
    made_of = [sha256_file(source) for source in sources]
    path = data_dir() / "tasks" / "chitchat.json"
    with locked(path):
        kept = read_json(path, "remove it") if path.exists() else {}
        if kept.get("made_of") != made_of:
            kept = {"made_of": made_of, "pieces": list(_make_pieces())}
            write_json(path, kept)
    return kept["pieces"]


def _make_pieces() -> Iterator[tuple[str, list[str]]]:
    talks, known = demo.talks(demo.read_dataset())
    for key, turns in talks.items():
        for piece in cut(turns):
            if demo.reads_like_english("\n".join(piece), known):
                yield key, piece


def cut(turns: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Runs of an even number of messages, from (speaker, text) turns.

    Speakers take turns in a run, which starts with an opening and has at most MAX_CHARS. A message
    that is left out ends the run; a turn without text is as if it had not been.
    """
    pieces: list[list[str]] = [[]]
    for _, of_speaker in groupby((turn for turn in turns if turn[1]), key=lambda turn: turn[0]):
        text = " ".join(text for _, text in of_speaker)
        left_out = demo.LEFT_OUT.search(text) or _SETTING.search(text)
        unwanted = left_out or len(text) > _MAX_MESSAGE_CHARS
        if unwanted or sum(map(len, pieces[-1])) + len(text) > MAX_CHARS:
            pieces.append([])
        if not unwanted and (pieces[-1] or _OPENING.match(text)):
            pieces[-1].append(text)
    return [piece[: len(piece) // 2 * 2] for piece in pieces if len(piece) > 1]  # to an answer
