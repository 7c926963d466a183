"""The engine against full forward passes, against itself in other company, and at its edges."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.inference.engine import PREFILL_TOKENS, Engine
from nanochat_jax.inference.request import Completion, Request, Tool
from nanochat_jax.model.gpt import GPTConfig, bind
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.parity.model import read_case
from nanochat_jax.parity.reference import read
from scripts.bench.infer import generate_greedy

ONE = make_mesh(devices=jax.devices()[:1])
MAX_LEN = 128
SEES_ALL = GPTConfig(60, 2, 32, 4, 2, seq_len=512, compute_dtype="float32", extras=True)


def make_engine(config, params, mesh=ONE, *, slots=4, max_len=MAX_LEN, stop_ids=(), **kw) -> Engine:
    engine = Engine(config, mesh, slots=slots, max_len=max_len, stop_ids=stop_ids, **kw)
    engine.load(params)
    return engine


def requests(num: int, max_new_tokens: int = 40) -> list[Request]:
    """Prompts of 1, 2, 9, ... ids, each sampled in another way."""
    rng = np.random.default_rng(7)
    ways = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 20, 0.8)]
    asked = []
    for i in range(num):
        prompt = rng.integers(60, size=[1, 2, 9, 33, 70, 30][i % 6]).tolist()
        asked.append(Request(prompt, max_new_tokens + i, *ways[i % 4], seed=i))
    return asked


def same(ours: list[Completion], others: list[Completion]) -> None:
    for a, b in zip(ours, others, strict=True):
        assert (a.tokens, a.sampled, a.finish) == (b.tokens, b.sampled, b.finish)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_every_logprob_is_the_full_forward_pass(config, random_params):
    """Prefill, ring buffers that wrap many times, slots used again: six texts through four."""
    params, asked, told = random_params(config), requests(6), {}
    answers = make_engine(config, params).generate(asked, told.__setitem__)
    assert [told[i] for i in range(6)] == answers and list(told)[-1] > 3
    texts = [[*r.prompt, *a.tokens] for r, a in zip(asked, answers, strict=True)]
    ids = np.array([text + [0] * (MAX_LEN - len(text)) for text in texts])
    forward = jax.jit(lambda params, ids: jax.nn.log_softmax(bind(config, params)(ids)))
    log_probs = np.asarray(forward(params, ids))
    for r, a, expected in zip(asked, answers, log_probs, strict=True):
        assert len(a.tokens) == r.max_new_tokens and a.finish == "length" and all(a.sampled)
        at = np.arange(len(r.prompt) - 1, len(r.prompt) - 1 + len(a.tokens))
        np.testing.assert_allclose(a.logprobs, expected[at, a.tokens], atol=1e-5)
        if r.temperature == 0:
            assert a.tokens == expected[at].argmax(-1).tolist()


def test_an_answer_does_not_depend_on_company_slots_bursts_or_order(modern, random_params):
    params, asked = random_params(modern), requests(6)
    expected = make_engine(modern, params).generate(asked)
    same(make_engine(modern, params, slots=1, burst=5).generate(asked), expected)
    same(make_engine(modern, params, burst=5).generate(asked[::-1])[::-1], expected)
    same(make_engine(modern, params).generate(asked[2:3]), expected[2:3])


def test_a_seed_gives_one_answer_and_another_seed_another(classic, random_params):
    """A top-k above the vocabulary is all of it."""
    ways = [(5, 0), (5, 60), (5, 2**40), (6, 0), (5 + 2**32, 0)]
    asked = [Request([1, 2, 3], 20, temperature=1.0, top_k=k, seed=seed) for seed, k in ways]
    answers = make_engine(classic, random_params(classic)).generate(asked)
    one, same_one, again, other, far = (answer.tokens for answer in answers)
    assert one == same_one == again and one != other and one != far


@pytest.mark.parametrize("generation", ["classic", "modern"])
def test_greedy_equals_upstream(generation, goldens):
    files = (read(goldens / f"{generation}.{ending}") for ending in ("npz", "json"))
    case = read_case(*files, generation)
    names = [key.removesuffix("_prompt") for key in case.arrays if key.endswith("_prompt")]
    expected = [case.arrays[f"{name}_tokens"].tolist() for name in names]
    prompts = [case.arrays[f"{name}_prompt"].tolist() for name in names]
    engine = make_engine(case.config, case.params, max_len=512)
    asked = [Request(p, len(e)) for p, e in zip(prompts, expected, strict=True)]
    assert [answer.tokens for answer in engine.generate(asked)] == expected


@pytest.mark.parametrize(
    "layout", [(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)], ids=["mixed", "data"]
)
def test_eight_devices_write_what_one_writes(layout, modern, random_params):
    config = replace(modern, vocab_size=120)
    params = random_params(config)
    asked = [replace(r, prompt=r.prompt[:30]) for r in requests(9, max_new_tokens=6)]
    data, fsdp, tensor = layout
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    engine = make_engine(config, params, mesh, slots=7)
    assert engine.slots == 8
    same(engine.generate(asked), make_engine(config, params, slots=8).generate(asked))


def test_a_stream_is_the_answer_in_pieces_and_can_be_left(classic, random_params):
    engine = make_engine(classic, random_params(classic), burst=8)
    request = Request([1, 2, 3], 30, temperature=1.0, seed=3)
    (whole,) = engine.generate([request])
    events = list(engine.stream(request))
    assert max(len(event.tokens) for event in events) <= 8
    assert sum((event.tokens for event in events), []) == whole.tokens
    assert [event.finish for event in events] == [""] * (len(events) - 1) + ["length"]
    for event in engine.stream(request):
        engine.cancel(event.id)
        break
    assert not engine.busy()
    same(engine.generate([request]), [whole])


def count_computed(engine) -> list[int]:
    """A list that grows by how many tokens of prompts each call computes."""
    counts, extend = [], engine._extend

    def counted(piece, *rest):
        counts.append(int(piece.count.sum()))
        return extend(piece, *rest)

    engine._extend = counted
    return counts


def test_prompts_alike_are_computed_once(classic, random_params):
    engine = make_engine(classic, random_params(classic), slots=6)
    asked = [Request([9, 8, 7, 6], 10, temperature=1.0, seed=seed) for seed in range(5)]
    asked.append(Request([5], 10, temperature=1.0))  # a single id needs none
    expected = [engine.generate([request])[0] for request in asked]
    counts = count_computed(engine)
    same(engine.generate(asked), expected)
    assert counts == [3]


@pytest.mark.parametrize("window", ["L", "SL"])
def test_the_next_turn_of_a_chat_is_computed_from_where_the_last_one_ended(window, random_params):
    config = replace(SEES_ALL, window_pattern=window)
    params, prompt = random_params(config), list(range(40))
    engine = make_engine(config, params, max_len=512)
    said = list(engine.stream(Request(prompt, 20)))
    others = [Request([n] * 30, 4) for n in range(3)]  # go to the slots that are free
    ids = [engine.submit(request) for request in others]
    while engine.busy():
        engine.step()
    turn = prompt + sum((piece.tokens for piece in said), []) + [1, 2, 3, 4]
    counts = count_computed(engine)
    (ours,) = [sum((p.tokens for p in engine.stream(Request(turn, 20))), [])]
    assert counts == [4] and len(ids) == 3  # the last token of the answer, and three of the turn
    (expected,) = make_engine(config, params, max_len=512).generate([Request(turn, 20)])
    assert ours == expected.tokens


def test_new_prompts_do_not_hold_up_those_who_write(classic, random_params):
    """At most PREFILL_TOKENS and a piece of each step are theirs; the first come first."""
    config = replace(classic, seq_len=2048)
    engine = make_engine(config, random_params(config), max_len=2048)
    writer = engine.submit(Request([1, 2, 3], 200))
    engine.step()
    for _ in range(3):
        engine.submit(Request([5] * 700, 1))
    counts, finished = count_computed(engine), []
    while len(finished) < 3:
        before, pieces = sum(counts), engine.step()
        assert sum(counts) - before <= PREFILL_TOKENS + 128
        assert [len(piece.tokens) > 0 for piece in pieces if piece.id == writer] == [True]
        finished += [piece.id for piece in pieces if piece.finish]
    assert sum(counts) == 699  # equal prompts: one is computed


def test_the_cache_is_updated_in_place(modern, random_params):
    engine = make_engine(modern, random_params(modern))
    engine.submit(Request([1, 2, 3], 20))
    engine.step()
    before = engine._cache
    engine.step()
    assert all(a.is_deleted() for kv in before for a in kv)


def test_new_parameters_count_from_the_next_token(classic, random_params):
    params, prompts = random_params(classic), [[3], [1, 2, 3], list(range(50))]
    engine = make_engine(classic, params)
    for now in (params, {path: np.flip(value) for path, value in params.items()}):
        engine.load(now)
        answers = engine.generate([Request(prompt, 60) for prompt in prompts])
        assert [answer.tokens for answer in answers] == generate_greedy(classic, now, prompts, 60)


@pytest.mark.parametrize("said", [[50, 51, 52], list(range(30)), []], ids=len)
def test_a_tool_is_called_and_its_words_are_forced(said, modern, random_params):
    """What follows is what would have followed a prompt that ended with the tool's words."""
    params, prompt = random_params(modern), [3, 1, 4]
    way = dict(temperature=1.0, seed=11)
    (free,) = make_engine(modern, params, burst=5).generate([Request(prompt, 60, **way)])
    start = free.tokens[4]
    opened = free.tokens.index(start)
    end = next(t for t in free.tokens[opened + 3 :] if t not in free.tokens[: opened + 3])
    closed = free.tokens.index(end)
    calls = []

    def run(ids):
        calls.append(ids)
        return said

    tool = {"tools": {"it": Tool(start, end, run)}, "tool": "it"}
    engine = make_engine(modern, params, burst=5, **tool)
    company = Request([7], 60, temperature=1.0)  # rows next to it are not touched
    answer, _ = engine.generate([Request(prompt, 60, **way), company])
    last_open = max(i for i, t in enumerate(free.tokens[:closed]) if t == start)
    assert calls[0] == free.tokens[last_open + 1 : closed]
    assert answer.tokens[: closed + 1] == free.tokens[: closed + 1]
    behind = closed + 1 + len(said)
    assert answer.tokens[closed + 1 : behind] == said
    assert answer.sampled[:behind] == [True] * (closed + 1) + [False] * len(said)
    assert answer.logprobs[closed + 1 : behind] == [0.0] * len(said)
    assert len(answer.tokens) == 60 and answer.sampled[behind]
    so_far = [*prompt, *answer.tokens[:behind]]
    (rest,) = make_engine(modern, params).generate([Request(so_far, 1, **way)])
    assert answer.tokens[behind] == rest.tokens[0]
    np.testing.assert_allclose(answer.logprobs[behind], rest.logprobs[0], atol=1e-5)


