"""Who gets in, how much of one, and how the server ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.serve.guard import Access, access_of, open_socket

ROOT = Path(__file__).parents[2]
BODY = {"messages": [{"role": "user", "content": "hello"}]}
HOSTS = ("127.0.0.1", "localhost")


def test_a_key_opens_all_but_health_and_the_page(serve):
    server = serve(access=Access("s3cret", HOSTS))
    assert server.get("/health").status_code == 200
    for path in ("/v1/models", "/tokenizer_info", "/metrics", "/openapi.json", "/nothing"):
        assert server.get(path).status_code == 401
    wrong = ["", "s3cret", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "Bearer é"]
    for value in wrong:
        with server.http() as http:
            headers = {"authorization": value.encode()}
            answer = http.post("/v1/chat/completions", json=BODY, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    server.key = "s3cret"
    assert server.chat("hello").choices[0].message.content == "hello"


def test_the_browser_asks_for_the_key_of_the_report(serve):
    server = serve(access=Access("s3:cret", HOSTS))
    asked = server.get("/report/x")
    assert asked.status_code == 401 and asked.headers["www-authenticate"].startswith("Basic ")
    for auth, status in ((("me", "s3:cret"), 404), (("s3:cret", ""), 401), (("me", "s3"), 401)):
        assert server.get("/report/x", auth=auth).status_code == status
        assert server.get("/v1/models", auth=auth).status_code == 401
    assert server.get("/report/x", headers={"authorization": "Basic ~~"}).status_code == 401


def test_a_host_that_is_bound_anew_is_refused(scripted):
    port = scripted.url.rsplit(":", 1)[1]
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", "", "[::2]"):
        assert scripted.get("/v1/models", headers={"host": host}).status_code == 403
    assert scripted.get("/v1/models", headers={"host": "127.0.0.1:1"}).status_code == 200


def test_other_sites_pages_get_nothing_unless_told(serve):
    origin = {"origin": "http://other.example"}
    asks = {**origin, "access-control-request-method": "POST"}
    closed, opened = serve(), serve(access=Access(origins=("http://other.example",)))
    for server, allowed in ((closed, None), (opened, "http://other.example")):
        with server.http() as http:
            answers = [
                http.get("/v1/models", headers=origin),
                http.options("/v1/chat/completions", headers=asks),
            ]
        seen = [answer.headers.get("access-control-allow-origin") for answer in answers]
        assert seen == [allowed, allowed]
    # A form of another site can post text without asking first: it is no JSON.
    with closed.http() as http:
        body = '{"messages": [{"role": "user", "content": "x"}]}'
        plain = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "text/plain"}
        )
    assert plain.status_code == 400 and not closed.engine.requests


def test_every_answer_forbids_what_the_page_does_not_need(scripted):
    for path in ("/health", "/v1/models", "/nothing"):
        headers = scripted.get(path).headers
        policy = headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= {*policy}
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_a_body_that_is_too_large_is_413(serve):
    server = serve(access=Access(max_body_bytes=10_000))
    body = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 413 and answer.json()["error"]["message"]

    def chunks():  # no content-length
        for _ in range(20):
            yield b"x" * 1000

    with server.http() as http:
        assert http.post("/v1/chat/completions", content=chunks()).status_code == 413
    assert server.chat("hello").choices[0].message.content == "hello"


def test_too_many_characters_are_400_before_they_are_tokenized(serve):
    server = serve(access=Access(max_body_bytes=10**7))
    text = "x" * 1_000_001
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": [text]}),
        ("/tokenize", {"prompt": text}),
    ):
        assert server.post(path, body).status_code == 400


def test_logs_have_no_text_and_no_key(serve, capfd):
    server = serve(access=Access("s3cret", HOSTS))
    server.key = "s3cret"
    capfd.readouterr()
    server.chat("words of mine")
    server.post("/v1/completions?words=mine", {"prompt": "words of mine"})
    server.get("/v1/words%0Aof%0Amine")
    out = err = ""
    while len(out.splitlines()) < 3:  # the last line may come after its answer
        more = capfd.readouterr()
        out, err = out + more.out, err + more.err
    assert "/v1/chat/completions' 200" in out and not err
    assert "s3cret" not in out and "of mine" not in out and "words=" not in out
    assert all(line.startswith(("POST ", "GET ")) for line in out.splitlines())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", ""])
def test_a_public_host_wants_a_key(host):
    with pytest.raises(UserError, match="api-key"):
        access_of(host, "", False, [])
    assert access_of(host, "k", False, []).hosts == ()
    assert access_of(host, "", True, []).key == ""
    assert "localhost" in access_of("127.0.0.1", "", False, []).hosts


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match="--port"):
            open_socket("127.0.0.1", taken.getsockname()[1])


SERVER = """
import sys
sys.path[:0] = {paths!r}
from conftest import Scripted
from nanochat_jax.serve.api import Served
from nanochat_jax.serve.guard import Access, open_socket
from nanochat_jax.serve.server import make_app, serve
from nanochat_jax.serve.worker import Pool
from nanochat_jax.tokenizer import bpe
tokenizer = bpe.train(iter(["some text"]), 265)
pool = Pool([Scripted(tokenizer, step_secs=0.02)], max_queue=4, per_client=4, timeout_secs=60)
app = make_app(pool, tokenizer, Served("test", "sft", 7, 160, 265, ("none",)), Access())
sock = open_socket("127.0.0.1", 0)
print("port", sock.getsockname()[1], flush=True)
serve(app, pool, sock, "listening")
"""


@pytest.fixture
def process():
    code = SERVER.format(paths=[str(ROOT), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as started:
        assert started.stdout
        port = int(re.findall(r"port (\d+)", started.stdout.readline())[0])
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield started, f"http://127.0.0.1:{port}"
        started.kill()


def begin(url):
    """Start a long answer in a thread; returns the thread, its events and what happened to it."""
    events, failed, body = [], [], BODY | {"stream": True}
    body = body | {"messages": [{"role": "user", "content": "!wait"}], "max_tokens": 60}

    def read():
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                events.extend(line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.5)
    return thread, events, failed


@pytest.mark.slow
def test_sigterm_finishes_what_is_being_written_and_takes_nothing_new(process):
    started, url = process
    thread, events, failed = begin(url)
    started.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    refused = httpx.post(f"{url}/v1/chat/completions", json=BODY)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert httpx.get(f"{url}/health").status_code == 503
    thread.join()
    assert started.wait(10) == 0
    assert not failed and events[-1] == "data: [DONE]" and '"finish_reason":"length"' in events[-2]


@pytest.mark.slow
def test_a_second_signal_ends_at_once(process):
    started, url = process
    thread, events, _ = begin(url)
    for _ in range(2):
        started.send_signal(signal.SIGTERM)
        time.sleep(0.15)
    assert started.wait(3) == 1
    thread.join()
    assert "data: [DONE]" not in events
