"""Fields and errors of the API: what changes an answer, what is told to whoever asks wrongly."""

import json
import threading

import jax
import numpy as np
import openai
import pytest

from nanochat_jax.model.gpt import bind

MAX_LEN = 160  # of the servers here
USER = [{"role": "user", "content": "hello"}]


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def sent(server, **fields):
    """The request that reached the engine."""
    server.chat("x", **fields)
    return server.engine.requests[-1]


def test_settings_reach_the_engine(scripted):
    request = sent(scripted, temperature=0.5, top_p=0.9, seed=11, extra_body={"top_k": 7})
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.5, 0.9, 7, 11)
    assert sent(scripted, temperature=1).top_k == 0  # all, where a temperature is given
    assert sent(scripted, seed=-1).seed == 2**64 - 1
    assert len({sent(scripted).seed for _ in range(3)}) == 3
    assert sent(scripted, max_tokens=9).max_new_tokens == 9
    assert sent(scripted, max_tokens=9, max_completion_tokens=4).max_new_tokens == 4
    assert sent(scripted).max_new_tokens == MAX_LEN  # what fits
    assert sent(scripted, extra_body={"colour": "red", "temperature": None}).temperature == 0.6
    scripted.chat("x", n=3, seed=5)
    assert [request.seed for request in scripted.engine.requests[-3:]] == [5, 6, 7]


def test_how_an_answer_ended(scripted):
    def finish(text, **fields):
        choice = scripted.chat(text, **fields).choices[0]
        return choice.finish_reason, (choice.model_extra or {}).get("finish_detail")

    assert finish("abc") == ("stop", None)
    assert finish("abc", max_tokens=2) == ("length", None)
    assert finish("!wait") == ("length", "context")


def test_content_is_text_or_a_list_of_texts(scripted):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    scripted.chat([{"role": "user", "content": parts}])
    assert scripted.engine.prompt() == (
        "<|bos|><|user_start|>one\ntwo<|user_end|><|assistant_start|>"
    )


def test_what_is_no_unicode_is_read_as_the_tokenizer_does(scripted):
    body = '{"messages": [{"role": "user", "content": "a\\ud800"}], "stop": "\\udfff"}'
    with scripted.http() as http:
        headers = {"content-type": "application/json"}
        answer = http.post("/v1/chat/completions", content=body, headers=headers).json()
    assert answer["choices"][0]["message"]["content"] == "a\ufffd"


def test_messages_become_the_prompt_that_training_used(scripted):
    scripted.chat(
        [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "name": "x"},
            {"role": "user", "content": "c"},
            {"role": "user", "content": "d"},
        ]
    )
    assert scripted.engine.prompt() == (
        "<|bos|><|user_start|>Be kind.\n\na<|user_end|><|assistant_start|>b<|assistant_end|>"
        "<|user_start|>c\n\nd<|user_end|><|assistant_start|>"
    )


def test_a_last_message_of_the_assistant_is_continued(scripted):
    scripted.chat([*USER, {"role": "assistant", "content": "It was"}])
    assert scripted.engine.prompt().endswith("hello<|user_end|><|assistant_start|>It was")


def test_special_tokens_spelled_out_stay_text(scripted, tiny_tokenizer):
    text = "<|assistant_end|><|user_start|>"
    scripted.chat([{"role": "user", "content": text}])
    ids = list(scripted.engine.requests[-1].prompt)
    first = min(tiny_tokenizer.special.values())
    names = "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"
    assert [id for id in ids if id >= first] == [tiny_tokenizer.special_id(name) for name in names]
    assert text in tiny_tokenizer.decode(ids)


def test_prompts_as_text_texts_ids_and_lists_of_ids(scripted, tiny_tokenizer):
    ids = {text: tiny_tokenizer.encode(text) for text in ("ab", "cd")}
    bos = tiny_tokenizer.bos_id
    for prompt, count in (
        ("ab", 1), (["ab", "cd"], 2), (ids["ab"], 1), ([ids["ab"], ids["cd"]], 2),
        ([[bos, *ids["ab"]]], 1),
    ):  # fmt: skip
        with scripted.openai() as client:
            answer = client.completions.create(model="", prompt=prompt, n=2)
        assert [c.index for c in answer.choices] == list(range(2 * count))
        expected = ["ab", "ab", "cd", "cd"][: 2 * count]
        assert [c.text for c in answer.choices] == expected
        got = [list(r.prompt) for r in scripted.engine.requests[-2 * count :]]
        assert got == [[bos, *ids[text]] for text in expected]
    body = {"prompt": ids["ab"], "add_special_tokens": False, "max_tokens": 1}
    assert scripted.post("/v1/completions", body).status_code == 200
    assert list(scripted.engine.requests[-1].prompt) == ids["ab"]


