"""What clients depend on in streams: read as the lines they are, and with the openai client."""

import asyncio
import json

import openai
import pytest

from nanochat_jax.serve import api

CALL = "It is ~<|python_start|>~2*3~<|python_end|>~<|output_start|>~6~<|output_end|>~6."


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith(("data: ", ":")) and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def ask(server, content, **fields):
    body = {"messages": [{"role": "user", "content": content}], "stream": True}
    return events(server.post("/v1/chat/completions", body | fields))


@pytest.mark.parametrize("piece", [1, 5, 100])
def test_the_chunks_of_every_choice_are_a_whole_answer(serve, piece):
    server = serve(piece=piece)
    text = "naïve 船 text"
    chunks = ask(server, text, n=3)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    for index in range(3):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(c["delta"].get("content", "") for c in mine) == text
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_usage_comes_last_and_only_when_asked_for(scripted):
    chunks = ask(scripted, "four", stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    prompt = len(scripted.engine.requests[0].prompt)
    assert chunks[-1]["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,  # and the end
        "total_tokens": prompt + 5,
    }
    assert all("usage" not in chunk for chunk in ask(scripted, "four", stream_options={}))


def test_a_stop_string_is_never_seen_by_halves(scripted):
    chunks = ask(scripted, "one <end> two", stop=["<end>", "<e>"])
    deltas = [c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]]
    assert "".join(deltas) == "one " and not any("<" in delta for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    whole = ask(scripted, "one <en", stop="<end>")
    assert "".join(c["delta"].get("content", "") for k in whole for c in k["choices"]) == "one <en"


def test_whoever_waits_gets_comments(serve, monkeypatch):
    monkeypatch.setattr(api, "KEEP_ALIVE_SECS", 0.05)
    server = serve(slots=1, step_secs=0.005)
    with server.openai() as client:
        first = client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "!wait"}], stream=True, max_tokens=60
        )
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        response = server.post("/v1/chat/completions", body)
        assert response.text.startswith(": ")
        assert "".join(
            c["delta"].get("content", "") for e in events(response) for c in e["choices"]
        )
        first.close()


def test_an_error_in_mid_stream_is_an_event(scripted):
    chunks = ask(scripted, "!fail")
    assert chunks[-1]["error"]["type"] == "server_error"
    with pytest.raises(openai.APIError):
        scripted.chat("!fail", stream=True)


def test_a_tools_parts_come_beside_the_text(scripted):
    message = scripted.chat(CALL).choices[0].message
    assert message.content == "It is 6."
    called = [("python", "2*3"), ("python_output", "6")]
    whole = [("text", "It is "), *called, ("text", "6.")]
    assert [(part["type"], part["text"]) for part in message.model_extra["parts"]] == whole
    joined = []
    for chunk in ask(scripted, CALL):
        for part in chunk["choices"][0]["delta"].get("parts", []):
            if part.get("new") or not joined or joined[-1][0] != part["type"]:
                joined.append((part["type"], ""))
            joined[-1] = part["type"], joined[-1][1] + part["text"]
    assert joined == whole
    with scripted.openai() as client:
        asked = {"model": "", "messages": [{"role": "user", "content": CALL}]}
        with client.chat.completions.stream(**asked) as helper:  # the client's own way to join
            parts = helper.get_final_completion().choices[0].message.model_extra["parts"]
    assert [(part["type"], part["text"]) for part in parts] == whole
    # And they can be sent back as they came.
    parts = message.model_extra["parts"]
    scripted.chat(
        [
            {"role": "user", "content": "2*3?"},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": "more"},
        ]
    )
    said = CALL.replace("~", "")
    assert f"<|assistant_start|>{said}<|assistant_end|>" in scripted.engine.prompt()


def test_completions_stream_too(scripted):
    with scripted.openai() as client:
        chunks = list(client.completions.create(model="", prompt=["ab", "cd"], stream=True))
    texts = {index: "" for index in range(2)}
    for chunk in chunks:
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "ab", 1: "cd"}


def test_the_client_of_openai_streams_and_waits_sync_and_async(real):
    """One seed, one text, however it is asked for."""
    asked = {"model": real.model, "messages": [{"role": "user", "content": "hello"}], "seed": 5}
    asked |= {"temperature": 1.0, "max_completion_tokens": 40}

    async def both():
        url = f"{real.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream]
            names = [model.id async for model in client.models.list()]
        return whole.choices[0].message.content, "".join(pieces), names

    with real.openai() as client:
        whole = client.chat.completions.create(**asked).choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        pieces = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with client.chat.completions.stream(**asked) as helper:  # checks the chunks itself
            final = helper.get_final_completion().choices[0].message.content
    assert len(whole) > 0 and asyncio.run(both()) == (whole, whole, [real.model])
    assert pieces == final == whole
