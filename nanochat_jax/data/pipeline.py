"""From shards to batches: the training data as one resumable Grain iterator.

    shards --> lane 0   --> rows --+
           --> ...                 +--> batch, rows ordered by lane --> prefetch --> training step
           --> lane L-1 --> rows --+

The order of the data depends on the shards, `num_lanes` and the packing; never on the number of
processes or workers. A batch holds batch_rows / num_lanes rows of each lane, and process p of P
owns the lanes p*L/P to (p+1)*L/P - 1, which lie side by side in the batch.

State is kept per lane (lanes.py). The states of P processes merge into one, which any number of
processes can start from: an interrupted run sees exactly the batches of an uninterrupted one. A
batch made ahead of time carries the state that belongs to it, so that prefetching, by a thread or
by worker processes, never moves the state past the batch last handed out.
"""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from nanochat_jax.common import UserError
from nanochat_jax.data.lanes import Counts, Lane, Plan, State
from nanochat_jax.data.packing import PACKERS, Row
from nanochat_jax.data.sources import Corpus

Batch = dict[str, Any]


class LaneBatches(grain.IterDataset[Batch]):
    """Endless batches of some lanes, `rows_per_lane` rows of each, from a state on."""

    def __init__(self, plan: Plan, lanes: range, rows_per_lane: int, states: dict[str, State]):
        super().__init__()
        self.plan = plan
        self.lanes = lanes
        self.rows_per_lane = rows_per_lane
        self.states = states

    def __iter__(self) -> "LaneBatchesIterator":
        return LaneBatchesIterator(self)


class LaneBatchesIterator(grain.DatasetIterator[Batch]):
    def __init__(self, dataset: LaneBatches):
        super().__init__()
        self._plan = dataset.plan
        self._rows_per_lane = dataset.rows_per_lane
        self._lanes = {str(lane): Lane(dataset.plan, lane) for lane in dataset.lanes}
        self._start: dict[str, State] | None = dataset.states

    def __next__(self) -> Batch:
        if self._start is not None:  # not in __init__: restoring belongs to the prefetching thread
            for name, lane in self._lanes.items():
                lane.set_state(self._start[name])
            self._start = None
        rows = []
        for lane in self._lanes.values():
            for _ in range(self._rows_per_lane):
                row = lane.next_row()
                assert row is not None  # these lanes are endless
                rows.append(row)
        batch = make_batch(self._plan.corpus, rows)
        batch["epoch"] = min(lane.epoch for lane in self._lanes.values())
        batch["state"] = self.get_state()
        return batch

    def get_state(self) -> dict[str, State]:
        if self._start is not None:
            return self._start
        return {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict[str, State]) -> None:
        self._start = state


def make_batch(corpus: Corpus, rows: Sequence[Row]) -> Batch:
    tokens = np.stack([row.tokens for row in rows])  # [R, T+1]
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),  # [R, T]
        "targets": np.ascontiguousarray(tokens[:, 1:]),  # [R, T]
        "doc_ids": [[corpus.name(*id) for id in row.ids] for row in rows],
    }


