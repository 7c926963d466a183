"""Conversations to rows: nothing lost, nothing twice, whatever the packing, split or restart."""

import json
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.data import conversations as conv
from nanochat_jax.data.conversations import TRAINED, ChatBatches, Rendered, row_ranges
from nanochat_jax.tasks.registry import Mixture
from nanochat_jax.tokenizer.chat import IGNORE, render_conversation

SEQ_LEN = 12
lengths = st.lists(st.integers(0, SEQ_LEN + 1), min_size=1, max_size=40).filter(any)


def rendered(lengths: list[int], trained=lambda token: token % 3 != 0) -> Rendered:
    """Token t of all has the id t, so that a batch shows where each came from."""
    tokens = np.arange(sum(lengths), dtype=np.int32)
    tokens += TRAINED * np.array([trained(t) for t in tokens], np.int32)
    names = np.array([f"c{i}".encode() for i in range(len(lengths))])
    return Rendered(tokens, np.concatenate([[0], np.cumsum(lengths)]), names, {})


def chat_batches(data: Rendered, packing: str, **overrides) -> ChatBatches:
    keys = {"pad_id": 10**6, "seq_len": SEQ_LEN, "packing": packing, "batch_rows": 4}
    return ChatBatches(data, **keys | overrides)


def naive_best_fit(lengths: list[int], row_tokens: int, buffer: int) -> list[list[int]]:
    incoming, waiting, rows, room = list(range(len(lengths))), [], [[]], row_tokens
    while incoming or waiting:
        while incoming and len(waiting) < buffer:
            waiting.append(incoming.pop(0))  # in order of arrival: max takes the oldest of equals
        if fits := [c for c in waiting if lengths[c] <= room]:
            best = max(fits, key=lambda c: lengths[c])
            waiting.remove(best)
            rows[-1].append(best)
            room -= lengths[best]
        else:
            rows, room = [*rows, []], row_tokens
    return rows


