"""Conversations to rows: nothing lost, nothing twice, whatever the packing, split or restart."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.common import UserError
from nanochat_jax.data import conversations as conv
from nanochat_jax.data.conversations import TRAINED, ChatBatches, Rendered, row_ranges
from nanochat_jax.tasks.registry import mixture
from nanochat_jax.tokenizer.chat import IGNORE, render_whole

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
    while True:
        while incoming and len(waiting) < buffer:
            waiting.append(incoming.pop(0))  # in order of arrival: max takes the oldest of equals
        fits = [c for c in waiting if lengths[c] <= room]
        if fits:
            best = max(fits, key=lambda c: lengths[c])
            waiting.remove(best)
            rows[-1].append(best)
            room -= lengths[best]
        elif not waiting:
            return rows[:-1] if not rows[-1] else rows
        else:
            rows, room = [*rows, []], row_tokens


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


@pytest.mark.parametrize("packing", conv.PACKINGS)
@given(lengths=lengths, buffer=st.sampled_from([3, conv.BUFFER]))
def test_rows_are_the_naive_ones(packing, lengths, buffer):
    tokens = rendered(lengths).tokens & (TRAINED - 1)
    ranges, first = row_ranges(rendered(lengths).offsets, SEQ_LEN + 1, packing, buffer)
    rows = [ranges[start:stop] for start, stop in pairwise(first)]
    ids = [[int(t) for start, stop in row for t in tokens[start:stop]] for row in rows]
    assert ids == expected_rows(lengths, packing, buffer)


@pytest.mark.parametrize("packing", conv.PACKINGS)
@given(lengths=lengths, batch_rows=st.sampled_from([1, 4]))
def test_batches_are_the_naive_rows(packing, lengths, batch_rows):
    expected = expected_rows(lengths, packing, conv.BUFFER)
    batches = chat_batches(rendered(lengths), packing, batch_rows=batch_rows)
    rows = [
        list(zip(*pair, strict=True))
        for b in batches
        for pair in zip(b["inputs"], b["targets"], strict=True)
    ]
    assert len(rows) == len(batches) * batch_rows == -(-len(expected) // batch_rows) * batch_rows
    for row, ids in zip(rows, expected, strict=False):
        pairs = [(a, b if b % 3 else IGNORE) for a, b in pairwise(ids)]
        assert row == pairs + [(10**6, IGNORE)] * (len(row) - len(pairs))
    assert all(set(row) == {(10**6, IGNORE)} for row in rows[len(expected) :])


@pytest.mark.parametrize("packing", conv.PACKINGS)
def test_doc_ids_name_the_conversations_of_a_row(packing):
    sizes = [5, 0, 8, 3, 13, 2, 0, 9]
    data = rendered(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for batch in chat_batches(data, packing):
        for ids, names in zip(batch["inputs"], batch["doc_ids"], strict=True):
            seen = owner[ids[ids < 10**6]]  # the last token of a row is a target only
            assert set(names) >= {f"c{c}" for c in seen} and len(names) == len(set(names))
            last = ids[ids < 10**6].max(initial=-1) + 1
            assert set(names) <= {f"c{c}" for c in {*seen, *owner[last : last + 1]}}


@pytest.mark.parametrize("packing", conv.PACKINGS)
def test_processes_share_a_batch(packing):
    data = rendered(list(range(14)) * 3)
    whole = list(chat_batches(data, packing, batch_rows=4))
    parts = [list(chat_batches(data, packing, process_index=p, process_count=2)) for p in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(
                batch[name], np.concatenate([share[name] for share in shares])
            )
        assert batch["doc_ids"] == shares[0]["doc_ids"] + shares[1]["doc_ids"]


def test_width_follows_the_longest_row_of_a_batch_of_all_processes():
    sizes = [2, 9, 64, 3, 65, 66, 3, 3, 200, 2, 201, 2, 3]
    batches = chat_batches(rendered(sizes), "rows", seq_len=200, batch_rows=2)
    widths = [batch["inputs"].shape[1] for batch in batches]
    assert widths == [64, 64, 128, 64, 200, 200, 64]
    assert widths == [batches.width(number) for number in range(len(batches))]
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


def test_an_unknown_packing_is_refused():
    with pytest.raises(UserError, match="packing"):
        row_ranges(np.array([0, 3]), 8, "tight")


# Rendering


SPECS = ("arithmetic train[:40]", "spelling_bee train[:10]")


def render(tokenizer, specs=SPECS, **overrides) -> Rendered:
    mixed = mixture(specs)
    keys = {"max_tokens": 10**6, "train_on": "assistant"}
    return conv.render(mixed, mixed.name, tokenizer, **keys | overrides)


def same(a: Rendered, b: Rendered) -> bool:
    return all(map(np.array_equal, a[:3], b[:3])) and a.counts == b.counts


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_rendered_tokens_are_those_of_each_conversation(tiny_tokenizer, train_on):
    data, mixed = render(tiny_tokenizer, train_on=train_on), mixture(SPECS)
    for c, conversation in enumerate(mixed):
        tokens = data.tokens[data.offsets[c] : data.offsets[c + 1]]
        ids, mask = render_whole(tiny_tokenizer, conversation)
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


# The cache


def test_what_was_rendered_is_used_again_until_its_recipe_changes(tmp_path, tiny_tokenizer):
    made = []

    def make(**keys):
        made.append(render(tiny_tokenizer, **keys))
        return made[-1]

    first = conv.load_or_render(tmp_path, {"mixture": ("a", "b")}, make)
    again = conv.load_or_render(tmp_path, {"mixture": ("a", "b")}, make)
    assert len(made) == 1 and same(again, first)
    changed = conv.load_or_render(tmp_path, {"mixture": ["b"]}, lambda: make(train_on="all"))
    assert len(made) == 2 and not same(changed, first)
    assert same(conv.load_or_render(tmp_path, {"mixture": ["b"]}, make), changed)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [None, b"", slice(-5), b"other bits"])
@pytest.mark.parametrize("field", ["tokens", "offsets", "names"])
def test_a_damaged_cache_is_rendered_again(tmp_path, field, damage):
    data = rendered([3, 4])
    conv.load_or_render(tmp_path, {}, lambda: data)
    path = tmp_path / f"{field}.npy"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[damage] if isinstance(damage, slice) else damage)
    assert same(conv.load_or_render(tmp_path, {}, lambda: data), data)
    assert same(conv.load_or_render(tmp_path, {}, lambda: pytest.fail("whole again")), data)


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

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            conv.load_or_render(tmp_path, {"mixture": 2}, lambda: new)
    for number, data in ((1, old), (2, new)):
        assert same(conv.load_or_render(tmp_path, {"mixture": number}, lambda d=data: d), data)
