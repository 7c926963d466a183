"""Engines under traffic: who gets a turn, who is sent away, and what is left when one has gone."""

import threading

import httpx
import openai
import pytest


def in_threads(count, call):
    """What `count` calls at once return or raise, in order."""
    results = [None] * count

    def run(number):
        try:
            results[number] = call(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_many_clients_get_their_own_answers(scripted):
    texts = [f"number {number} " + "x" * (number % 7) for number in range(16)]
    answers = in_threads(16, lambda number: scripted.chat(texts[number]))
    assert [answer.choices[0].message.content for answer in answers] == texts
    assert scripted.engine.seen_at_once == 4
    assert scripted.pool.texts == 0 and not scripted.pool.clients


def test_a_request_goes_to_the_engine_that_has_least_to_do(serve):
    server = serve(num_engines=3, step_secs=0.05)
    with server.openai() as client:
        streams = [
            client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": "!wait"}],
                max_tokens=tokens,
                stream=True,
            )
            for tokens in (100, 50, 10, 10, 20)
        ]
        engines = [worker.engine for worker in server.pool.workers]
        server.wait_until(lambda: sum(len(engine.requests) for engine in engines) == 5)
        loads = [sorted(r.max_new_tokens for r in engine.requests) for engine in engines]
        # 100, 50 and 10 go to one each; 10 joins 10, and so does 20.
        assert loads == [[100], [50], [10, 10, 20]]
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("limits", [{"max_queue": 3}, {"per_client": 5}])
def test_who_comes_when_the_queue_is_full_is_told_when_to_ask_again(serve, limits):
    server = serve(slots=2, step_secs=0.05, **limits)
    with server.openai() as client:
        asked = {"model": server.model, "messages": [{"role": "user", "content": "!wait"}]}
        streams = [client.chat.completions.create(**asked, stream=True) for _ in range(5)]
        for stream in (True, False):
            with pytest.raises(openai.RateLimitError) as error:
                client.chat.completions.create(**asked, stream=stream)
            assert int(error.value.response.headers["retry-after"]) >= 1
            assert error.value.code == "queue_full"
        for stream in streams:
            stream.close()
        server.wait_until(lambda: server.pool.texts == 0)
    assert server.chat("again").choices[0].message.content == "again"
    # What would never be taken is the client's mistake and not a matter of time.
    with pytest.raises(openai.BadRequestError):
        server.chat("again", n=6)


def test_a_client_that_leaves_takes_its_answers_along(serve):
    scripted = serve(step_secs=0.02)
    body = {"messages": [{"role": "user", "content": "!wait"}], "n": 2}
    with scripted.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            assert next(response.iter_lines())
        scripted.wait_until(lambda: sorted(scripted.engine.cancelled) == [1, 2])
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=0.3)
    scripted.wait_until(lambda: sorted(scripted.engine.cancelled) == [1, 2, 3, 4])
    scripted.wait_until(lambda: scripted.pool.texts == 0)


def test_a_stop_string_frees_the_slot(scripted):
    answer = scripted.chat("one two !wait", stop="..")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    scripted.wait_until(lambda: scripted.engine.cancelled == [1])


def test_what_takes_too_long_ends_and_the_next_one_is_answered(serve):
    server = serve(slots=2, step_secs=0.01, timeout_secs=0.3)
    errors = in_threads(8, lambda _: server.chat("!wait"))
    assert {error.status_code for error in errors} == {408}
    assert {error.response.headers["x-should-retry"] for error in errors} == {"false"}
    assert server.chat("short").choices[0].message.content == "short"
    assert len(server.engine.cancelled) == 8  # those that still waited too
    with server.openai() as client, pytest.raises(openai.APIError, match="longer"):
        asked = {"model": server.model, "messages": [{"role": "user", "content": "!wait"}]}
        for _ in client.chat.completions.create(**asked, stream=True):
            pass


def test_an_engine_that_fails_tells_everybody_and_health(serve, capfd):
    server = serve(step_secs=0.02)
    assert server.get("/health").status_code == 200

    def ask(number):
        if number == 2:
            server.wait_until(lambda: server.pool.texts == 2)
        return server.chat("!die" if number == 2 else "!wait")

    errors = in_threads(3, ask)
    assert {error.status_code for error in errors} == {500}
    assert "told to die" in capfd.readouterr().err
    assert server.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError) as error:
        server.chat("hello")
    assert error.value.status_code == 503
    assert "nanochat_up 0.0" in server.get("/metrics").text


def test_the_other_engine_goes_on(serve):
    server = serve(num_engines=2)
    with pytest.raises(openai.InternalServerError):
        server.chat("!die")
    assert [server.chat(text).choices[0].message.content for text in "ab"] == ["a", "b"]
    assert server.get("/health").status_code == 200
