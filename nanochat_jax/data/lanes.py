"""One lane of the training data: an endless stream of packed rows that can be stopped and resumed.

    Corpus --> documents of this lane --> tokens, some documents ahead --> packer --> rows

A lane owns every num_lanes-th row group of the corpus (every num_lanes-th document when there are
few row groups) and reads them in order, pass after pass. Empty documents are skipped and counted.

Its state is where it reads and the ids of the documents its packer holds. Restoring tokenises those
again, so the next row is the one that would have come; tokens are never saved. Documents wait long
in a best-fit buffer, so their ids may point to as many row groups as there are documents.
"""

import dataclasses
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.data.packing import PACKERS, Document, Row
from nanochat_jax.data.sources import Corpus, Texts

# Documents per call of the tokenizer: enough to occupy its threads, few enough to start quickly.
_TOKENIZE_DOCS = 128
# With fewer row groups than this per lane, lanes share the documents of each, which balances them.
_MIN_ROW_GROUPS_PER_LANE = 8
_RESTORE_THREADS = 8

State = dict[str, Any]


@dataclasses.dataclass
class Counts:
    """What a lane has met so far; part of its state."""

    documents: int = 0
    empty_documents: int = 0  # skipped
    repaired_documents: int = 0  # had bytes that are not UTF-8
    cropped_tokens: int = 0  # dropped by the packer


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fixes the order of the data, apart from the texts. Picklable, for worker processes."""

    corpus: Corpus
    tokenizer: Any  # nanochat_jax.tokenizer.bpe.Tokenizer
    seq_len: int
    packing: str
    buffer_docs: int
    num_lanes: int

    @property
    def by_row_group(self) -> bool:
        return len(self.corpus.row_groups) >= _MIN_ROW_GROUPS_PER_LANE * self.num_lanes

    def describe(self) -> dict[str, Any]:
        """What a saved state must agree with to be continued."""
        return {
            "shards": self.corpus.fingerprint,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "buffer_docs": self.buffer_docs,
            "num_lanes": self.num_lanes,
        }


class Lane:
    """A cursor, documents read ahead and a packer; see the head of this file."""

    def __init__(self, plan: Plan, lane: int, endless: bool = True):
        self._plan = plan
        self._endless = endless
        self._packer = PACKERS[plan.packing](plan.seq_len + 1, plan.buffer_docs)
        self._counts = Counts()
        # The lane's row groups are [first::step]; of each it owns all rows, or every num_lanes-th.
        self._first_group, self._group_step = (
            (lane, plan.num_lanes) if plan.by_row_group else (0, 1)
        )
        self._row_step = 1 if plan.by_row_group else plan.num_lanes
        self._lane = lane
        self._epoch = 0  # complete passes behind the cursor
        self._group = self._first_group
        self._row = 0  # rows before this one are read
        self._texts: tuple[int, Texts] = (-1, Texts([], frozenset()))  # of the row group being read
        self._ahead: deque[tuple[int, int, np.ndarray | None, bool]] = deque()  # see _read_ahead

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_row(self) -> Row | None:
        """The next packed row; None at the end of a lane that is not endless."""
        row = self._packer.next_row(self._pull)
        if row is not None:
            self._counts.cropped_tokens += row.cropped_tokens
        return row

    def get_state(self) -> State:
        group, row = self._ahead[0][:2] if self._ahead else (self._group, self._row)
        ids, offset = self._packer.held()
        return {
            "cursor": [self._epoch, group, row],
            "buffer": " ".join(f"{group}:{row}" for group, row in ids),
            "offset": offset,
            **dataclasses.asdict(self._counts),
        }

    def set_state(self, state: State) -> None:
        self._ahead.clear()
        self._epoch, self._group, self._row = state["cursor"]
        self._counts = Counts(**{f.name: state[f.name] for f in dataclasses.fields(Counts)})
        pairs = (item.split(":") for item in state["buffer"].split())
        self._packer.restore(
            self._tokenize_again([(int(group), int(row)) for group, row in pairs]), state["offset"]
        )

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
        """Queue (row group, row, tokens or None if empty, repaired) of the next documents.

        They are all of one row group, so that the cursor's epoch is theirs. False at the end.
        """
        corpus = self._plan.corpus
        while True:
            if self._group >= len(corpus.row_groups):
                if not self._endless:
                    return False
                self._start_next_epoch()
            rows = self._rows_left()[:_TOKENIZE_DOCS]
            if rows:
                break
            self._group, self._row = self._group + self._group_step, 0
        if self._texts[0] != self._group:
            read = corpus.read if self._plan.by_row_group else corpus.read_shared
            self._texts = (self._group, read(self._group))
        texts, repaired = self._texts[1]
        filled = [row for row in rows if texts[row].strip()]
        tokens = dict(zip(filled, self._tokenize([texts[row] for row in filled]), strict=True))
        self._ahead.extend((self._group, row, tokens.get(row), row in repaired) for row in rows)
        self._row = rows[-1] + 1
        return True

    def _rows_left(self) -> range:
        """The lane's rows of the current row group that are not read yet."""
        group = self._plan.corpus.row_groups[self._group]
        first = (self._lane - group.first_document) % self._row_step
        read = -(-max(self._row - first, 0) // self._row_step)
        return range(first, group.num_documents, self._row_step)[read:]

    def _start_next_epoch(self) -> None:
        if self._counts.documents == self._counts.empty_documents:
            raise UserError(
                f"got no text for lane {self._lane} of {self._plan.num_lanes} in "
                f"{self._plan.corpus.num_documents} documents, expected at least one each; "
                "use more text or a smaller config.data.num_lanes"
            )
        self._epoch, self._group, self._row = self._epoch + 1, self._first_group, 0

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.array(ids, np.int32) for ids in self._plan.tokenizer.encode_batch(texts, bos=True)
        ]

    def _tokenize_again(self, ids: list[tuple[int, int]]) -> list[Document]:
        """Documents by id: those that a saved packer held. Long ones come from many row groups."""
        rows_by_group: dict[int, list[int]] = {}
        for group, row in ids:
            rows_by_group.setdefault(group, []).append(row)

        def read(group: int) -> list[tuple[tuple[int, int], str]]:
            texts = self._plan.corpus.read(group).texts
            return [((group, row), texts[row]) for row in rows_by_group[group]]

        with ThreadPoolExecutor(_RESTORE_THREADS) as pool:
            texts = dict(item for items in pool.map(read, rows_by_group) for item in items)
        documents = []
        for start in range(0, len(ids), _TOKENIZE_DOCS):
            batch = ids[start : start + _TOKENIZE_DOCS]
            tokens = self._tokenize([texts[id] for id in batch])
            documents += [Document(id, array) for id, array in zip(batch, tokens, strict=True)]
        return documents
