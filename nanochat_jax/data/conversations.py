"""From conversations to batches for mid-training and SFT.

    mixture --render, once--> one flat array of tokens --row_ranges--> rows --Grain--> batches

The array, kept beside the stage's checkpoints, has a bit at each token that is trained. A row is a
list of ranges of it:
  stream     rows cut from one endless flow, each token a target once (classic mid-training)
  best_fit   whole conversations: of `BUFFER` waiting ones the longest that fits, then padding
             (modern SFT)
  rows       one conversation a row (classic SFT); a batch is as wide as its longest row needs
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from nanochat_jax.common import UserError, log, read_json, sha256_file, write_json
from nanochat_jax.data.packing import Waiting
from nanochat_jax.tokenizer import chat
from nanochat_jax.tokenizer.bpe import Tokenizer

TRAINED = 1 << 30  # added to the id of a token that is a target
PACKINGS = ("stream", "best_fit", "rows")
BUFFER = 100  # conversations that best_fit chooses from
MIN_WIDTH = 64  # batches of `rows` are this wide, or a power of two times it


class Rendered(NamedTuple):
    """What a mixture became: conversation c is tokens[offsets[c]:offsets[c + 1]]."""

    tokens: np.ndarray  # int32, ids with TRAINED added
    offsets: np.ndarray  # int64 [conversations + 1]
    names: np.ndarray  # bytes [conversations], for messages
    counts: dict[str, int]  # conversations, cut, dropped, tokens, trained_tokens


def render(
    mixture: Any,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    train_on: str,
    workers: int = 1,
    worker_conversations: int = 10_000,
) -> Rendered:
    """Tokens of all conversations of a tasks.registry.Mixture, each cut at a turn to max_tokens.

    train_on: "all" tokens, or what the "assistant" says. Conversations of which nothing could be
    trained are dropped. `workers` processes share them, if each gets `worker_conversations`.
    """
    if train_on not in ("all", "assistant"):
        raise UserError(f"train_on got {train_on!r}, expected all or assistant")
    count = len(mixture)
    if not count:
        raise UserError("got a mixture without conversations, expected at least one")
    job = partial(_render_some, mixture, tokenizer, max_tokens, train_on == "all")
    workers = min(workers, count // worker_conversations)
    if workers > 1:
        shares = [range(count * i // workers, count * (i + 1) // workers) for i in range(workers)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # a fork has JAX's threads
            parts = pool.map(job, shares, chunksize=1)
    else:
        parts = [job(range(count))]
    tokens, lengths, num_cut = zip(*parts, strict=True)
    tokens, lengths = np.concatenate(tokens), np.concatenate(lengths)
    if not len(tokens):
        raise UserError(
            f"got {count:,} conversations with nothing to train on in their first "
            f"{max_tokens:,} tokens; raise --config.model.seq_len or choose other tasks"
        )
    counts = {
        "conversations": count,
        "cut_at_a_turn": sum(num_cut),
        "dropped": int((lengths == 0).sum()),
        "tokens": len(tokens),
        "trained_tokens": int((tokens >= TRAINED).sum()),
    }
    names = np.array([mixture.name(c).encode() for c in range(count)])
    return Rendered(tokens, np.concatenate([[0], np.cumsum(lengths)]), names, counts)


def _render_some(
    mixture: Any, tokenizer: Tokenizer, max_tokens: int, train_all: bool, ours: range
) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, length of each conversation, how many were cut) of the conversations `ours`."""
    end = tokenizer.special_id("<|assistant_end|>")
    tokens, lengths, num_cut = [], [], 0
    for index in ours:
        whole, mask = chat.render_conversation(tokenizer, mixture[index])
        ids, mask = chat.cut_at_turn(whole, mask, max_tokens, end)
        num_cut += len(ids) < len(whole)
        trained = np.ones(len(ids), np.int32) if train_all else np.asarray(mask, np.int32)
        tokens.append(np.asarray(ids, np.int32) + trained * TRAINED)
        lengths.append(len(ids))
    return np.concatenate(tokens), np.asarray(lengths, np.int64), num_cut


def load_or_render(folder: Path, fingerprint: dict, make: Callable[[], Rendered]) -> Rendered:
    """`make()`, kept in `folder` for the next start with the same fingerprint, if still whole."""
    meta = folder / "conversations.json"
    files = {field: folder / f"{field}.npy" for field in ("tokens", "offsets", "names")}
    fingerprint = json.loads(json.dumps(fingerprint))

    def sums() -> dict[str, str]:
        return {file.name: sha256_file(file) for file in files.values() if file.is_file()}

    if meta.exists():
        saved = read_json(meta, f"delete {folder}")
        if saved["fingerprint"] == fingerprint:
            if saved.get("sha256") == sums():
                arrays = (np.load(file, mmap_mode="r") for file in files.values())
                return Rendered(*arrays, counts=saved["counts"])
            log(f"{folder} is damaged: rendering again")
        meta.unlink()
    rendered = make()
    folder.mkdir(parents=True, exist_ok=True)
    for field, file in files.items():
        np.save(file, getattr(rendered, field))
    # Last: then all is there.
    write_json(meta, {"fingerprint": fingerprint, "counts": rendered.counts, "sha256": sums()})
    return rendered