def test_what_fails_leaves_an_engine_that_is_as_good_as_new(classic, random_params):
    params, good = random_params(classic), Request([1, 2], 5)
    engine = make_engine(classic, params)
    expected = engine.generate([good])
    with pytest.raises(UserError, match="0 tokens"):
        engine.generate([good, Request([], 5)])
    engine.load(params | {"lm_head.kernel": params["lm_head.kernel"] * np.nan})
    with pytest.raises(UserError, match="not finite"):
        engine.generate([good])
    engine.load(params)
    same(engine.generate([good]), expected)


def test_what_goes_wrong_in_one_text_ends_that_text(classic, random_params):
    """One prompt has an id whose embedding is not a number."""
    params = random_params(classic)
    good = Request([1, 2, 3], 20, temperature=1.0)
    params["wte.table"][50] = np.nan
    params["lm_head.kernel"][:, 50] = 0
    engine = make_engine(classic, params)
    bad = [Request([4, 50, 6], 20), Request([4, 50, 6], 20, prompt_logprobs=True)]
    ids = [engine.submit(request) for request in (*bad, good)]
    answers = {id: Completion() for id in ids}
    while engine.busy():
        for piece in engine.step():
            answers[piece.id].add(piece)
    for id in ids[:2]:
        assert answers[id].finish == "error" and "not finite" in answers[id].reason
    assert answers[ids[2]].finish == "length" and len(answers[ids[2]].tokens) == 20
    for _ in range(2):  # in the slots of those who failed
        same(engine.generate([good] * 4), [answers[ids[2]]] * 4)