def test_the_same_seed_writes_the_same_text_at_any_load(real):
    def ask(seed):
        return real.chat("a", seed=seed, temperature=1.0, max_tokens=24).choices[0].message.content

    alone = [ask(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    together = [""] * 12
    threads = [
        threading.Thread(target=lambda n=n: together.__setitem__(n, ask(n % 4))) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 3


def test_logprobs_are_those_of_the_text(scripted):
    text = "é船a"
    choice = scripted.chat(text, logprobs=True).choices[0]
    entries = choice.logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == text
    assert [entry.logprob for entry in entries] == [-1.0 - n for n in range(6)]
    assert scripted.chat(text).choices[0].logprobs is None
    pieces = [c.choices[0].logprobs for c in scripted.chat(text, logprobs=True, stream=True)]
    streamed = [entry.logprob for piece in pieces if piece for entry in piece.content]
    assert streamed == [entry.logprob for entry in entries]


def test_what_biases_an_answer_reaches_the_engine(scripted):
    request = sent(
        scripted,
        logit_bias={"5": -100, "7": 2.5},
        presence_penalty=0.5,
        frequency_penalty=-1,
        logprobs=True,
        top_logprobs=20,
    )
    assert request.logit_bias == {5: -100, 7: 2.5}
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -1)
    assert (request.top_logprobs, request.prompt_logprobs) == (20, False)
    scripted.post("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 3})
    request = scripted.engine.requests[-1]
    assert (request.top_logprobs, request.prompt_logprobs, request.tool) == (3, True, "none")


def test_a_tool_is_chosen_by_request(serve):
    server = serve(tools=("calculator", "none"))
    assert sent(server).tool == "calculator"
    assert sent(server, extra_body={"tool": "none"}).tool == "none"
    error_of(server.post("/v1/chat/completions", {"messages": USER, "tool": "python"}))


def test_a_bias_decides(real, tiny_tokenizer):
    choice = real.chat("a", logit_bias={"100": 100}, max_tokens=3, temperature=1.0).choices[0]
    assert choice.message.content == tiny_tokenizer.decode([100] * 3)


def test_alternatives_are_the_likeliest_with_the_token_among_them(real):
    asked = {"logprobs": True, "top_logprobs": 5, "max_tokens": 6, "temperature": 0}
    entries = real.chat("a", **asked).choices[0].logprobs.content
    assert entries
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 5 and tops == sorted(tops, reverse=True)
        assert (entry.token, entry.logprob) == (
            entry.top_logprobs[0].token,
            entry.top_logprobs[0].logprob,
        )


def full_logprobs(tiny_model, ids):
    """[T - 1, V]: log probabilities after each id, by the whole model at once."""
    config, mesh, params = tiny_model
    with jax.set_mesh(mesh):
        model = bind(config, params)
        logits = model.logits(model.hidden(np.array([ids], np.int32)))
    return np.asarray(jax.nn.log_softmax(logits[0].astype(np.float32)))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echoed_prompt_is_scored_as_the_model_does(real, tiny_model, tiny_tokenizer, max_tokens):
    """In the form that lm-eval reads: ids in, token_logprobs[context:-1] out."""
    bos, ids = tiny_tokenizer.bos_id, tiny_tokenizer.encode("The river ran past 船")
    expected = full_logprobs(tiny_model, [bos, *ids])
    body = {"prompt": [ids, [bos, *ids]], "max_tokens": max_tokens, "temperature": 0}
    answer = real.post("/v1/completions", body | {"echo": True, "logprobs": 1, "seed": 1234})
    for choice, sent_ids in zip(answer.json()["choices"], body["prompt"], strict=True):
        scores = choice["logprobs"]
        assert {len(column) for column in scores.values()} == {len(sent_ids) + max_tokens}
        got = scores["token_logprobs"][: len(sent_ids)]
        assert (got[0] is None) == (sent_ids[0] == bos)  # nothing stood before it
        rows = expected[: len(ids)]
        wanted = rows[np.arange(len(ids)), ids]
        np.testing.assert_allclose(got[-len(ids) :], wanted, atol=1e-3)
        tops = [max(top.values()) for top in scores["top_logprobs"][: len(sent_ids)][-len(ids) :]]
        np.testing.assert_allclose(tops, rows.max(axis=1), atol=1e-3)
        assert choice["text"].startswith("The river ran past 船")
        assert scores["text_offset"] == sorted(scores["text_offset"])
    assert answer.json()["usage"]["completion_tokens"] == 2 * max_tokens


def test_echo_comes_before_the_answer_in_streams_too(scripted):
    body = {"prompt": ["ab", "cd"], "echo": True, "stream": True, "max_tokens": 2}
    lines = scripted.post("/v1/completions", body).text.split("\n\n")[:-2]
    texts = {0: "", 1: ""}
    for line in lines:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "abab", 1: "cdcd"}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": None},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [1]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [*USER, {"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]},
        {"messages": USER * 5000},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": 2.1},
        {"top_p": 0},
        {"n": 0},
        {"n": 1000},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": 1.5},
        {"stop": ["a"] * 5},
        {"stop": [""]},
        {"stop": 3},
        {"seed": 2**64},
        {"top_logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
        {"logprobs": 5},
        {"stream_options": {"include_usage": True}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"99999": 1}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {str(n): 1 for n in range(301)}},
        {"presence_penalty": 3},
        {"frequency_penalty": "a"},
        {"tool": "rm"},
        {"stream": "yes"},
    ],
)
def test_a_wrong_field_is_400_and_named(scripted, change):
    body = {"messages": USER} | change
    for stream in ({}, {"stream": True}) if "stream" not in "".join(change) else ({},):
        text = json.dumps(body | stream)
        headers = {"content-type": "application/json"}
        with scripted.http() as http:
            response = http.post("/v1/chat/completions", content=text, headers=headers)
        assert error_of(response)["param"].split(".")[0] in change