def row_ranges(
    offsets: np.ndarray, row_tokens: int, packing: str, buffer: int = BUFFER
) -> tuple[np.ndarray, np.ndarray]:
    """(ranges [N, 2], first [rows + 1]): row r is the tokens of ranges[first[r]:first[r + 1]]."""
    if packing not in PACKINGS:
        raise UserError(f"packing got {packing!r}, expected one of {', '.join(PACKINGS)}")
    if packing == "stream":  # the last token of a row is the next one's first input
        total = int(offsets[-1])
        starts = np.arange(0, max(total - 1, 1), row_tokens - 1)
        ranges = np.stack([starts, np.minimum(starts + row_tokens, total)], axis=1)
        return ranges, np.arange(len(ranges) + 1)
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    spans = spans[spans[:, 1] > spans[:, 0]]
    if packing == "rows":
        return spans, np.arange(len(spans) + 1)
    groups = list(_best_fit((spans[:, 1] - spans[:, 0]).tolist(), row_tokens, buffer))
    first = np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)])
    return spans[[i for group in groups for i in group]], first


def _best_fit(lengths: list[int], row_tokens: int, buffer: int) -> Iterator[list[int]]:
    """The conversations of each row, by number."""
    waiting, incoming = Waiting(), iter(enumerate(lengths))
    group, room = [], row_tokens
    while True:
        for number, length in islice(incoming, buffer - len(waiting)):
            waiting.add(length, number)
        index = waiting.take_longest(room)
        if index is not None:
            group.append(index)
            room -= lengths[index]
        elif group:
            yield group
            group, room = [], row_tokens
        else:
            return


class ChatBatches(Iterator[dict[str, Any]]):
    """Batches of a Rendered by number, like those of pipeline.py, and an iterator over them.

    The last one is filled up with rows that train nothing.
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
        self._rendered, self._pad_id, self._seq_len = rendered, pad_id, seq_len
        self._batch_rows, self._packing = batch_rows, packing
        self._ranges, self._first = row_ranges(rendered.offsets, seq_len + 1, packing)
        per_process = batch_rows // process_count
        self._ours = range(process_index * per_process, (process_index + 1) * per_process)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch))
        self._iterator = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        self._digest = hashlib.sha256(np.ascontiguousarray(rendered.tokens).data).hexdigest()[:16]

    def __len__(self) -> int:
        return -(-(len(self._first) - 1) // self._batch_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, ranges, first = self._rendered.tokens, self._ranges, self._first
        shape = (len(self._ours), self.width(index))
        inputs = np.full(shape, self._pad_id, np.int32)
        targets = np.full(shape, chat.IGNORE, np.int32)
        doc_ids: list[list[str]] = []
        for out, row in enumerate(self._ours):
            row += index * self._batch_rows
            spans = ranges[first[row] : first[row + 1]] if row + 1 < len(first) else ranges[:0]
            doc_ids.append([name for span in spans for name in self._conversations(*span)])
            if len(spans):
                of_row = np.concatenate([tokens[start:stop] for start, stop in spans])
                ids, last = of_row & (TRAINED - 1), len(of_row) - 1
                inputs[out, :last] = ids[:-1]
                targets[out, :last] = np.where(of_row[1:] >= TRAINED, ids[1:], chat.IGNORE)
        return {"inputs": inputs, "targets": targets, "doc_ids": doc_ids, "epoch": 0}

    def width(self, number: int) -> int:
        """Time steps of a batch, the same on all processes."""
        if self._packing != "rows":
            return self._seq_len
        ranges = self._ranges[number * self._batch_rows :][: self._batch_rows]  # one a row
        return bucket(np.diff(ranges).max() - 1, self._seq_len)

    def _conversations(self, start: int, stop: int) -> list[str]:
        """Names of those that tokens start..stop belong to."""
        offsets, names = self._rendered.offsets, self._rendered.names
        first, last = np.searchsorted(offsets, [start, stop - 1], side="right") - 1
        return [names[c].decode() for c in range(first, last + 1) if offsets[c] < offsets[c + 1]]

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
        self._iterator.start_prefetch()

    def counts(self) -> dict[str, int]:
        return {}  # Rendered has them

    def close(self) -> None:
        self._iterator.close()


def bucket(length: int, longest: int) -> int:
    """The width that holds `length`: MIN_WIDTH times a power of two, at most `longest`."""
    return min(MIN_WIDTH << ((int(length) - 1) // MIN_WIDTH).bit_length(), longest)
