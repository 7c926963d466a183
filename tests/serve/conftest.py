"""A server on loopback, over an engine that says what it is told to, or over a tiny random model.

chat(scripted, "some words")     the answer is "some words", a byte a token
"~" parts words: a special token's name alone between two of them is that token
!wait    writes "." until it is cancelled        !fail    its text ends with an error
!die     the engine raises
"""

import contextlib
import re
import threading
import time
from dataclasses import dataclass

import httpx
import jax
import openai
import pytest

from nanochat_jax.inference.checkpoint import make_engine
from nanochat_jax.inference.request import Completion, Request
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.serve.api import Served
from nanochat_jax.serve.guard import Access, open_socket
from nanochat_jax.serve.server import Server, make_app
from nanochat_jax.serve.worker import Pool

MAX_LEN = 160


class Scripted:
    """An engine without a model. `piece`: tokens in each of its pieces."""

    def __init__(self, tokenizer, slots=4, max_len=MAX_LEN, piece=1, step_secs=0.001):
        self.tokenizer, self.slots, self.max_len = tokenizer, slots, max_len
        self.piece, self.step_secs = piece, step_secs
        self.requests: list[Request] = []
        self.seen_at_once = 0
        self.cancelled: list[int] = []  # ids that were cancelled before they ended
        self._waiting: list[int] = []
        self._left: dict[int, list[int]] = {}  # what is still to be said, by id
        self._said: dict[int, int] = {}
        self._ended: list[Completion] = []

    def submit(self, request):
        self.requests.append(request)
        id = len(self.requests)
        said = self.tokenizer.decode(request.prompt)
        text = re.split(r"<\|user_start\|>|<\|bos\|>", said)[-1]
        text = text.replace("<|user_end|><|assistant_start|>", "")
        self._left[id], self._said[id] = self._ids(text), 0
        self._waiting.append(id)
        return id

    def _ids(self, text):
        if text.endswith("!wait"):
            return [self.tokenizer.ranks[b"."]] * 10_000
        ids = []
        for word in text.split("~"):
            special = self.tokenizer.special.get(word)
            ranks = [self.tokenizer.ranks[bytes([byte])] for byte in word.encode()]
            ids += ranks if special is None else [special]
        return [*ids, self.tokenizer.special_id("<|assistant_end|>")]

    def prompt(self, index=-1):
        return self.tokenizer.decode(self.requests[index].prompt)

    def cancel(self, id):
        if id in self._left:
            self._end(id)
            self.cancelled.append(id)
            self._ended.append(Completion(finish="cancelled", id=id))

    def busy(self):
        return bool(self._left or self._ended)

    def _end(self, id):
        del self._left[id]
        self._waiting = [other for other in self._waiting if other != id]

    def step(self):
        time.sleep(self.step_secs)
        pieces, self._ended = self._ended, []
        writing = [id for id in self._left if id not in self._waiting]
        while self._waiting and len(writing) < self.slots:
            writing.append(self._waiting.pop(0))
        self.seen_at_once = max(self.seen_at_once, len(writing))
        for id in writing:
            request = self.requests[id - 1]
            text = self.prompt(id - 1)
            if "!die" in text:
                raise RuntimeError("told to die")
            room = min(request.max_new_tokens, self.max_len - len(request.prompt)) - self._said[id]
            new, left = self._left[id][: min(room, self.piece)], self._left[id][self.piece :]
            self._left[id] = left
            self._said[id] += len(new)
            finish = ""
            if not left and new[-1] == self.tokenizer.special_id("<|assistant_end|>"):
                finish = "stop"
            elif len(new) == room:
                full = self._said[id] < request.max_new_tokens
                finish = "context" if full else "length"
            if "!fail" in text:
                finish = "error"
            if finish:
                self._end(id)
            logprobs = [-float(self._said[id])] * len(new)
            pieces.append(Completion(new, logprobs, [True] * len(new), finish, id))
        return pieces


@dataclass
class Running:
    """A server that listens, and ways to talk to it."""

    url: str
    engine: object
    pool: Pool
    model: str
    key: str = "none"

    def http(self):
        return httpx.Client(base_url=self.url, timeout=60)

    def post(self, path, body, **more):
        with self.http() as http:
            return http.post(path, json=body, **more)

    def get(self, path, **more):
        with self.http() as http:
            return http.get(path, **more)

    def openai(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def chat(self, text, **fields):
        """The answer, or all chunks of a stream."""
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        with self.openai() as client:
            asked = {"model": self.model, "messages": messages} | fields
            answer = client.chat.completions.create(**asked)
            return list(answer) if fields.get("stream") else answer

    def wait_until(self, condition, secs=10):
        end = time.monotonic() + secs
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(engines, tokenizer, *, stage="sft", access=None, tools=("none",), **limits):
    pool = Pool(engines, **{"max_queue": 16, "per_client": 16, "timeout_secs": 60} | limits)
    vocab = tokenizer.vocab_size
    served = Served("test", stage, 7, engines[0].max_len, vocab, tools)
    app = make_app(pool, tokenizer, served, access or Access(hosts=("127.0.0.1",)))
    with listening(app, pool, open_socket("127.0.0.1", 0)) as url:
        yield Running(url, engines[0], pool, served.id)


@contextlib.contextmanager
def listening(app, pool, sock):
    """Run a server in a thread; its address."""
    server = Server(app, pool, "listening")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
    assert not any(worker.thread.is_alive() for worker in pool.workers)


@pytest.fixture
def serve(tiny_tokenizer):
    """serve(**settings of Scripted and serving) -> Running; several in one test are possible."""
    with contextlib.ExitStack() as stack:

        def start(slots=4, piece=1, step_secs=0.001, num_engines=1, **settings):
            engines = [
                Scripted(tiny_tokenizer, slots, piece=piece, step_secs=step_secs)
                for _ in range(num_engines)
            ]
            return stack.enter_context(serving(engines, tiny_tokenizer, **settings))

        yield start


@pytest.fixture
def scripted(serve):
    return serve()


@pytest.fixture(scope="session")
def scripted_once(tiny_tokenizer):
    with serving([Scripted(tiny_tokenizer, step_secs=0)], tiny_tokenizer) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer, random_params):
    """(config, mesh, params) with the tokenizer's vocabulary."""
    config = GPTConfig(tiny_tokenizer.vocab_size, 2, 32, 4, 2, MAX_LEN)
    return config, make_mesh(data=1, tensor=1, devices=jax.devices()[:1]), random_params(config)


@pytest.fixture(scope="session")
def real(tiny_model, tiny_tokenizer):
    """A server over a model of random numbers."""
    config, mesh, params = tiny_model
    engine = make_engine(config, mesh, tiny_tokenizer, slots=8, max_len=MAX_LEN)
    engine.load(params)
    with serving([engine], tiny_tokenizer, tools=("calculator", "none")) as running:
        yield running