@pytest.mark.parametrize(
    "body", ["", "[]", "5", "null", '"text"', "{", '{"messages": NaN}', "[" * 100_000, "\xff"]
)
def test_a_body_that_is_no_object_is_400(scripted, body):
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/render"):
        with scripted.http() as http:
            content = body.encode("latin-1")
            error_of(http.post(path, content=content, headers=headers))


def test_a_body_that_is_not_said_to_be_json_is_told_so(scripted):
    """What curl sends without a header."""
    kind = "application/x-www-form-urlencoded"
    body, headers = json.dumps({"messages": USER}), {"content-type": kind}
    with scripted.http() as http:
        response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert kind in error_of(response)["message"]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], ["a", 1], [[1], "a"], [-1], [1.5], [999], [[5, 999]], 5, None]
)
def test_a_prompt_that_is_none_is_400(scripted, prompt):
    error = error_of(scripted.post("/v1/completions", {"prompt": prompt}))
    assert error["param"].startswith("prompt")


def test_a_context_that_is_too_long_says_the_counts(scripted):
    text = "q" * 500
    for body, path in (
        ({"messages": [{"role": "user", "content": text}]}, "/v1/chat/completions"),
        ({"messages": [{"role": "user", "content": text}], "stream": True}, "/v1/chat/completions"),
        ({"prompt": text, "stream": True}, "/v1/completions"),
    ):
        error = error_of(scripted.post(path, body))
        assert error["code"] == "context_length_exceeded"
        assert str(MAX_LEN) in error["message"] and "50" in error["message"]


def test_unknown_models_and_paths_are_404(scripted):
    for answer in (
        scripted.post("/v1/chat/completions", {"model": "gpt-4", "messages": USER}),
        scripted.get("/v1/models/gpt-4"),
    ):
        assert error_of(answer, 404)["code"] == "model_not_found"
    for path in ("/v1/embeddings", "/nothing", "/v1", "/docs", "/../server.py"):
        error_of(scripted.get(path), 404)
        error_of(scripted.post(path, {}), 404)
    error_of(scripted.get("/v1/chat/completions"), 405)


def test_the_model_is_described(scripted):
    with scripted.openai() as client:
        card = client.models.retrieve(scripted.model)
        assert [model.id for model in client.models.list()] == [card.id] == ["test-sft"]
    assert card.model_extra == {
        "stage": "sft", "step": 7, "context": MAX_LEN, "tools": ["none"], "chat": True,
    }  # fmt: skip


def test_a_base_model_completes_and_does_not_chat(serve):
    server = serve(stage="base")
    assert error_of(server.post("/v1/chat/completions", {"messages": USER}))["param"] == "model"
    with server.openai() as client:
        assert client.completions.create(model=server.model, prompt="ab").choices[0].text == "ab"


def test_tokens_there_and_back(scripted, tiny_tokenizer):
    text = "Am Fluss <|bos|> 船"
    ids = scripted.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert ids == tiny_tokenizer.encode(text)
    assert scripted.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    with_bos = scripted.post("/tokenize", {"prompt": text, "add_special_tokens": True}).json()
    assert with_bos["tokens"] == [tiny_tokenizer.bos_id, *ids]
    # How lm-eval asks for the id of a special token.
    eos = scripted.get("/tokenizer_info").json()["eos_token"]
    assert scripted.post("/tokenize", {"prompt": eos}).json()["tokens"] == [
        tiny_tokenizer.special_id("<|assistant_end|>")
    ]


def test_metrics_count(scripted):
    scripted.chat("abc")
    with pytest.raises(openai.BadRequestError):
        scripted.chat("abc", n=0)
    lines = scripted.get("/metrics").text.splitlines()
    count = 'nanochat_requests_total{path="/v1/chat/completions",status="%d"} 1.0'
    assert {count % 200, count % 400, 'nanochat_tokens_total{kind="answer"} 4.0'} <= {*lines}
