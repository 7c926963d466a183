"""Scheduling without a device: what each slot says is a function of its text alone."""

import itertools
import threading
from dataclasses import replace

import pytest

from nanochat_jax.common import UserError
from nanochat_jax.inference.scheduler import TOOL_THREADS, Completion, Request, Scheduler, Tool

VOCAB, STOP, START, END = 20, 7, 11, 13
TOOL = Tool(START, END, lambda ids: [STOP, START, *ids[:2], END])
TOOLS = {"tool": TOOL}


def likely(ids):
    return (ids[-1] * 5 + len(ids) * 3 + sum(ids)) % VOCAB


def run(scheduler: Scheduler, steps: int = 3, waited: bool = True) -> list[Completion]:
    """One step of an engine whose device writes at most `steps` tokens for each slot."""
    scheduler.hear(waited)
    scheduler.admit()
    pieces, (told, scheduler.ended) = [], (scheduler.ended, [])
    for slot, text in list(scheduler.texts.items()):
        if text.running:
            continue
        said = []
        while len(said) < min(steps, scheduler.left(text)):
            forced = len(said) < len(text.forced)
            said.append(text.forced[len(said)] if forced else likely([*text.ids, *said]))
            if not forced and said[-1] in (*scheduler.stop_ids, END):
                break
        pieces.append(scheduler.advance(slot, said, [-token / VOCAB for token in said]))
    return told + pieces


def answer(asked, slots=2, steps=3, stop_ids=(STOP,), tool="tool", max_len=60) -> list[Completion]:
    """All answers, and every request's pieces are in order and end once."""
    scheduler = Scheduler(slots, max_len, VOCAB, stop_ids, TOOLS, tool)
    ids, answers = [scheduler.submit(request) for request in asked], {}
    while scheduler.busy():
        for piece in run(scheduler, steps):
            whole = answers.setdefault(piece.id, Completion())
            assert not whole.finish
            whole.add(piece)
    return [answers[id] for id in ids]


def by_hand(request: Request, max_len: int) -> Completion:
    """One text, a token at a time."""
    ids, forced, call, out = list(request.prompt), [], None, Completion()
    while not out.finish:
        sampled = not forced
        token = likely(ids) if sampled else forced.pop(0)
        ids.append(token)
        out.tokens.append(token)
        out.sampled.append(sampled)
        out.logprobs.append(-token / VOCAB if sampled else 0.0)
        if sampled and token == STOP:
            out.finish = "stop"
        elif len(out.tokens) == request.max_new_tokens:
            out.finish = "length"
        elif len(ids) == max_len:
            out.finish = "context"
        elif sampled and token == START:
            call = []
        elif sampled and token == END and call is not None:
            forced, call = list(TOOL.run(call)), None
        elif sampled and call is not None:
            call.append(token)
    return out


@pytest.mark.parametrize("slots, steps", [(1, 1), (2, 3), (5, 16)])
def test_every_text_goes_on_as_if_it_were_alone(slots, steps):
    asked = [Request([a, b], 3 + 5 * a) for a, b in itertools.product(range(11), range(8))]
    expected = [by_hand(request, max_len=40) for request in asked]
    assert {one.finish for one in expected} == {"stop", "length", "context"}
    assert not all(all(one.sampled) for one in expected)  # the tool was called
    ours = answer(asked, slots, steps, max_len=40)
    assert ours == expected


def test_slots_go_to_those_who_came_first():
    scheduler = Scheduler(2, 60, VOCAB, ())
    ids = [scheduler.submit(Request([1], n)) for n in (2, 4, 6, 2)]
    scheduler.admit()
    assert [text.id for text in scheduler.texts.values()] == ids[:2]
    finished = []
    while scheduler.busy():
        finished += [piece.id for piece in run(scheduler, steps=2) if piece.finish]
    assert finished == [ids[0], ids[1], ids[3], ids[2]]


