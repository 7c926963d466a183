"""From shards to batches: the training data as one resumable iterator.

    shards --> lane 0   --> rows --+
           --> ...                 +--> batch, rows ordered by lane --> prefetch --> training step
           --> lane L-1 --> rows --+

The order of the data depends on the shards, `num_lanes` and the packing; never on the number of
processes. A batch holds batch_rows / num_lanes rows of each lane, and process p of P owns the lanes
p*L/P to (p+1)*L/P - 1, which lie side by side in the batch.

State is kept per lane (lanes.py). The states of P processes merge into one, which any number of
processes can start from: an interrupted run sees exactly the batches of an uninterrupted one. Grain
makes batches ahead in a thread and keeps with each the state that belongs to it, so that the state
is always that of the batch last handed out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.data.lanes import Counts, DataOrder, Lane, State
from nanochat_jax.data.packing import PACKERS, PackedRow
from nanochat_jax.data.sources import Corpus
from nanochat_jax.tokenizer.bpe import Tokenizer

Batch = dict[str, Any]


class _LaneBatches(Iterator[Batch]):
    """Endless batches of some lanes, `rows_per_lane` rows of each; the state is by lane."""

    def __init__(self, order: DataOrder, lanes: range, rows_per_lane: int):
        self._corpus, self._rows_per_lane = order.corpus, rows_per_lane
        self._lanes = {str(lane): Lane(order, lane) for lane in lanes}
        self._start: dict[str, State] | None = None

    def __next__(self) -> Batch:
        if self._start is not None:  # not in set_state: restoring belongs to the prefetching thread
            for name, lane in self._lanes.items():
                lane.set_state(self._start[name])
            self._start = None
        rows = []
        for lane in self._lanes.values():
            for _ in range(self._rows_per_lane):
                row = lane.next_row()
                assert row is not None  # these lanes are endless
                rows.append(row)
        epoch = min(lane.epoch for lane in self._lanes.values())
        return _make_batch(self._corpus, rows) | {"epoch": epoch}

    def get_state(self) -> dict[str, State]:
        return self._start or {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict[str, State]) -> None:
        self._start = state


def _make_batch(corpus: Corpus, rows: Sequence[PackedRow]) -> Batch:
    tokens = np.stack([row.tokens for row in rows])  # [R, T+1]
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),  # [R, T]
        "targets": np.ascontiguousarray(tokens[:, 1:]),  # [R, T]
        "doc_ids": [[corpus.name(*id) for id in row.ids] for row in rows],
    }


class TrainBatches(grain.experimental.ThreadPrefetchDatasetIterator):
    """This process's part of the training batches, made ahead of time; see `train_batches`."""

    def __init__(self, order: DataOrder, lanes: range, rows_per_lane: int, prefetch: int):
        super().__init__(_LaneBatches(order, lanes, rows_per_lane), prefetch)
        self._order = order

    def get_state(self) -> State:
        """State after the last batch handed out: small, JSON, one entry for each of our lanes."""
        return {"plan": self._order.describe(), "lanes": super().get_state()}

    def set_state(self, state: State) -> None:
        """Continue after the batch `state` belongs to; it may hold the lanes of other processes."""
        ours = self._order.describe()
        for key, saved in state["plan"].items():
            if ours[key] != saved:
                raise UserError(
                    f"the saved data state was made with {key} = {saved!r}, this run has "
                    f"{ours[key]!r}; use the same shards and data settings, or start a new run"
                )
        lanes = super().get_state().keys()
        if missing := lanes - state["lanes"].keys():
            raise UserError(
                f"the saved data state lacks lanes {sorted(missing, key=int)}; restore the states "
                "of all processes (pipeline.merge_states), or start a new run"
            )
        super().set_state({name: state["lanes"][name] for name in lanes})

    def counts(self) -> dict[str, int]:
        """Documents and tokens met so far by our lanes, those of `Counts` summed."""
        lanes = super().get_state().values()
        return {field.name: sum(lane[field.name] for lane in lanes) for field in fields(Counts)}


def merge_states(states: Sequence[State]) -> State:
    """One state of the states of all processes, which any number of processes can continue.

    A state without lanes is a place that all processes share.
    """
    if "lanes" not in states[0]:
        return states[0]
    lanes = {name: lane for state in states for name, lane in state["lanes"].items()}
    return {"plan": states[0]["plan"], "lanes": lanes}


def train_batches(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_rows: int,
    packing: str = "best_fit",
    buffer_docs: int = 1000,
    num_lanes: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> TrainBatches:
    """Endless training batches of this process, `prefetch` of them made ahead in a thread.

    A batch: `inputs` and `targets` int32 [R, T] with R = batch_rows / process_count; `doc_ids`, for
    each row the names of its documents (Corpus.name); `epoch`, the passes over the data completed.
    """
    if packing not in PACKERS:
        raise UserError(f"got config.data.packing = {packing!r}, expected one of {sorted(PACKERS)}")
    for name, value in [("num_lanes", num_lanes), ("buffer_docs", buffer_docs)]:
        if value < 1:
            raise UserError(f"got config.data.{name} = {value}, expected at least 1")
    if batch_rows % num_lanes or num_lanes % process_count:
        raise UserError(
            f"got config.data.num_lanes = {num_lanes}, expected a divisor of the {batch_rows} rows "
            f"of a batch and a multiple of the {process_count} processes"
        )
    per_process = num_lanes // process_count
    lanes = range(process_index * per_process, (process_index + 1) * per_process)
    order = DataOrder(Corpus(paths), tokenizer, seq_len, packing, buffer_docs, num_lanes)
    return TrainBatches(order, lanes, batch_rows // num_lanes, prefetch)


def eval_batches(
    paths: Path | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_rows: int,
    num_batches: int,
    packing: str = "best_fit",
    buffer_docs: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The first `num_batches` batches of one pass over `paths`: the same ones at every call.

    Packed as for training. When the text ends there are fewer, the last filled up with rows whose
    targets are all -1; an error when there is not one row. Every process packs all rows and keeps
    its own, R = batch_rows / process_count.
    """
    if batch_rows % process_count:
        raise UserError(
            f"got {batch_rows} rows a batch for {process_count} processes, expected a multiple"
        )
    corpus = Corpus([paths] if isinstance(paths, Path) else paths)
    lane = Lane(DataOrder(corpus, tokenizer, seq_len, packing, buffer_docs, 1), 0, endless=False)
    rows_here = batch_rows // process_count
    ours = slice(process_index * rows_here, (process_index + 1) * rows_here)
    batches = []
    while len(batches) < num_batches:
        rows = [row for _ in range(batch_rows) if (row := lane.next_row()) is not None]
        if not rows:
            break
        missing = batch_rows - len(rows)
        batch = _make_batch(corpus, rows + rows[-1:] * missing)
        batch["targets"][len(rows) :] = -1
        batches.append({name: values[ours] for name, values in batch.items()})
    if not batches:
        raise UserError(
            f"got {corpus.num_documents} documents in {', '.join(map(str, corpus.paths))}, "
            f"expected enough for a row of {seq_len + 1} tokens; use more text or shorter rows"
        )
    return batches
