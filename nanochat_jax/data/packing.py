"""Pack tokenised documents into rows of one fixed length, by one of two policies.

    documents (BOS first) --> buffer --> rows of seq_len + 1 tokens (inputs [:-1], targets [1:])

BestFit, modern nanochat's packing: every row starts with a document, so with BOS. Of `buffer_docs`
documents the longest that fits comes next (of equals, the oldest); when none fits, the shortest is
cut to fill the row and its rest dropped. Upstream scans its buffer for each choice; here it is kept
sorted.

Stream, classic nanochat's packing: documents are laid end to end and cut every seq_len tokens. A
row takes seq_len + 1 tokens and gives the last one back, so every token is a target exactly once.
Upstream loses one at the end of each batch.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

DocumentId = tuple[int, int]  # finds the text again: row group, row


class Document(NamedTuple):
    id: DocumentId
    tokens: np.ndarray  # int32, BOS first


class PackedRow(NamedTuple):
    tokens: np.ndarray  # int32 [seq_len + 1]
    ids: list[DocumentId]
    cropped_tokens: int  # of these documents, cut away


class Waiting:
    """Numbers of things that wait, sorted by length; the oldest has the lowest number."""

    def __init__(self):
        self._keys: list[tuple[int, int]] = []  # (length, -number): of equals the oldest is last

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, number: int) -> None:
        insort(self._keys, (length, -number))

    def take_longest(self, room: int) -> int | None:
        """The longest of at most `room`, of equals the oldest; None when all are longer."""
        fitting = bisect_right(self._keys, (room, 1))
        return -self._keys.pop(fitting - 1)[1] if fitting else None

    def take_shortest(self) -> int | None:
        """The shortest, of equals the oldest; None when none waits."""
        return self.take_longest(self._keys[0][0]) if self._keys else None


class BestFit:
    def __init__(self, row_tokens: int, buffer_docs: int):
        self._row_tokens, self._buffer_docs = row_tokens, buffer_docs
        self.restore((), 0)

    def next_row(self, documents: Iterator[Document]) -> PackedRow | None:
        """Fill one row, taking documents to keep the buffer full; None when they ran out."""
        parts, ids, room, cropped = [], [], self._row_tokens, 0
        while room:
            for document in islice(documents, self._buffer_docs - len(self._waiting)):
                self._add(document)
            number = self._waiting.take_longest(room)
            if number is None and (number := self._waiting.take_shortest()) is None:
                return None  # an unfinished row is not a row
            document = self._documents.pop(number)
            parts.append(document.tokens[:room])
            ids.append(document.id)
            room -= len(parts[-1])
            cropped += len(document.tokens) - len(parts[-1])
        return PackedRow(np.concatenate(parts), ids, cropped)

    def held(self) -> tuple[list[DocumentId], int]:
        """What restore() takes: ids of the buffered documents in order of arrival; none is cut."""
        return [document.id for document in self._documents.values()], 0

    def restore(self, documents: Sequence[Document], offset: int) -> None:
        assert offset == 0
        self._arrived, self._waiting = 0, Waiting()
        self._documents: dict[int, Document] = {}  # in order of arrival
        for document in documents:
            self._add(document)

    def _add(self, document: Document) -> None:
        self._documents[self._arrived] = document
        self._waiting.add(len(document.tokens), self._arrived)
        self._arrived += 1


class Stream:
    def __init__(self, row_tokens: int, buffer_docs: int = 0):
        self._row_tokens = row_tokens
        self.restore((), 0)

    def next_row(self, documents: Iterator[Document]) -> PackedRow | None:
        parts, ids, room = [], [], self._row_tokens
        while room:
            if self._document is None or self._offset == len(self._document.tokens):
                self._document, self._offset = next(documents, None), 0
                if self._document is None:
                    return None
            parts.append(self._document.tokens[self._offset :][:room])
            ids.append(self._document.id)
            room -= len(parts[-1])
            self._offset += len(parts[-1])
        self._offset -= 1  # the last target is the next row's first input
        return PackedRow(np.concatenate(parts), ids, 0)

    def held(self) -> tuple[list[DocumentId], int]:
        """Id of the document being cut, if any, and how many of its tokens are used up."""
        return ([], 0) if self._document is None else ([self._document.id], self._offset)

    def restore(self, documents: Sequence[Document], offset: int) -> None:
        self._document, self._offset = documents[0] if documents else None, offset


PACKERS = {"best_fit": BestFit, "stream": Stream}