def test_log_probabilities_of_prompts_and_alternatives(modern, random_params):
    """Against the whole forward pass; also of a prompt that fills the context."""
    params = random_params(modern)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(60, size=n).tolist() for n in (1, 7, 40, MAX_LEN, 40)]
    news = [3, 3, 5, 0, 0]
    asked = [
        Request(prompt, new, prompt_logprobs=True, top_logprobs=2 + i)
        for i, (prompt, new) in enumerate(zip(prompts, news, strict=True))
    ]
    answers = make_engine(modern, params).generate(asked)
    forward = jax.jit(lambda params, ids: jax.nn.log_softmax(bind(modern, params)(ids)))
    for request, answer, new in zip(asked, answers, news, strict=True):
        text = [*request.prompt, *answer.tokens]
        padded = np.array([text + [0] * (MAX_LEN - len(text))])
        expected = np.asarray(forward(params, padded))[0]
        assert len(answer.tokens) == new == len(answer.top)
        told = answer.prompt + list(zip(answer.logprobs, answer.top, strict=True))
        assert len(told) == len(text) - 1
        for at, (logprob, top) in enumerate(told):
            np.testing.assert_allclose(logprob, expected[at, text[at + 1]], atol=1e-5)
            best = np.argsort(-expected[at])[: request.top_logprobs]
            assert [id for id, _ in top] == best.tolist()
            np.testing.assert_allclose([p for _, p in top], expected[at, best], atol=1e-5)


