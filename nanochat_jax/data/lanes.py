"""One lane of the training data: an endless stream of packed rows that can be stopped and resumed.

    Corpus --> documents of this lane --> tokens, some documents ahead --> packer --> rows

A lane owns every num_lanes-th row group of the corpus, or every num_lanes-th document when there
are few. Its state is where it reads and which documents its packer holds.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.data.packing import PACKERS, Document, DocumentId, PackedRow
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tokenizer.bpe import Tokenizer

# Documents per call of the tokenizer: enough to occupy its threads, few enough to start quickly.
_TOKENIZE_DOCS = 128
# With fewer row groups than this per lane, lanes share the documents of each, which balances them.
_MIN_ROW_GROUPS_PER_LANE = 8
_RESTORE_THREADS = 8

State = dict[str, Any]
# What a lane has met so far, part of its state; cropped are the tokens that the packer dropped.
COUNTS = ("documents", "empty_documents", "cropped_tokens")


@dataclass(frozen=True)
class DataOrder:
    """The texts, and what fixes the order of their tokens in rows."""

    corpus: Corpus
    tokenizer: Tokenizer
    seq_len: int
    packing: str = "best_fit"
    buffer_docs: int = 1000
    num_lanes: int = 1

    def __post_init__(self):
        if self.packing not in PACKERS:
            raise UserError(
                f"got config.data.packing = {self.packing!r}, expected one of {sorted(PACKERS)}"
            )
        for name in ("num_lanes", "buffer_docs"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"got config.data.{name} = {value}, expected at least 1")

    def describe(self) -> dict[str, Any]:
        names = ("seq_len", "packing", "buffer_docs", "num_lanes")
        return {"shards": self.corpus.fingerprint, **{name: getattr(self, name) for name in names}}


class Lane(Iterator[PackedRow]):
    """The rows of one lane."""

    def __init__(self, order: DataOrder, lane: int, endless: bool = True):
        self._order, self._lane, self._endless = order, lane, endless
        self._packer = PACKERS[order.packing](order.seq_len + 1, order.buffer_docs)
        self._counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        # The lane's row groups are [first::step]; of each it owns all rows, or every num_lanes-th.
        by_group = len(order.corpus.row_groups) >= _MIN_ROW_GROUPS_PER_LANE * order.num_lanes
        self._first_group, self._group_step = (lane, order.num_lanes) if by_group else (0, 1)
        self._row_step = 1 if by_group else order.num_lanes
        # Complete passes, row group, row: those before it are read.
        self._cursor = [0, self._first_group, 0]
        self._documents = self._read()

    @property
    def epoch(self) -> int:
        return self._cursor[0]

    def __next__(self) -> PackedRow:
        row = self._packer.next_row(self._documents)
        if row is None:
            raise StopIteration
        self._counts["cropped_tokens"] += row.cropped_tokens
        return row

    def get_state(self) -> State:
        ids, offset = self._packer.held()
        buffer = " ".join(f"{group}:{row}" for group, row in ids)
        return {"cursor": self._cursor, "buffer": buffer, "offset": offset, **self._counts}

    def set_state(self, state: State) -> None:
        self._cursor = state["cursor"]
        self._counts = {name: state[name] for name in COUNTS}
        self._documents = self._read()
        pairs = (item.split(":") for item in state["buffer"].split())
        held = self._tokenize_again([(int(group), int(row)) for group, row in pairs])
        self._packer.restore(held, state["offset"])

    def _read(self) -> Iterator[Document]:
        """The documents that are not empty from the cursor on, which moves with them."""
        corpus, counts = self._order.corpus, self._counts
        epoch, first_group, first_row = self._cursor
        while True:
            for group in range(first_group, len(corpus.row_groups), self._group_step):
                rows, first_row = self._rows(group, first_row), 0
                texts = corpus.read(group) if rows else []
                for start in range(0, len(rows), _TOKENIZE_DOCS):
                    ahead = rows[start : start + _TOKENIZE_DOCS]
                    filled = [row for row in ahead if texts[row].strip()]
                    tokens = self._tokenize([texts[row] for row in filled])
                    tokens_of = dict(zip(filled, tokens, strict=True))
                    for row, following in zip(ahead, [*ahead[1:], ahead[-1] + 1], strict=True):
                        self._cursor = [epoch, group, following]
                        counts["documents"] += 1
                        counts["empty_documents"] += row not in tokens_of
                        if row in tokens_of:
                            yield Document((group, row), tokens_of[row])
            if not self._endless:
                return
            if counts["documents"] == counts["empty_documents"]:
                raise UserError(
                    f"got no text for lane {self._lane} of {self._order.num_lanes} in "
                    f"{corpus.num_documents} documents, expected at least one each; "
                    "use more text or a smaller config.data.num_lanes"
                )
            epoch, first_group = epoch + 1, self._first_group

    def _rows(self, group: int, first_row: int) -> range:
        """The lane's rows of a row group from `first_row` on."""
        _, _, num_documents, first_document = self._order.corpus.row_groups[group]
        first = (self._lane - first_document) % self._row_step
        read = -(-max(first_row - first, 0) // self._row_step)
        return range(first, num_documents, self._row_step)[read:]

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._order.tokenizer.encode_batch(texts, bos=True)
        return [np.array(ids, np.int32) for ids in encoded]

    def _tokenize_again(self, ids: list[DocumentId]) -> list[Document]:
        """Documents by id: those that a saved packer held, which are from many row groups."""

        def read(group: int) -> dict[DocumentId, str]:
            texts = self._order.corpus.read(group)
            return {id: texts[id[1]] for id in ids if id[0] == group}

        with ThreadPoolExecutor(_RESTORE_THREADS) as pool:
            found = pool.map(read, {group for group, _ in ids})
            texts = {id: text for by_id in found for id, text in by_id.items()}
        tokens: list[np.ndarray] = []
        for start in range(0, len(ids), _TOKENIZE_DOCS):
            tokens += self._tokenize([texts[id] for id in ids[start : start + _TOKENIZE_DOCS]])
        return [Document(id, array) for id, array in zip(ids, tokens, strict=True)]
