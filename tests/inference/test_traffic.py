"""Whatever comes, leaves and fails at once, each text is the one that is written alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Completion, Request, Tool
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh

RINGS = GPTConfig(60, 2, 32, 4, 2, 256, window_pattern="SL", extras=True, qk_scale=1.2)
BROKEN, START, END, STOP = 50, 10, 11, 7  # BROKEN: an id whose embedding is not a number
MAX_LEN = 256


def say(ids: list[int]) -> list[int]:
    """Some calls fail, some say nothing, some say ids that there are not."""
    return [[12, *ids[:3], 13], [], [10**9], [1 // (len(ids) % 4)]][len(ids) % 4]


def random_request(rng, before: list[tuple[Request, Completion]]) -> Request:
    """A new prompt, one that was asked before, or the next turn of a chat."""
    prompt = rng.integers(9, 52, size=rng.choice([1, 5, 40, 130, 200])).tolist()
    if before and rng.random() < 0.6:
        asked, answer = before[rng.integers(len(before))]
        same = [*asked.prompt, *answer.tokens][: rng.integers(1, MAX_LEN)]
        prompt = list(asked.prompt) if rng.random() < 0.3 else [*same, *prompt[:3]]
    way: dict = {"temperature": rng.choice([0.0, 0.8]), "top_k": int(rng.choice([0, 5]))}
    way["seed"] = int(rng.integers(3))
    if rng.random() < 0.3:
        way |= {"frequency_penalty": 0.5, "logit_bias": {START: 2.0, END: 3.0}}
    if rng.random() < 0.2:
        way |= {"prompt_logprobs": True, "top_logprobs": int(rng.integers(4))}
    return Request(prompt[: MAX_LEN - 1], int(rng.integers(1, 40)), **way)


def step(engine: Engine, answers: dict[int, Completion], in_traffic: bool = True) -> None:
    for piece in engine.step(in_traffic):
        answer = answers.setdefault(piece.id, Completion())
        assert not answer.finish
        answer.add(piece)


def agree(ours: Completion, alone: Completion) -> None:
    n, ended = len(ours.tokens), ours.finish not in ("cancelled", "error")
    if ended:
        assert (ours.finish, n) == (alone.finish, len(alone.tokens))
        told, expected = ([p for p, _ in one.prompt or ()] for one in (ours, alone))
        np.testing.assert_allclose(told, expected, atol=1e-4)
    elif ours.finish == "error":
        assert ours.reason == alone.reason
    n = min(n, len(alone.tokens))  # how much is told before an error depends on the burst
    assert (ours.tokens[:n], ours.sampled[:n]) == (alone.tokens[:n], alone.sampled[:n])
    np.testing.assert_allclose(ours.logprobs[:n], alone.logprobs[:n], atol=1e-4)
    ids = ([[id for id, _ in top] for top in one.top[:n]] for one in (ours, alone))
    assert next(ids) == next(ids)


@pytest.mark.parametrize(
    "layout, config, seeds",
    [
        ((1, 1, 1), RINGS, range(2)),
        ((1, 1, 1), replace(RINGS, compute_dtype="bfloat16"), range(2, 3)),
        pytest.param((2, 2, 2), RINGS, range(2), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), RINGS, range(2), marks=pytest.mark.slow),
        pytest.param((1, 1, 1), replace(RINGS, extras=False), range(9), marks=pytest.mark.slow),
    ],
    ids=["rings", "bfloat16", "mixed", "data", "classic"],
)
def test_a_text_among_others_is_the_text_alone(layout, config, seeds, random_params):
    data, fsdp, tensor = layout
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    params = random_params(config)
    params["wte.table"][BROKEN], params["lm_head.kernel"][:, BROKEN] = np.nan, 0

    def make(slots: int) -> Engine:
        tools = {"it": Tool(START, END, say)}
        rules = {"stop_ids": [STOP], "never_ids": [12, 13], "tools": tools, "tool": "it"}
        engine = Engine(config, mesh, slots=slots, max_len=MAX_LEN, **rules)
        engine.load(params)
        return engine

    engine, quiet, finished = make(3), make(1), set()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        asked: dict[int, Request] = {}
        answers: dict[int, Completion] = {}
        for _ in range(60):
            action = rng.random()
            if action < 0.35:
                before = [(asked[id], answer) for id, answer in answers.items()]
                request = random_request(rng, before)
                asked[engine.submit(request)] = request
            elif action < 0.45 and engine.busy():
                open = [id for id in asked if id not in answers or not answers[id].finish]
                engine.cancel(int(rng.choice(open)))
            else:
                step(engine, answers)
        while engine.busy():
            step(engine, answers)
        assert set(answers) == set(asked)
        finished |= {answer.finish for answer in answers.values()}
        for id, request in asked.items():
            alone: dict[int, Completion] = {}
            quiet.load(params)  # and forget what lies in the slots
            number = quiet.submit(request)
            while quiet.busy():
                step(quiet, alone, in_traffic=False)
            agree(answers[id], alone[number])
    assert finished >= {"cancelled", "error", "length"}


def test_generate_gives_the_same_bits_after_any_traffic(random_params):
    """What resumes an evaluation or training depends on it."""
    mesh = make_mesh(devices=jax.devices()[:1])
    rules = {"stop_ids": [STOP], "never_ids": [BROKEN]}
    engine = Engine(RINGS, mesh, slots=3, max_len=MAX_LEN, **rules)
    params = random_params(RINGS)
    params["wte.table"][BROKEN], params["lm_head.kernel"][:, BROKEN] = np.nan, 0
    engine.load(params)
    rng, answers = np.random.default_rng(0), {}
    good = [np.arange(n) % 50 for n in (1, 5, 40, 130, 200, 40)]
    asked = [Request(ids.tolist(), 50, 0.8 * (i % 2), seed=i) for i, ids in enumerate(good)]
    first = engine.generate(asked)
    for seed in range(3):
        for _ in range(8):
            engine.submit(random_request(rng, []))
            step(engine, answers)
        engine.cancel(max(answers))
        while engine.busy():
            step(engine, answers)
        assert engine.generate(asked) == first, seed
