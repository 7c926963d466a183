"""Pack tokenised documents into rows of one fixed length, by one of two policies.

    documents (BOS first) --> buffer --> rows of seq_len + 1 tokens (inputs [:-1], targets [1:])

BestFit, modern nanochat's packing:
  - every row starts with a document, so with BOS; every position is a token of a document;
  - of `buffer_docs` documents the longest that fits comes next (of equals, the oldest);
  - when none fits, the shortest (of equals, the oldest) is cut to fill the row, its rest dropped;
  - so a document longer than a row is only ever used cut, and waits until nothing else fits. Those
    that wait collect in the buffer and leave less to choose from, as they do upstream.
  Upstream scans its buffer for each choice. Here the lengths are kept sorted and a choice is one
  bisection; the rows are the same (tests/data/test_packing.py compares with a naive scan).

Stream, classic nanochat's packing: documents are laid end to end and cut every seq_len tokens. A
row takes seq_len + 1 tokens and gives the last one back, so every token is a target exactly once.
Upstream does so inside a batch but not at its end: one token in batch_rows * seq_len.

Both are pure: they see ids and token arrays, never files. `held()` names the documents inside, and
`restore()` puts the same ones back, which is all that an exact resume needs.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

# Arrival numbers share one int with the length, so that a sorted list of ints orders both.
_ARRIVAL_BITS = 48
_ARRIVAL_MASK = (1 << _ARRIVAL_BITS) - 1


class Document(NamedTuple):
    """A tokenised document: an id that finds its text again, and int32 tokens, BOS first."""

    id: tuple[int, int]
    tokens: np.ndarray


class Row(NamedTuple):
    """A packed row: int32 tokens [seq_len + 1], the documents in it, the tokens cut away."""

    tokens: np.ndarray
    ids: list[tuple[int, int]]
    cropped_tokens: int


# Gives the next document, or None when there are no more (validation; training never ends).
Pull = Callable[[], Document | None]


class BestFit:
    """Best-fit packing with cropping; see the head of this file."""

    def __init__(self, row_tokens: int, buffer_docs: int):
        self.row_tokens = row_tokens
        self.buffer_docs = buffer_docs
        self._arrivals = 0
        self._documents: dict[int, Document] = {}  # by arrival, so in order of arrival
        # Sorted by length; of equal lengths the latest arrival first.
        self._keys: list[int] = []

    def next_row(self, pull: Pull) -> Row | None:
        """Fill one row, pulling documents to keep the buffer full; None when they ran out."""
        row = np.empty(self.row_tokens, np.int32)
        ids = []
        position = cropped = 0
        while position < self.row_tokens:
            self._fill(pull)
            if not self._keys:
                return None  # an unfinished row is not a row
            remaining = self.row_tokens - position
            fitting = self._first_longer(remaining)
            if fitting:
                document = self._take(fitting - 1)
            else:
                shortest_tokens = self._keys[0] >> _ARRIVAL_BITS
                document = self._take(self._first_longer(shortest_tokens) - 1)
            part = document.tokens[:remaining]
            row[position : position + len(part)] = part
            position += len(part)
            cropped += len(document.tokens) - len(part)
            ids.append(document.id)
        return Row(row, ids, cropped)

    def held(self) -> tuple[list[tuple[int, int]], int]:
        """Ids of the buffered documents in order of arrival, and 0: none is partly used."""
        return [document.id for document in self._documents.values()], 0

    def restore(self, documents: Iterable[Document], offset: int) -> None:
        assert offset == 0
        self._arrivals, self._documents, self._keys = 0, {}, []
        for document in documents:
            self._add(document)

    def _fill(self, pull: Pull) -> None:
        while len(self._keys) < self.buffer_docs and (document := pull()) is not None:
            self._add(document)

    def _add(self, document: Document) -> None:
        self._documents[self._arrivals] = document
        reverse_arrival = _ARRIVAL_MASK - self._arrivals
        insort(self._keys, len(document.tokens) << _ARRIVAL_BITS | reverse_arrival)
        self._arrivals += 1

    def _first_longer(self, num_tokens: int) -> int:
        """Index of the first document longer than `num_tokens` in the sorted order."""
        return bisect_right(self._keys, num_tokens << _ARRIVAL_BITS | _ARRIVAL_MASK)

    def _take(self, index: int) -> Document:
        arrival = _ARRIVAL_MASK - (self._keys.pop(index) & _ARRIVAL_MASK)
        return self._documents.pop(arrival)


class Stream:
    """Classic streaming; see the head of this file. Drops nothing, holds one document at most."""

    def __init__(self, row_tokens: int, buffer_docs: int = 0):
        self.row_tokens = row_tokens
        self._document: Document | None = None
        self._offset = 0  # tokens of the held document that earlier rows used as inputs

    def next_row(self, pull: Pull) -> Row | None:
        row = np.empty(self.row_tokens, np.int32)
        ids = []
        position = 0
        while position < self.row_tokens:
            if self._document is None or self._offset == len(self._document.tokens):
                self._document, self._offset = pull(), 0
                if self._document is None:
                    return None
            part = self._document.tokens[self._offset :][: self.row_tokens - position]
            row[position : position + len(part)] = part
            position += len(part)
            self._offset += len(part)
            ids.append(self._document.id)
        self._offset -= 1  # the last target is the next row's first input
        return Row(row, ids, 0)

    def held(self) -> tuple[list[tuple[int, int]], int]:
        """Id of the document being cut, if any, and how many of its tokens are used up."""
        return ([], 0) if self._document is None else ([self._document.id], self._offset)

    def restore(self, documents: Iterable[Document], offset: int) -> None:
        self._document = next(iter(documents), None)
        self._offset = offset


PACKERS = {"best_fit": BestFit, "stream": Stream}