def test_a_tool_that_fails_ends_its_text_alone_and_one_that_is_slow_stops_no_other():
    """Tools are chosen by the request."""
    wait, asked = threading.Event(), [Request([n], 30) for n in range(8)]
    expected = answer(asked, tool="none")
    calls = [i for i, whole in enumerate(answer(asked)) if not all(whole.sampled)]
    assert len(calls) >= 2
    broken = Tool(START, END, lambda ids: 1 // 0)
    slow = Tool(START, END, lambda ids: wait.wait() and [3, 3])
    scheduler = Scheduler(8, 60, VOCAB, (STOP,), {"broken": broken, "slow": slow})
    tools = ["none"] * 8
    tools[calls[0]], tools[calls[1]] = "broken", "slow"
    requests = zip(asked, tools, strict=True)
    ids = [scheduler.submit(replace(request, tool=tool)) for request, tool in requests]
    answers = {id: Completion() for id in ids}
    while sum(not whole.finish for whole in answers.values()) > 1:
        for piece in run(scheduler, waited=False):
            answers[piece.id].add(piece)
    failed, parked = (answers[ids[i]] for i in calls[:2])
    assert failed.finish == "error" and "ZeroDivision" in failed.reason and failed.tokens
    assert parked.finish == "" and parked.tokens[-1] == END
    others = [i for i in range(8) if i not in calls[:2]]
    assert [answers[ids[i]].tokens for i in others] == [expected[i].tokens for i in others]
    wait.set()
    while not parked.finish:
        for piece in run(scheduler):
            parked.add(piece)
    at = parked.sampled.index(False)
    assert parked.tokens[at : at + 2] == [3, 3] and parked.tokens[at - 1] == END


@pytest.mark.parametrize("said", [[3, VOCAB], [-1], [10**12], None, ["3"]], ids=str)
def test_a_tool_that_says_what_no_text_can_hold_ends_its_text(said):
    scheduler = Scheduler(1, 60, VOCAB, (), {"tool": Tool(START, END, lambda ids: said)}, "tool")
    scheduler.submit(Request([1], 9))
    scheduler.admit()
    scheduler.advance(0, [START, END], [0.0, 0.0])
    scheduler.hear(waited=True)
    assert not scheduler.texts
    assert [(piece.finish, piece.reason != "") for piece in scheduler.ended] == [("error", True)]


def test_a_tool_without_end_says_as_much_as_a_text_can_hold():
    tool = Tool(START, END, lambda ids: itertools.repeat(3))  # pyright: ignore
    scheduler = Scheduler(1, 60, VOCAB, (), {"tool": tool}, "tool")
    scheduler.submit(Request([1], 99))
    scheduler.admit()
    whole = scheduler.advance(0, [START, END], [0.0, 0.0])
    while scheduler.busy():
        for piece in run(scheduler):
            whole.add(piece)
    assert whole.tokens == [START, END, *[3] * 57] and whole.finish == "context"


def test_tools_of_cancelled_texts_that_have_not_begun_never_do():
    release, calls = threading.Event(), []
    tool = Tool(START, END, lambda ids: calls.append(ids) or release.wait() and [])
    slots = TOOL_THREADS + 3
    scheduler = Scheduler(slots, 60, VOCAB, (), {"tool": tool}, "tool")
    ids = [scheduler.submit(Request([1], 9)) for _ in range(slots)]
    scheduler.admit()
    for slot in range(slots):
        scheduler.advance(slot, [START, slot, END], [0.0] * 3)
    for id in ids:
        scheduler.cancel(id)
    release.set()
    scheduler._threads.shutdown()
    assert len(calls) == TOOL_THREADS and not scheduler.texts


def test_a_slot_whose_text_failed_is_not_taken_for_its_beginning():
    """How far the cache was written is not known."""
    scheduler = Scheduler(1, 60, VOCAB, ())
    scheduler.submit(Request(list(range(18)), 9))
    scheduler.admit()
    scheduler.texts[0].cached = 17
    scheduler.fail(0, "logits are not finite")
    scheduler.submit(Request(list(range(18)), 9))
    scheduler.admit()
    assert scheduler.texts[0].cached == 0


def test_a_prompt_whose_beginning_lies_in_a_slot_goes_there():
    """Unless a ring of the cache has lost what lies before the end of the beginning."""
    first = list(range(19))
    for window, same_text, expected in [(60, 19, 19), (60, 17, 17), (60, 9, 0), (8, 17, 0)]:
        scheduler = Scheduler(3, 60, VOCAB, (), window=window)
        for prompt in ([1, 1], first):
            scheduler.submit(Request(prompt, 2))
        while scheduler.busy():
            run(scheduler)
        (held,) = [ids for ids in scheduler.left_behind.values() if ids[: len(first)] == first]
        wanted = (held + [0] * 9)[:same_text] + [18 - same_text] * 4
        if same_text == 19:
            wanted = [*held, 5, 5]
            expected = len(held)
        scheduler.submit(Request(wanted, 2))
        scheduler.admit()
        ((slot, text),) = scheduler.texts.items()
        assert text.cached == expected
        assert (slot == 1) == (expected > 0)


def test_cancelling_leaves_the_others_alone():
    asked = [Request([n], 12) for n in range(4)]
    expected = answer(asked, stop_ids=(), tool="none")
    scheduler = Scheduler(2, 60, VOCAB, ())
    ids = [scheduler.submit(request) for request in asked]
    pieces = run(scheduler)
    scheduler.cancel(ids[0])  # it has a slot
    scheduler.cancel(ids[3])  # it waits
    scheduler.cancel(10**6)  # nobody
    while scheduler.busy():
        pieces += run(scheduler)
    finish = {piece.id: piece.finish for piece in pieces if piece.finish}
    assert [finish[id] for id in ids] == ["cancelled", "length", "length", "cancelled"]
    for id, whole in zip(ids[1:3], expected[1:3], strict=True):
        assert sum((piece.tokens for piece in pieces if piece.id == id), []) == whole.tokens
    scheduler.cancel(ids[1])  # it has ended
    assert not scheduler.busy()


NAN, INF = float("nan"), float("inf")
BAD = {"max_new_tokens": (0,), "temperature": (-0.1, 1e39, NAN, INF), "top_k": (-1,)}
BAD |= {"top_p": (0.0, 1.1), "seed": (-1,), "prompt": ([], [1, VOCAB], [-1], [1] * 60)}
BAD |= {"presence_penalty": (2.1, NAN), "frequency_penalty": (-2.1,), "top_logprobs": (21,)}
BAD |= {"logit_bias": ({1: 101.0}, {1: NAN}, {i: 1.0 for i in range(301)}), "tool": ("hammer",)}


@pytest.mark.parametrize("name, value", [(name, bad) for name in BAD for bad in BAD[name]])
def test_what_is_out_of_range_is_refused(name, value):
    scheduler = Scheduler(2, 60, VOCAB, ())
    with pytest.raises(
        UserError, match={"prompt": "got (id|a prompt)", "tool": "got tool"}.get(name, f"^{name}")
    ):
        scheduler.submit(Request(**{"prompt": [1], "max_new_tokens": 5, name: value}))
    assert not scheduler.busy()