def expected_rows(lengths: list[int], packing: str, buffer: int) -> list[list[int]]:
    """The ids of each row, the slow way."""
    ends = np.cumsum(lengths).tolist()
    ids = [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    whole = [c for c in ids if c]
    if packing == "stream":
        flat = sum(ids, [])
        return [flat[i : i + SEQ_LEN + 1] for i in range(0, max(len(flat) - 1, 1), SEQ_LEN)]
    if packing == "rows":
        return whole
    groups = naive_best_fit([len(c) for c in whole], SEQ_LEN + 1, buffer)
    return [sum((whole[c] for c in group), []) for group in groups]


@pytest.mark.parametrize("buffer", [3, conv.BUFFER])
@given(lengths=lengths)
def test_best_fit_is_the_naive_one(lengths, buffer):
    tokens = rendered(lengths).tokens & (TRAINED - 1)
    ranges, first = row_ranges(rendered(lengths).offsets, SEQ_LEN + 1, "best_fit", buffer)
    rows = [ranges[start:stop] for start, stop in pairwise(first)]
    ids = [[int(t) for start, stop in row for t in tokens[start:stop]] for row in rows]
    assert ids == expected_rows(lengths, "best_fit", buffer)


@pytest.mark.parametrize("packing", conv.PACKINGS)
@given(lengths=lengths, batch_rows=st.sampled_from([1, 4]))
def test_batches_are_the_naive_rows(packing, lengths, batch_rows):
    expected = expected_rows(lengths, packing, conv.BUFFER)
    batches = chat_batches(rendered(lengths), packing, batch_rows=batch_rows)
    pairs = (pair for b in batches for pair in zip(b["inputs"], b["targets"], strict=True))
    rows = [list(zip(*pair, strict=True)) for pair in pairs]
    assert len(rows) == len(batches) * batch_rows == -(-len(expected) // batch_rows) * batch_rows
    for row, ids in zip(rows, expected, strict=False):
        pairs = [(a, b if b % 3 else IGNORE) for a, b in pairwise(ids)]
        assert row == pairs + [(10**6, IGNORE)] * (len(row) - len(pairs))
    assert all(set(row) == {(10**6, IGNORE)} for row in rows[len(expected) :])


@pytest.mark.parametrize("packing", conv.PACKINGS)
def test_doc_ids_name_the_conversations_of_a_row(packing):
    sizes = [5, 0, 8, 3, 13, 2, 0, 9]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    named = [ids for b in chat_batches(rendered(sizes), packing) for ids in b["doc_ids"]]
    for row, names in zip(expected_rows(sizes, packing, conv.BUFFER), named, strict=False):
        assert names == [f"c{c}" for c, _ in groupby(owner[row])]


@pytest.mark.parametrize("packing", conv.PACKINGS)
def test_processes_share_a_batch(packing):
    data = rendered(list(range(14)) * 3)
    whole = list(chat_batches(data, packing, batch_rows=4))
    parts = [list(chat_batches(data, packing, process_index=p, process_count=2)) for p in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in ("inputs", "targets"):
            joined = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(batch[name], joined)
        assert batch["doc_ids"] == shares[0]["doc_ids"] + shares[1]["doc_ids"]


def test_width_follows_the_longest_row_of_a_batch_of_all_processes():
    sizes = [2, 9, 64, 3, 65, 66, 3, 3, 200, 2, 201, 2, 3]
    batches = chat_batches(rendered(sizes), "rows", seq_len=200, batch_rows=2)
    widths = [batch["inputs"].shape[1] for batch in batches]
    assert widths == [64, 64, 128, 64, 200, 200, 64]
    keys = {"seq_len": 200, "batch_rows": 2, "process_index": 1, "process_count": 2}
    other = chat_batches(rendered(sizes), "rows", **keys)
    assert [batch["inputs"].shape[1] for batch in other] == widths


@pytest.mark.parametrize("packing", conv.PACKINGS)
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_saved_place_is_found_again(packing, done):
    data = rendered(list(range(1, 14)) * 4)
    straight, first = chat_batches(data, packing), chat_batches(data, packing, prefetch=4)
    for _ in range(done):
        next(first)
        next(straight)
    state = json.loads(json.dumps(first.get_state()))
    again = chat_batches(data, packing)
    again.set_state(state)
    rest, expected = list(again), list(straight)
    assert len(rest) == len(expected) > 0
    for ours, theirs in zip(rest, expected, strict=True):
        np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])
        np.testing.assert_array_equal(ours["targets"], theirs["targets"])
    with pytest.raises(UserError, match="run.name"):
        chat_batches(rendered([3] * 40), packing).set_state(state)
    with pytest.raises(UserError, match="packing"):
        chat_batches(data, "tight")


# Rendering


SPECS = ("arithmetic train[:40]", "spelling_bee train[:10]")


def render(tokenizer, specs=SPECS, **overrides) -> Rendered:
    keys = {"max_tokens": 10**6, "train_on": "assistant"}
    return conv.render(Mixture(specs), tokenizer, **keys | overrides)


def same(a: Rendered, b: Rendered) -> bool:
    return all(map(np.array_equal, a[:3], b[:3])) and a.counts == b.counts


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_rendered_tokens_are_those_of_each_conversation(tiny_tokenizer, train_on):
    data, mixed = render(tiny_tokenizer, train_on=train_on), Mixture(SPECS)
    for c, conversation in enumerate(mixed):
        tokens = data.tokens[data.offsets[c] : data.offsets[c + 1]]
        ids, mask = render_conversation(tiny_tokenizer, conversation)
        assert (tokens & (TRAINED - 1)).tolist() == ids
        assert (tokens >= TRAINED).tolist() == [train_on == "all" or bool(m) for m in mask]
        assert data.names[c].decode() == mixed.name(c)
    assert data.counts["tokens"] == len(data.tokens) == data.offsets[-1]
    assert data.counts["trained_tokens"] == int((data.tokens >= TRAINED).sum())


def test_conversations_too_long_are_cut_or_dropped_and_counted(tiny_tokenizer):
    whole = render(tiny_tokenizer)
    limit = int(np.median(np.diff(whole.offsets)))
    data = render(tiny_tokenizer, max_tokens=limit)
    sizes = np.diff(data.offsets)
    assert 0 < sizes.max() <= limit
    assert data.counts["cut_at_a_turn"] == (sizes < np.diff(whole.offsets)).sum() > 0
    assert data.counts["dropped"] == (sizes == 0).sum()


@pytest.mark.parametrize("wrong", [dict(max_tokens=3), dict(train_on="user"), dict(specs=())])
def test_a_mixture_of_which_nothing_can_be_trained_is_refused(tiny_tokenizer, wrong):
    with pytest.raises(UserError):
        render(tiny_tokenizer, **wrong)


@pytest.mark.slow
def test_workers_change_nothing(tiny_tokenizer):
    specs = ("arithmetic train[:1500]", "identity train", "spelling_bee train[:700]")
    alone = render(tiny_tokenizer, specs, max_tokens=200)
    shared = render(tiny_tokenizer, specs, max_tokens=200, workers=2, worker_conversations=1)
    assert same(shared, alone)


# Kept on disk


def not_again() -> Rendered:
    raise AssertionError("rendered although it was there")


@pytest.mark.parametrize("damage", [None, b"", slice(-5), b"other bits"])
@pytest.mark.parametrize("field", ["tokens", "offsets", "names"])
def test_kept_until_damaged_or_of_another_recipe(tmp_path, field, damage):
    data, other = rendered([3, 4]), rendered([5, 2, 2])
    conv.load_or_render(tmp_path, {"mixture": ("a", "b")}, lambda: data)
    path = tmp_path / f"{field}.npy"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[damage] if isinstance(damage, slice) else damage)
    for make in (lambda: data, not_again):
        assert same(conv.load_or_render(tmp_path, {"mixture": ("a", "b")}, make), data)
    for make in (lambda: other, not_again):
        assert same(conv.load_or_render(tmp_path, {"mixture": ["b"]}, make), other)


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_cache_half_written_is_never_used(tmp_path, monkeypatch, saves):
    """Killed while a changed mixture replaces the one before: neither of them is believed."""
    old, new = rendered([3, 4]), rendered([5, 2, 2])
    conv.load_or_render(tmp_path, {"mixture": 1}, lambda: old)
    save, calls = np.save, []

    def killed(path, array):
        calls.append(path)
        if len(calls) > saves:
            raise KeyboardInterrupt
        save(path, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        conv.load_or_render(tmp_path, {"mixture": 2}, lambda: new)
    for number, data in ((1, old), (2, new)):
        assert same(conv.load_or_render(tmp_path, {"mixture": number}, lambda d=data: d), data)