def test_biases_penalties_and_ids_that_are_never_said(classic, random_params):
    """Against the same choice made a token at a time from full forward passes."""
    params, prompt = random_params(classic), [3, 1, 4]
    (plain,) = make_engine(classic, params).generate([Request(prompt, 30)])
    never = max(set(plain.tokens), key=plain.tokens.count)
    engine = make_engine(classic, params, never_ids=[never], burst=4)
    ways = [{"logit_bias": {7: 3.5, 9: -100.0, never: 100.0}}, {"presence_penalty": 2.0}]
    ways += [{"frequency_penalty": 1.5}, {"temperature": 0.7, "seed": 3}, {}]
    answers = engine.generate([Request(prompt, 30, **way) for way in ways])
    forward = jax.jit(lambda params, ids: bind(classic, params)(ids))
    for way, answer in zip(ways, answers, strict=True):
        assert never not in answer.tokens
        text = list(prompt)
        for token in answer.tokens if "temperature" not in way else []:
            ids = np.array([text + [0] * (40 - len(text))])
            logits = np.array(forward(params, ids))[0, len(text) - 1]
            for id, value in way.get("logit_bias", {}).items():
                logits[id] += value
            count = np.bincount(text[len(prompt) :], minlength=60)
            logits -= way.get("presence_penalty", 0) * (count > 0)
            logits -= way.get("frequency_penalty", 0) * count
            logits[never] = -np.inf
            assert token == logits.argmax()
            text.append(token)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_what_a_tool_has_said_counts_the_same_whatever_the_burst(penalty, classic, random_params):
    """The tool says in the middle of a burst what the model would say next."""
    params, asked = random_params(classic), Request([3, 1, 4], 40, **{penalty: 2.0})
    (free,) = make_engine(classic, params).generate([asked])
    end = free.tokens[3]
    tool = Tool(free.tokens[0], end, lambda ids: list(range(0, 60, 2)))
    engines = (
        make_engine(classic, params, burst=burst, tools={"it": tool}, tool="it")
        for burst in (2, 7, 40)
    )
    first, *others = (engine.generate([asked]) for engine in engines)
    assert not all(first[0].sampled)
    for other in others:
        same(other, first)


def test_a_prompt_of_one_id_has_scores_too_an_empty_list_of_them(classic, random_params):
    engine = make_engine(classic, random_params(classic), burst=4)
    (answer,) = engine.generate([Request([3], 20, prompt_logprobs=True)])
    assert answer.prompt == []


def test_after_the_warm_up_nothing_is_compiled(modern, random_params):
    """Whatever is asked: short and long, greedy and sampled, alone and many, scored."""
    config = replace(modern, seq_len=512)
    engine = make_engine(config, random_params(config), slots=3, max_len=300)
    told, compiled = [], []
    engine.warm_up(lambda done, of: told.append((done, of)))
    assert told == [(i + 1, len(told)) for i in range(len(told))]

    def listen(event: str, *_, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + len(told))(1.0)
        assert len(compiled) == 1
        extras = [{"logit_bias": {3: 1.0}, "top_logprobs": 3}, {"prompt_logprobs": True}]
        for i, r in enumerate(requests(18, max_new_tokens=3)):
            long = replace(r, prompt=[*r.prompt] * (1 + 7 * (i % 4 == 3)))
            long = replace(long, prompt=long.prompt[:280], **(extras[i % 3] if i % 3 < 2 else {}))
            engine.submit(long)
            engine.step()
        for _ in range(2):
            while engine.busy():
                engine.step()
            engine.generate([Request([4], 3), Request([5] * 290, 2), Request([5] * 290, 2)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
