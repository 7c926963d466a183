"""From shards to batches: the training data as one resumable iterator.

    shards --> lane 0   --> rows --+
           --> ...                 +--> batch, rows ordered by lane --> prefetch --> training step
           --> lane L-1 --> rows --+

The order of the data depends on the shards, `num_lanes` and the packing; never on the number of
processes: process p of P owns the lanes p*L/P to (p+1)*L/P - 1. The states of P processes merge
into one, which any number of processes can start from. Grain makes batches ahead in a thread.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import grain
import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.data.lanes import COUNTS, DataOrder, Lane, State
from nanochat_jax.data.packing import PackedRow
from nanochat_jax.data.sources import Corpus

Batch = dict[str, Any]


class _LaneBatches(Iterator[Batch]):
    """Endless batches of some lanes, `rows_per_lane` rows of each."""

    def __init__(self, order: DataOrder, lanes: range, rows_per_lane: int):
        self._corpus, self._rows_per_lane = order.corpus, rows_per_lane
        self._lanes = {str(lane): Lane(order, lane) for lane in lanes}
        self._start: dict[str, State] | None = None

    def __next__(self) -> Batch:
        if self._start is not None:  # not in set_state: restoring belongs to the prefetching thread
            for name, lane in self._lanes.items():
                lane.set_state(self._start[name])
            self._start = None
        lanes = self._lanes.values()
        rows = [row for lane in lanes for row in islice(lane, self._rows_per_lane)]
        epoch = min(lane.epoch for lane in lanes)
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
    """Endless training batches of this process, `prefetch` of them made ahead in a thread.

    A batch: `inputs` and `targets` int32 [R, T] with R = batch_rows / process_count; `doc_ids`, for
    each row the names of its documents (Corpus.name); `epoch`, the passes over the data completed.
    """

    def __init__(
        self,
        order: DataOrder,
        *,
        batch_rows: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        count = order.num_lanes // process_count
        lanes = range(process_index * count, (process_index + 1) * count)
        super().__init__(_LaneBatches(order, lanes, batch_rows // order.num_lanes), prefetch)
        self._order = order
        if batch_rows % order.num_lanes or order.num_lanes % process_count:
            raise UserError(
                f"got config.data.num_lanes = {order.num_lanes}, expected a divisor of the "
                f"{batch_rows} rows of a batch and a multiple of the {process_count} processes"
            )

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
        """Documents and tokens met so far by our lanes: lanes.COUNTS summed."""
        lanes = super().get_state().values()
        return {name: sum(lane[name] for lane in lanes) for name in COUNTS}


def merge_states(states: Sequence[State]) -> State:
    """One state of the states of all processes, which any number of processes can continue."""
    if "lanes" not in states[0]:  # a place in conversations, which all processes share
        return states[0]
    lanes = {name: lane for state in states for name, lane in state["lanes"].items()}
    return {"plan": states[0]["plan"], "lanes": lanes}


def eval_batches(
    order: DataOrder,
    *,
    batch_rows: int,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The first `num_batches` batches of one pass over the corpus: the same ones at every call.

    Packed as for training, in one lane. When the text ends there are fewer, the last filled up with
    rows whose targets are all -1. Every process packs all rows and keeps its own.
    """
    assert batch_rows % process_count == 0
    rows_here, lane, batches = batch_rows // process_count, Lane(order, 0, endless=False), []
    ours = slice(process_index * rows_here, (process_index + 1) * rows_here)
    while len(batches) < num_batches and (rows := list(islice(lane, batch_rows))):
        batch = _make_batch(order.corpus, rows + rows[-1:] * (batch_rows - len(rows)))
        batch["targets"][len(rows) :] = -1
        batches.append({name: values[ours] for name, values in batch.items()})
    if not batches:
        corpus = order.corpus
        raise UserError(
            f"got {corpus.num_documents} documents in {', '.join(map(str, corpus.paths))}, expected"
            f" enough for a row of {order.seq_len + 1} tokens; use more text or shorter rows"
        )
    return batches
