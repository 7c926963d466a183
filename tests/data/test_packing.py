"""Both packings against scans of a few lines, on documents of every length."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.data.packing import BestFit, Document, Stream

BOS = 0


def documents(lengths):
    """Documents of given lengths; after BOS the tokens tell document and position."""
    return [
        Document((i, 0), np.array([BOS, *range(i * 100 + 1, i * 100 + length)], np.int32))
        for i, length in enumerate(lengths)
    ]


def puller(docs):
    remaining = iter(docs)
    return lambda: next(remaining, None)


def pack_all(packer, docs):
    pull = puller(docs)
    rows = []
    while (row := packer.next_row(pull)) is not None:
        rows.append(row)
    return rows


def naive_best_fit(docs, row_tokens, buffer_docs):
    """Rows, ids and dropped tokens by scanning the whole buffer for each choice."""
    remaining, buffer, rows = list(docs), [], []
    while True:
        row, ids, dropped = [], [], 0
        while len(row) < row_tokens:
            while remaining and len(buffer) < buffer_docs:
                buffer.append(remaining.pop(0))
            if not buffer:
                return rows
            space = row_tokens - len(row)
            fitting = [d for d in buffer if len(d.tokens) <= space]
            if fitting:
                longest = max(len(d.tokens) for d in fitting)
                chosen = next(d for d in fitting if len(d.tokens) == longest)
            else:
                shortest = min(len(d.tokens) for d in buffer)
                chosen = next(d for d in buffer if len(d.tokens) == shortest)
            buffer = [d for d in buffer if d.id != chosen.id]
            row += chosen.tokens[:space].tolist()
            dropped += max(0, len(chosen.tokens) - space)
            ids.append(chosen.id)
        rows.append((row, ids, dropped))


lengths_of = st.lists(st.integers(1, 40), max_size=60)


@given(lengths_of, st.integers(1, 32), st.integers(1, 12))
def test_best_fit_equals_a_scan_of_the_buffer(lengths, row_tokens, buffer_docs):
    docs = documents(lengths)
    rows = pack_all(BestFit(row_tokens, buffer_docs), docs)
    expected = naive_best_fit(docs, row_tokens, buffer_docs)
    assert [(row.tokens.tolist(), row.ids, row.cropped_tokens) for row in rows] == expected


@given(lengths_of, st.integers(2, 32))
def test_stream_is_the_documents_end_to_end(lengths, row_tokens):
    docs = documents(lengths)
    flat = np.concatenate([d.tokens for d in docs]) if docs else np.zeros(0, np.int32)
    rows = pack_all(Stream(row_tokens), docs)
    step = row_tokens - 1  # the last target is the next row's first input
    assert len(rows) == max(0, (len(flat) - 1) // step)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row.tokens, flat[i * step : i * step + row_tokens])
        assert row.cropped_tokens == 0


@given(lengths_of, st.integers(2, 32))
def test_stream_names_the_documents_of_a_row(lengths, row_tokens):
    docs = documents(lengths)
    owner = [doc.id for doc in docs for _ in doc.tokens]
    for i, row in enumerate(pack_all(Stream(row_tokens), docs)):
        of_row = owner[i * (row_tokens - 1) : i * (row_tokens - 1) + row_tokens]
        assert row.ids == [id for id, _ in itertools.groupby(of_row)]


@pytest.mark.parametrize("make", [lambda: BestFit(9, 4), lambda: Stream(9)])
@given(lengths=st.lists(st.integers(1, 20), min_size=20, max_size=40), stop=st.integers(0, 6))
def test_restored_packer_goes_on_as_if_never_stopped(make, lengths, stop):
    docs = documents(lengths)
    by_id = {doc.id: doc for doc in docs}
    packer, pull = make(), puller(docs)
    for _ in range(stop):
        packer.next_row(pull)
    ids, offset = packer.held()
    remaining = []
    while (document := pull()) is not None:
        remaining.append(document)
    other = make()
    other.restore([by_id[id] for id in ids], offset)
    rows, other_rows = pack_all(packer, remaining), pack_all(other, remaining)
    assert [r.tokens.tolist() for r in rows] == [r.tokens.tolist() for r in other_rows]
    assert [r.ids for r in rows] == [r.ids for r in other_rows]
