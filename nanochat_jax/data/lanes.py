"""One lane of the training data: an endless stream of packed rows that can be stopped and resumed.

    Corpus --> documents of this lane --> tokens, some documents ahead --> packer --> rows

A lane owns every num_lanes-th row group of the corpus (every num_lanes-th document when there are
few row groups) and reads them in order, pass after pass. Empty documents are skipped and counted.

Its state is where it reads and the ids of the documents its packer holds. Restoring tokenises those
again, so the next row is the one that would have come; tokens are never saved. Documents wait long
in a best-fit buffer, so their ids may point to as many row groups as there are documents.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.data.packing import PACKERS, Document, DocumentId, PackedRow
from nanochat_jax.data.sources import Corpus, Texts
from nanochat_jax.tokenizer.bpe import Tokenizer

# Documents per call of the tokenizer: enough to occupy its threads, few enough to start quickly.
_TOKENIZE_DOCS = 128
# With fewer row groups than this per lane, lanes share the documents of each, which balances them.
_MIN_ROW_GROUPS_PER_LANE = 8
_RESTORE_THREADS = 8

State = dict[str, Any]


@dataclass
class Counts:
    """What a lane has met so far; part of its state."""

    documents: int = 0
    empty_documents: int = 0  # skipped
    repaired_documents: int = 0  # had bytes that are not UTF-8
    cropped_tokens: int = 0  # dropped by the packer


@dataclass(frozen=True)
class DataOrder:
    """The texts, and what fixes the order of their tokens in rows."""

    corpus: Corpus
    tokenizer: Tokenizer
    seq_len: int
    packing: str
    buffer_docs: int
    num_lanes: int

    def describe(self) -> dict[str, Any]:
        """What a saved state must agree with to be continued."""
        names = ("seq_len", "packing", "buffer_docs", "num_lanes")
        return {"shards": self.corpus.fingerprint, **{name: getattr(self, name) for name in names}}


class Lane:
    """A cursor, documents read ahead and a packer; see the head of this file."""

    def __init__(self, order: DataOrder, lane: int, endless: bool = True):
        self._order, self._lane, self._endless = order, lane, endless
        self._packer = PACKERS[order.packing](order.seq_len + 1, order.buffer_docs)
        self._counts = Counts()
        # The lane's row groups are [first::step]; of each it owns all rows, or every num_lanes-th.
        self._groups = order.corpus.row_groups
        by_group = len(self._groups) >= _MIN_ROW_GROUPS_PER_LANE * order.num_lanes
        self._first_group, self._group_step = (lane, order.num_lanes) if by_group else (0, 1)
        self._row_step = 1 if by_group else order.num_lanes
        self.epoch = 0  # complete passes behind the cursor
        self._group = self._first_group
        self._row = 0  # rows before this one are read
        self._texts: tuple[int, Texts] = (-1, Texts([], frozenset()))  # of the row group being read
        # The next documents: row group, row, tokens or None if empty, repaired.
        self._ahead: deque[tuple[int, int, np.ndarray | None, bool]] = deque()

    def next_row(self) -> PackedRow | None:
        """The next packed row; None at the end of a lane that is not endless."""
        row = self._packer.next_row(self._pull)
        if row is not None:
            self._counts.cropped_tokens += row.cropped_tokens
        return row

    def get_state(self) -> State:
        group, row = self._ahead[0][:2] if self._ahead else (self._group, self._row)
        ids, offset = self._packer.held()
        buffer = " ".join(f"{group}:{row}" for group, row in ids)
        cursor = [self.epoch, group, row]
        return {"cursor": cursor, "buffer": buffer, "offset": offset, **asdict(self._counts)}

    def set_state(self, state: State) -> None:
        self._ahead.clear()
        self.epoch, self._group, self._row = state["cursor"]
        self._counts = Counts(**{field.name: state[field.name] for field in fields(Counts)})
        pairs = (item.split(":") for item in state["buffer"].split())
        held = self._tokenize_again([(int(group), int(row)) for group, row in pairs])
        self._packer.restore(held, state["offset"])

    def _pull(self) -> Document | None:
        while self._ahead or self._read_ahead():
            group, row, tokens, repaired = self._ahead.popleft()
            self._counts.documents += 1
            self._counts.repaired_documents += repaired
            if tokens is not None:
                return Document((group, row), tokens)
            self._counts.empty_documents += 1
        return None

    def _read_ahead(self) -> bool:
        """Queue some documents of one row group, so that the cursor's epoch is theirs; False at the
        end."""
        while not (rows := self._rows_left()[:_TOKENIZE_DOCS]):
            self._group, self._row = self._group + self._group_step, 0
            if self._group >= len(self._groups):
                if not self._endless:
                    return False
                self._start_next_epoch()
        if self._texts[0] != self._group:
            self._texts = (self._group, self._order.corpus.read(self._group))
        texts, repaired = self._texts[1]
        filled = [row for row in rows if texts[row].strip()]
        tokens = dict(zip(filled, self._tokenize([texts[row] for row in filled]), strict=True))
        self._ahead.extend((self._group, row, tokens.get(row), row in repaired) for row in rows)
        self._row = rows[-1] + 1
        return True

    def _rows_left(self) -> range:
        """The lane's rows of the current row group that are not read yet."""
        if self._group >= len(self._groups):
            return range(0)
        _, _, num_documents, first_document = self._groups[self._group]
        first = (self._lane - first_document) % self._row_step
        read = -(-max(self._row - first, 0) // self._row_step)
        return range(first, num_documents, self._row_step)[read:]

    def _start_next_epoch(self) -> None:
        if self._counts.documents == self._counts.empty_documents:
            raise UserError(
                f"got no text for lane {self._lane} of {self._order.num_lanes} in "
                f"{self._order.corpus.num_documents} documents, expected at least one each; "
                "use more text or a smaller config.data.num_lanes"
            )
        self.epoch, self._group, self._row = self.epoch + 1, self._first_group, 0

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._order.tokenizer.encode_batch(texts, bos=True)
        return [np.array(ids, np.int32) for ids in encoded]

    def _tokenize_again(self, ids: list[DocumentId]) -> list[Document]:
        """Documents by id: those that a saved packer held. Long ones come from many row groups."""

        def read(group: int) -> dict[DocumentId, str]:
            texts = self._order.corpus.read(group).texts
            return {id: texts[id[1]] for id in ids if id[0] == group}

        with ThreadPoolExecutor(_RESTORE_THREADS) as pool:
            found = pool.map(read, {group for group, _ in ids})
            texts = {id: text for by_id in found for id, text in by_id.items()}
        tokens: list[np.ndarray] = []
        for start in range(0, len(ids), _TOKENIZE_DOCS):
            tokens += self._tokenize([texts[id] for id in ids[start : start + _TOKENIZE_DOCS]])
        return [Document(id, array) for id, array in zip(ids, tokens, strict=True)]
