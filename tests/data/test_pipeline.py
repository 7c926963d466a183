"""Batches: the same ones after any interruption, for any number of processes."""

import json
from collections import Counter
from itertools import cycle, groupby, islice

import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.data.lanes import DataOrder
from nanochat_jax.data.packing import BestFit, Document
from nanochat_jax.data.pipeline import TrainBatches, eval_batches, merge_states
from nanochat_jax.data.sources import Corpus

SEQ_LEN = 48


@pytest.fixture
def make(corpus_paths, tiny_tokenizer):
    """TrainBatches over the corpus; closed at the end of the test."""
    made = []

    def make(paths=corpus_paths, packing="best_fit", buffer_docs=7, num_lanes=1, **settings):
        order = (Corpus(paths), tiny_tokenizer, SEQ_LEN, packing, buffer_docs, num_lanes)
        made.append(TrainBatches(DataOrder(*order), **{"batch_rows": 4, **settings}))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def take(batches, count):
    return list(islice(batches, count))


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one["inputs"], other["inputs"])
        np.testing.assert_array_equal(one["targets"], other["targets"])
        assert one["doc_ids"] == other["doc_ids"]


def joined(parts):
    """Batches of all processes, put together as the global batch is."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in ("inputs", "targets")}
        | {"doc_ids": [ids for part in step for ids in part["doc_ids"]]}
        for step in zip(*parts, strict=True)
    ]


def test_one_lane_is_the_packer_over_all_documents(make, corpus_paths, tiny_tokenizer):
    corpus = Corpus(corpus_paths)
    documents = iter(
        Document((group, row), np.array(tiny_tokenizer.encode(text, bos=True), np.int32))
        for group in range(len(corpus.row_groups))
        for row, text in enumerate(corpus.read(group))
    )
    packer, batches, cropped = BestFit(SEQ_LEN + 1, 7), make(), 0
    for batch in take(batches, 10):
        rows = [row for _ in range(4) if (row := packer.next_row(documents))]
        cropped += sum(row.cropped_tokens for row in rows)
        tokens = np.stack([row.tokens for row in rows])
        np.testing.assert_array_equal(batch["inputs"], tokens[:, :-1])
        np.testing.assert_array_equal(batch["targets"], tokens[:, 1:])
        assert batch["doc_ids"] == [[corpus.name(*id) for id in row.ids] for row in rows]
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert batches.counts()["cropped_tokens"] == cropped > 0


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
@pytest.mark.parametrize("num_lanes", [1, 2, 4])  # 24 row groups: 4 lanes share them by document
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(make, packing, num_lanes):
    settings = dict(packing=packing, num_lanes=num_lanes)
    straight = make(**settings)
    states, batches = [straight.get_state()], []
    for _ in range(40):  # into the second epoch
        batches.append(next(straight))
        states.append(json.loads(json.dumps(straight.get_state())))
    assert batches[-1]["epoch"] >= 1
    for stop in range(0, 39, 3):
        resumed = make(**settings)
        resumed.set_state(states[stop])
        assert resumed.get_state() == states[stop]
        assert_same(take(resumed, 2), batches[stop : stop + 2])
        assert resumed.get_state() == states[stop + 2]
        resumed.set_state(states[stop])  # also while it runs
        assert_same(take(resumed, 1), batches[stop : stop + 1])
        resumed.close()


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_batches_and_resume_do_not_depend_on_the_number_of_processes(make, packing):
    def processes(count):
        settings = dict(packing=packing, num_lanes=4, process_count=count)
        return [make(**settings, process_index=i) for i in range(count)]

    alone = take(make(packing=packing, num_lanes=4), 10)
    for before in (1, 2, 4):
        parts = processes(before)
        assert_same(joined([take(part, 5) for part in parts]), alone[:5])
        state = json.loads(json.dumps(merge_states([part.get_state() for part in parts])))
        for after in (1, 2, 4):
            parts = processes(after)
            for part in parts:
                part.set_state(state)
            assert_same(joined([take(part, 5) for part in parts]), alone[5:])


def documents_of_lane(corpus, lane, num_lanes):
    """Names in reading order: whole row groups when there are many, else every n-th document."""
    sizes = [group.num_documents for group in corpus.row_groups]
    named = [[corpus.name(g, row) for row in range(size)] for g, size in enumerate(sizes)]
    if len(named) >= 8 * num_lanes:
        return [name for group in named[lane::num_lanes] for name in group]
    return [name for group in named for name in group][lane::num_lanes]


@pytest.mark.parametrize("num_lanes", [1, 3, 4])
@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_every_document_once_an_epoch(make, corpus_paths, packing, num_lanes):
    corpus, everything = Corpus(corpus_paths), []
    for lane in range(num_lanes):
        own = documents_of_lane(corpus, lane, num_lanes)
        settings = dict(process_index=lane, process_count=num_lanes, num_lanes=num_lanes)
        batches = make(packing=packing, batch_rows=2 * num_lanes, **settings)
        seen, epochs = [], []
        while not epochs or epochs[-1] < 2:
            batch = next(batches)
            seen += [name for ids in batch["doc_ids"] for name in ids]
            epochs.append(batch["epoch"])
        num_read = batches.counts()["documents"]
        assert num_read // len(own) == 2  # epoch counts the passes that are complete
        read = list(islice(cycle(own), num_read))
        (state,) = batches.get_state()["lanes"].values()
        held = [corpus.name(*map(int, item.split(":"))) for item in state["buffer"].split()]
        if packing == "stream":  # in order; a document goes on in the next row
            assert [name for name, _ in groupby(seen)] == read
        else:
            assert Counter(seen + held) == Counter(read)
        everything += own
    assert sorted(everything) == sorted(documents_of_lane(corpus, 0, 1))


def test_empty_documents_are_counted(make, tmp_path, write_parquet):
    texts = ["a fine day", "", "   \n", "x " * 500, None]
    batches = make([write_parquet(tmp_path / "shard_00000.parquet", texts)], packing="stream")
    while next(batches)["epoch"] == 0:
        pass
    counts = batches.counts()
    assert counts["empty_documents"] >= 3 * (counts["documents"] // 5) > 0
    assert counts["cropped_tokens"] == 0


def test_corrupt_row_group_is_named_through_the_prefetching_thread(make, tmp_path, write_parquet):
    texts = [f"{i} text {'x' * 99}" for i in range(99)]
    path = write_parquet(tmp_path / "shard_00000.parquet", texts)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 600] = bytes(600)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be read.*delete it"):
        take(make([path]), 100)


WRONG = [
    (dict(num_lanes=3), "num_lanes = 3"),
    (dict(num_lanes=2, process_count=4), "num_lanes = 2"),
    (dict(packing="first_fit"), "packing = 'first_fit'"),
    (dict(num_lanes=0), "num_lanes = 0"),
    (dict(buffer_docs=0), "buffer_docs = 0"),
    (dict(paths=[]), "no data shards"),
]


@pytest.mark.parametrize("changes, key", WRONG)
def test_settings_that_cannot_be_met(make, changes, key):
    with pytest.raises(UserError, match=key):
        make(**changes)


def test_lane_without_text(make, tmp_path, write_parquet):
    path = write_parquet(tmp_path / "shard_00000.parquet", ["one", "two", ""])
    with pytest.raises(UserError, match="lane 2 of 4"):
        next(make([path], num_lanes=4))


def test_state_of_other_data_or_settings_is_refused(make, tmp_path, write_parquet):
    state = make().get_state()
    other = write_parquet(tmp_path / "shard_00000.parquet", ["a", "b"])
    half = make(num_lanes=2, process_index=1, process_count=2).get_state()
    for key, batches, saved in [
        ("packing", make(packing="stream"), state),
        ("num_lanes", make(num_lanes=2), state),
        ("shards", make([other]), state),
        ("lanes", make(num_lanes=2), half),
    ]:
        with pytest.raises(UserError, match=key):
            batches.set_state(saved)


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_eval_batches_begin_one_pass(make, corpus_paths, tiny_tokenizer, packing):
    order = DataOrder(Corpus(corpus_paths), tiny_tokenizer, SEQ_LEN, packing, buffer_docs=7)
    settings = dict(batch_rows=4, num_batches=6)
    batches = eval_batches(order, **settings)
    assert_same(batches, take(make(packing=packing), 6))
    assert_same(eval_batches(order, **settings), batches)
    parts = [eval_batches(order, **settings, process_index=i, process_count=2) for i in range(2)]
    assert_same(joined(parts), batches)


def test_eval_batches_stop_where_the_text_ends(corpus_paths, tiny_tokenizer):
    def all_batches(seq_len=SEQ_LEN, batch_rows=4):
        order = DataOrder(Corpus(corpus_paths[1:]), tiny_tokenizer, seq_len)
        return eval_batches(order, batch_rows=batch_rows, num_batches=10_000)

    batches = all_batches()
    pairs = ((b["doc_ids"][row], b["targets"][row]) for b in batches for row in range(4))
    scored = [ids for ids, targets in pairs if (targets >= 0).all()]
    names = [name for ids in scored for name in ids]
    assert len(names) == len(set(names)) <= 57
    assert len(batches) == -(-len(scored) // 4)  # filled up with rows nobody is scored on
    assert len(all_batches(batch_rows=1)) == len(scored)  # rows do not depend on the batch
    with pytest.raises(UserError, match="65537 tokens"):
        all_batches(seq_len=2**16)
