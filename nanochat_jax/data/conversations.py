"""From conversations to batches for mid-training and SFT: everything planned, then looked up.

    mixture --render, once--> one flat array of tokens --plan--> rows --Grain--> batches

Rendering writes every conversation's tokens one after another, each with a bit that says whether it
is trained; conversations longer than a row are cut at a turn. Kept in a file beside the stage's
checkpoints, so that a restart need not repeat it.

A row is a list of ranges of that array, so the plan is a function of the lengths alone:
  stream     rows cut from one endless flow, each token a target once (classic mid-training)
  best_fit   whole conversations: of `buffer` waiting ones the longest that fits, then padding
             (modern SFT)
  rows       one conversation a row (classic SFT); a batch is as wide as its longest row needs

Because batch number n is a pure function of n, the position in the data is one number, and an exact
resume costs nothing.
"""

import hashlib
import json
import multiprocessing
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from nanochat_jax.common import UserError, log, read_json, sha256_file, write_json
from nanochat_jax.tokenizer import chat
from nanochat_jax.tokenizer.bpe import Tokenizer

ARRAYS = ("tokens", "offsets", "names")
TRAINED = 1 << 30  # added to the id of a token that is a target
PACKINGS = ("stream", "best_fit", "rows")
BUFFER = 100  # conversations that best_fit chooses from
MIN_WIDTH = 64  # batches of `rows` are this wide, or a power of two times it
_CHUNK = 1_000  # conversations a worker renders at a time
_PARALLEL_FROM = 20_000  # conversations for which starting workers pays


class Rendered(NamedTuple):
    """What a mixture became: conversation c is tokens[offsets[c]:offsets[c + 1]]."""

    tokens: np.ndarray  # int32, ids with TRAINED added
    offsets: np.ndarray  # int64 [conversations + 1]
    names: np.ndarray  # bytes [conversations], for messages
    counts: dict[str, int]  # conversations, cut, dropped, tokens, trained_tokens


def render(
    conversations: Sequence[Any],
    name: Callable[[int], str],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    train_on: str,
    workers: int = 1,
) -> Rendered:
    """Tokens of all conversations, each at most max_tokens long; name(c) is what to call one.

    train_on: "all" tokens, or what the "assistant" says. Conversations of which nothing could be
    trained are dropped.
    """
    if train_on not in ("all", "assistant"):
        raise UserError(f"train_on got {train_on!r}, expected all or assistant")
    job = _Job(conversations, tokenizer, max_tokens, train_on == "all")
    starts = range(0, len(conversations), _CHUNK)
    if workers > 1 and len(conversations) >= _PARALLEL_FROM:
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        with ProcessPoolExecutor(workers, context, _set_job, (job,)) as pool:
            parts = list(pool.map(_render_chunk_of_job, starts))
    else:
        parts = [_render_chunk(job, start) for start in starts]
    if not parts:
        raise UserError("got a mixture without conversations, expected at least one")
    tokens = np.concatenate([part[0] for part in parts])
    lengths = np.concatenate([part[1] for part in parts])
    counts = {
        "conversations": len(conversations),
        "cut_at_a_turn": sum(part[2] for part in parts),
        "dropped": int((lengths == 0).sum()),
        "tokens": len(tokens),
        "trained_tokens": int((tokens >= TRAINED).sum()),
    }
    if not len(tokens):
        raise UserError(
            f"got {len(conversations):,} conversations with nothing to train on in their first "
            f"{max_tokens:,} tokens; raise --config.model.seq_len or choose other tasks"
        )
    names = np.array([name(c).encode() for c in range(len(conversations))])
    return Rendered(tokens, np.concatenate([[0], np.cumsum(lengths)]), names, counts)


class _Job(NamedTuple):
    conversations: Sequence[Any]
    tokenizer: Tokenizer
    max_tokens: int
    train_all: bool


_job: _Job  # of a worker process


def _set_job(job: _Job) -> None:
    global _job
    _job = job


def _render_chunk_of_job(start: int):
    return _render_chunk(_job, start)