def _live_with_parent(worker_index: int, num_workers: int) -> None:
    """In a worker: leave Ctrl-C to the trainer, end when the trainer is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class TrainBatches(grain.DatasetIterator[Batch]):
    """This process's part of the training batches, made ahead of time; see `train_batches`."""

    def __init__(
        self, plan: Plan, lanes: range, rows_per_lane: int, num_workers: int, prefetch: int
    ):
        super().__init__()
        self._plan = plan
        self._rows_per_lane = rows_per_lane
        self._prefetch = prefetch
        self._num_workers = num_workers
        # One part a worker; without workers one part, made by a thread.
        per_part = len(lanes) // max(num_workers, 1)
        self._parts = [lanes[i : i + per_part] for i in range(0, len(lanes), per_part)]
        self._lanes = {str(lane): Lane(plan, lane).get_state() for lane in lanes}
        self._iterators: list[grain.DatasetIterator[Batch]] = []

    def __next__(self) -> Batch:
        if not self._iterators:
            self.start_prefetch()
        parts = [next(iterator) for iterator in self._iterators]
        for part in parts:
            self._lanes |= part.pop("state")
        if len(parts) == 1:
            return parts[0]
        return {
            "inputs": np.concatenate([part["inputs"] for part in parts]),
            "targets": np.concatenate([part["targets"] for part in parts]),
            "doc_ids": [ids for part in parts for ids in part["doc_ids"]],
            "epoch": min(part["epoch"] for part in parts),
        }

    def start_prefetch(self) -> None:
        """Begin to make batches before the first one is asked for."""
        if self._iterators:
            return
        for lanes in self._parts:
            states = {str(lane): self._lanes[str(lane)] for lane in lanes}
            dataset = LaneBatches(self._plan, lanes, self._rows_per_lane, states)
            if self._num_workers:
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags before it starts workers
                options = grain.MultiprocessingOptions(
                    num_workers=1, per_worker_buffer_size=max(self._prefetch, 1)
                )
                iterator = iter(dataset.mp_prefetch(options, worker_init_fn=_live_with_parent))
            else:
                iterator = iter(
                    grain.experimental.ThreadPrefetchIterDataset(
                        dataset, prefetch_buffer_size=self._prefetch
                    )
                )
            if self._num_workers or self._prefetch:
                iterator.start_prefetch()
            self._iterators.append(iterator)

    def get_state(self) -> State:
        """State after the last batch handed out: small, JSON, one entry for each of our lanes."""
        return {"plan": self._plan.describe(), "lanes": dict(self._lanes)}

    def set_state(self, state: State) -> None:
        """Continue after the batch `state` belongs to; it may hold the lanes of other processes."""
        ours = self._plan.describe()
        for key, saved in state["plan"].items():
            if ours[key] != saved:
                raise UserError(
                    f"the saved data state was made with {key} = {saved!r}, this run has "
                    f"{ours[key]!r}; use the same shards and data settings, or start a new run"
                )
        if missing := self._lanes.keys() - state["lanes"].keys():
            raise UserError(
                f"the saved data state lacks lanes {sorted(missing, key=int)}; restore the states "
                "of all processes (pipeline.merge_states), or start a new run"
            )
        self._stop()
        self._lanes = {name: state["lanes"][name] for name in self._lanes}

    def counts(self) -> dict[str, int]:
        """Documents and tokens met so far by our lanes, those of `Counts` summed."""
        names = [field.name for field in dataclasses.fields(Counts)]
        return {name: sum(lane[name] for lane in self._lanes.values()) for name in names}

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        for iterator in self._iterators:
            iterator.close()
        self._iterators = []


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
    tokenizer: Any,
    *,
    seq_len: int,
    batch_rows: int,
    packing: str = "best_fit",
    buffer_docs: int = 1000,
    num_lanes: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> TrainBatches:
    """Endless training batches of this process, as a Grain iterator with get_state and set_state.

    A batch: `inputs` and `targets` int32 [R, T] with R = batch_rows / process_count; `doc_ids`, for
    each row the names of its documents (Corpus.name); `epoch`, the passes over the data completed.
    `num_workers` = 0 makes `prefetch` batches ahead in a thread, else in that many processes,
    between which the lanes are divided.
    """
    if packing not in PACKERS:
        raise UserError(f"got config.data.packing = {packing!r}, expected one of {sorted(PACKERS)}")
    for name, value in [("data.num_lanes", num_lanes), ("data.buffer_docs", buffer_docs)]:
        if value < 1:
            raise UserError(f"got config.{name} = {value}, expected at least 1")
    if batch_rows % num_lanes:
        raise UserError(
            f"got {batch_rows} rows a batch and config.data.num_lanes = {num_lanes}, expected a "
            "multiple; change num_lanes or the batch"
        )
    if num_lanes % process_count:
        raise UserError(
            f"got config.data.num_lanes = {num_lanes} and {process_count} processes, expected a "
            "multiple; set num_lanes to the number of processes or a multiple of it"
        )
    lanes_here = num_lanes // process_count
    if num_workers and lanes_here % num_workers:
        raise UserError(
            f"got config.data.num_workers = {num_workers} for {lanes_here} lanes a process, "
            "expected a divisor; change num_workers or num_lanes"
        )
    plan = Plan(Corpus(paths), tokenizer, seq_len, packing, buffer_docs, num_lanes)
    lanes = range(process_index * lanes_here, (process_index + 1) * lanes_here)
    return TrainBatches(plan, lanes, batch_rows // num_lanes, num_workers, prefetch)


def eval_batches(
    paths: Path | Sequence[Path],
    tokenizer: Any,
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
    corpus = Corpus([paths] if isinstance(paths, Path | str) else paths)
    lane = Lane(Plan(corpus, tokenizer, seq_len, packing, buffer_docs, 1), 0, endless=False)
    rows_here = batch_rows // process_count
    ours = slice(process_index * rows_here, (process_index + 1) * rows_here)
    batches = []
    while len(batches) < num_batches:
        rows = [row for _ in range(batch_rows) if (row := lane.next_row()) is not None]
        if not rows:
            break
        missing = batch_rows - len(rows)
        batch = make_batch(corpus, rows + rows[-1:] * missing)
        batch["targets"][len(rows) :] = -1
        batches.append({name: v[ours] if name != "epoch" else v for name, v in batch.items()})
    if not batches:
        raise UserError(
            f"got {corpus.num_documents} documents in {', '.join(map(str, corpus.paths))}, "
            f"expected enough for a row of {seq_len + 1} tokens; use more text or shorter rows"
        )
    return batches