def _render_chunk(job: _Job, start: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, length of each conversation, how many were cut)"""
    end = job.tokenizer.special_id("<|assistant_end|>")
    tokens, lengths, num_cut = [], [], 0
    for index in range(start, min(start + _CHUNK, len(job.conversations))):
        whole, mask = chat.render_whole(job.tokenizer, job.conversations[index])
        ids, mask = chat.cut_at_turn(whole, mask, job.max_tokens, end)
        num_cut += len(ids) < len(whole)
        trained = np.ones(len(ids), np.int32) if job.train_all else np.asarray(mask, np.int32)
        tokens.append(np.asarray(ids, np.int32) + trained * TRAINED)
        lengths.append(len(ids))
    return np.concatenate(tokens), np.asarray(lengths, np.int64), num_cut


def load_or_render(folder: Path, fingerprint: dict[str, Any], make) -> Rendered:
    """`make()`, a Rendered, kept in `folder` for the next start with the same fingerprint.

    Files that are missing or differ from their checksums are made again.
    """
    meta, files = folder / "conversations.json", [folder / f"{field}.npy" for field in ARRAYS]
    fingerprint = json.loads(json.dumps(fingerprint))
    if meta.exists():
        saved = read_json(meta, f"delete {folder}")
        if saved["fingerprint"] == fingerprint:
            sums = {file.name: sha256_file(file) for file in files if file.is_file()}
            if saved.get("sha256") == sums:
                tokens, offsets, names = (np.load(file, mmap_mode="r") for file in files)
                return Rendered(tokens, offsets, names, saved["counts"])
            log(f"{folder} is damaged: rendering again")
        meta.unlink()
    rendered = make()
    folder.mkdir(parents=True, exist_ok=True)
    for field, file in zip(ARRAYS, files, strict=True):
        np.save(file, getattr(rendered, field))
    sums = {file.name: sha256_file(file) for file in files}
    # Last: then all is there.
    write_json(meta, {"fingerprint": fingerprint, "counts": rendered.counts, "sha256": sums})
    return rendered


class Rows(NamedTuple):
    """Row r is the ranges[first[r]:first[r + 1]] of the flat tokens, one after another."""

    ranges: np.ndarray  # int64 [N, 2]
    first: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, row: int) -> np.ndarray:
        return self.ranges[self.first[row] : self.first[row + 1]]

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        sizes = np.concatenate([[0], np.cumsum(self.ranges[:, 1] - self.ranges[:, 0])])
        return np.diff(sizes[self.first])


def plan_rows(offsets: np.ndarray, row_tokens: int, packing: str) -> Rows:
    """Which tokens make up which row of at most `row_tokens` (seq_len + 1)."""
    if packing not in PACKINGS:
        raise UserError(f"packing got {packing!r}, expected one of {', '.join(PACKINGS)}")
    if packing == "stream":  # the last token of a row is the next one's first input
        total = int(offsets[-1])
        starts = np.arange(0, max(total - 1, 1), row_tokens - 1)
        ranges = np.stack([starts, np.minimum(starts + row_tokens, total)], axis=1)
        return Rows(ranges, np.arange(len(ranges) + 1))
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    spans = spans[spans[:, 1] > spans[:, 0]]
    groups = [[i] for i in range(len(spans))]
    if packing == "best_fit":
        groups = list(_best_fit((spans[:, 1] - spans[:, 0]).tolist(), row_tokens))
    order = np.array([i for group in groups for i in group], np.int64)
    first = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    return Rows(spans[order], first.astype(np.int64))


def _best_fit(lengths: list[int], row_tokens: int) -> Iterator[list[int]]:
    """Groups of documents, each a row; no document is split, none is longer than a row."""
    waiting: list[tuple[int, int]] = []  # sorted (length, -index): of equals the oldest is last
    incoming = iter(enumerate(lengths))
    while True:
        group, room = [], row_tokens
        while True:
            while len(waiting) < BUFFER and (item := next(incoming, None)) is not None:
                insort(waiting, (item[1], -item[0]))
            fitting = bisect_right(waiting, (room, 1))
            if not fitting:
                break
            length, index = waiting.pop(fitting - 1)
            group.append(-index)
            room -= length
        if not group:
            return
        yield group


class ChatBatches:
    """Batches of a Rendered by number, and an iterator over them whose place can be saved.

    A batch has inputs and targets int32 [R, T] (this process's rows), doc_ids and epoch. The last
    one is filled up with rows that train nothing.
    """

    def __init__(
        self,
        rendered: Rendered,
        *,
        pad_id: int,
        seq_len: int,
        packing: str,
        batch_rows: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        self.rendered, self.pad_id, self.seq_len = rendered, pad_id, seq_len
        self.batch_rows = batch_rows
        self.rows = plan_rows(rendered.offsets, seq_len + 1, packing)
        self._lengths = self.rows.lengths() if packing == "rows" else None
        per_process = batch_rows // process_count
        self._ours = range(process_index * per_process, (process_index + 1) * per_process)
        dataset = grain.MapDataset.source(self)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch))
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._digest = hashlib.sha256(np.ascontiguousarray(rendered.tokens).data).hexdigest()[:16]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        width = self.width(index)
        inputs = np.full((len(self._ours), width), self.pad_id, np.int32)
        targets = np.full((len(self._ours), width), chat.IGNORE, np.int32)
        doc_ids: list[list[str]] = []
        for out, row in enumerate(self._ours):
            row += index * self.batch_rows
            ranges = self.rows.of(row) if row < len(self.rows) else ()
            parts = [self.rendered.tokens[start:stop] for start, stop in ranges]
            doc_ids.append([name for span in ranges for name in self._conversations(*span)])
            if parts:
                tokens = np.concatenate(parts)
                ids, last = tokens & (TRAINED - 1), len(tokens) - 1
                inputs[out, :last] = ids[:-1]
                targets[out, :last] = np.where(tokens[1:] >= TRAINED, ids[1:], chat.IGNORE)
        return {"inputs": inputs, "targets": targets, "doc_ids": doc_ids, "epoch": 0}

    def width(self, number: int) -> int:
        """Time steps of a batch: the same on all processes."""
        if self._lengths is None:
            return self.seq_len
        first = number * self.batch_rows
        return bucket(self._lengths[first : first + self.batch_rows].max() - 1, self.seq_len)

    def _conversations(self, start: int, stop: int) -> list[str]:
        """Names of those that tokens start..stop belong to."""
        offsets, names = self.rendered.offsets, self.rendered.names
        first, last = np.searchsorted(offsets, [start, stop - 1], side="right") - 1
        return [names[c].decode() for c in range(first, last + 1) if offsets[c] < offsets[c + 1]]

    def __iter__(self) -> "ChatBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"tokens": self._digest, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["tokens"] != self._digest:
            raise UserError(
                f"the conversations' tokens have the digest {self._digest}, the checkpoint was "
                f"made with {state['tokens']}; use the same task data, or another --config.run.name"
            )
        self._iterator.set_state(state["position"])

    def start_prefetch(self) -> None:
        """Rendered batches are made in no time."""

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Nothing is held open."""


def bucket(length: int, longest: int) -> int:
    """The width that holds `length`: MIN_WIDTH times a power of two, at most `longest`."""
    width = MIN_WIDTH
    while width < length:
        width *= 2
    return min(width, longest)
