"""The two kinds of completions of OpenAI's API, streamed and whole.

A body (schema.py) -> requests -> the pool's ticket (worker.py) -> pieces -> answers.py -> JSON.
Whoever leaves takes the answer along: its texts are cancelled.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Scope

from nanochat_jax.common import log
from nanochat_jax.inference.request import Completion
from nanochat_jax.serve import schema
from nanochat_jax.serve.answers import FINISH, Answer, Delta, Envelope, add_part, echo, usage
from nanochat_jax.serve.schema import ApiError, ChatBody, CompletionBody
from nanochat_jax.serve.worker import RETRY_SECS, Pool, Refused, Ticket
from nanochat_jax.tokenizer.bpe import Tokenizer

KEEP_ALIVE_SECS = 10.0  # between comments to a client that waits
UNLOGGED = ("/health", "/metrics", "/render")  # asked all the time


@dataclass(frozen=True)
class Served:
    """What this server has: one stage of one run."""

    run: str
    stage: str
    step: int
    max_len: int  # tokens of prompt and answer together
    vocab_size: int  # of the model
    tools: tuple[str, ...]  # which a chat may ask for, the one it gets unasked first

    @property
    def id(self) -> str:
        return f"{self.run}-{self.stage}"

    @property
    def chat(self) -> bool:
        return self.stage != "base"

    def card(self, created: int) -> dict[str, Any]:
        """OpenAI's form; what the page shows stands beside it."""
        card = {"id": self.id, "object": "model", "created": created, "owned_by": "nanochat-jax"}
        more = {"stage": self.stage, "step": self.step, "context": self.max_len}
        return card | more | {"tools": [*self.tools], "chat": self.chat}


class Meter:
    """What /metrics shows."""

    def __init__(self, pool: Pool):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "nanochat"}
        self.requests = Counter("requests", "Requests that ended.", ["path", "status"], **own)
        self.tokens = Counter("tokens", "Tokens of prompts and of answers.", ["kind"], **own)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        times = {"buckets": buckets, **own}
        self.first = Histogram("first_token_seconds", "From a request to its first text.", **times)
        self.seconds = Histogram("request_seconds", "From a request to its end.", **times)
        gauge = Gauge("texts", "Answers being written or waiting.", **own)
        gauge.set_function(lambda: pool.texts)
        Gauge("slots", "Answers written at once.", **own).set_function(lambda: pool.slots)
        Gauge("up", "1: requests are taken.", **own).set_function(lambda: pool.health() == "ok")

    def on_end(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "")
        self.requests.labels(path, status).inc()
        self.seconds.observe(seconds)
        if path in UNLOGGED and status == 200:
            return
        shown = scope["path"].encode("ascii", "backslashreplace").decode()[:200]
        log(f"{scope['method']} {shown!r} {status} {seconds:.3f} s")


class Api:
    """The two kinds of completions, streamed and whole."""

    def __init__(self, pool: Pool, tokenizer: Tokenizer, served: Served, meter: Meter):
        self.pool, self.tokenizer, self.served, self.meter = pool, tokenizer, served, meter

    async def complete(self, body: ChatBody | CompletionBody, http: Request) -> Response:
        schema.check_fields(body, self.served.id)
        if isinstance(body, ChatBody) and not self.served.chat:
            raise ApiError(
                400,
                f"{self.served.id} is a base model: it continues text and holds no conversation; "
                "use /v1/completions, or serve another --stage",
                param="model",
                code="model_not_supported",
            )
        prompts = await asyncio.to_thread(self._encode, body)
        ids = [ids for ids, _ in prompts]
        served = self.served
        requests = schema.to_requests(body, ids, served.tools, served.max_len, served.vocab_size)
        if len(requests) > self.pool.most_texts:
            got = f"the request asks for {len(requests)} answers"
            raise ApiError(400, f"{got}, expected at most {self.pool.most_texts}", param="n")
        client = http.client.host if http.client else ""
        try:
            ticket = self.pool.submit(requests, client)
        except Refused as error:
            raise _refusal(error) from None
        self.meter.tokens.labels("prompt").inc(sum(map(len, ids)))
        writing = Writing(self, body, prompts, ticket)
        if body.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(writing.stream(), 200, headers, "text/event-stream")
        return Response(await writing.whole(http), media_type="application/json")

    def _encode(self, body: ChatBody | CompletionBody) -> list[tuple[list[int], int]]:
        """(ids, how many of them are not the client's) of each prompt."""
        if isinstance(body, ChatBody):
            contents = [message.content for message in body.messages]
            parts = [c if isinstance(c, str) else "".join(p.text for p in c) for c in contents]
            schema.check_chars(parts)
            return [(schema.chat_prompt(self.tokenizer, body.messages), 0)]
        schema.check_chars([prompt for prompt in body.prompts if isinstance(prompt, str)])
        bos = body.add_special_tokens is not False
        return [schema.text_prompt(self.tokenizer, prompt, bos) for prompt in body.prompts]


class Writing:
    """One body being answered."""

    def __init__(self, api: Api, body: ChatBody | CompletionBody, prompts, ticket: Ticket):
        self.body, self.ticket, self.meter = body, ticket, api.meter
        self.tokenizer, self.prompts = api.tokenizer, prompts
        chat = isinstance(body, ChatBody)
        logprobs = bool(body.logprobs) if chat else body.logprobs is not None
        self.envelope = Envelope(api.served.id, api.tokenizer, chat=chat, logprobs=logprobs)
        self.answers = [
            Answer(api.tokenizer, body.stops, chat=chat, scored=logprobs) for _ in ticket.jobs
        ]
        self.echoed: set[int] = set()  # texts whose prompt is out
        self.num_prompt = sum(len(ids) for ids, _ in prompts)

    def usage(self) -> dict[str, int]:
        return usage(self.num_prompt, self.answers)

    async def deltas(self, keep_alive: float | None = None) -> AsyncIterator[tuple[int, Delta]]:
        """(index, Delta) of all texts until each has ended; index -1 after `keep_alive` seconds
        without any. ApiError when one cannot be ended well."""
        open, began = len(self.answers), asyncio.get_running_loop().time()
        while open:
            piece = await self.ticket.next(keep_alive)
            if piece is None:
                yield -1, Delta("", [], [], "")
                continue
            index, completion = piece
            answer = self.answers[index]
            if answer.finish:
                continue  # what was written behind a stop string
            if not answer.num_tokens:
                self.meter.first.observe(asyncio.get_running_loop().time() - began)
            before = answer.num_tokens
            delta = answer.feed(completion)
            self.meter.tokens.labels("answer").inc(answer.num_tokens - before)
            if delta.finish and delta.finish not in FINISH:
                raise _failure(delta.finish, completion.reason)
            if delta.finish:
                open -= 1
                if not completion.finish:
                    self.ticket.cancel(index)
            if isinstance(self.body, CompletionBody) and self.body.echo:
                delta = self._echo(index, delta, completion)
            yield index, delta

    def _echo(self, index: int, delta: Delta, piece: Completion) -> Delta:
        """With the prompt before the answer's first piece; alone, where no token was asked for."""
        answer = self.answers[index]
        if self.body.max_tokens == 0:
            delta, answer.num_tokens = Delta("", [], [], delta.finish), 0
        if index in self.echoed:
            return delta
        self.echoed.add(index)
        ids, added = self.prompts[index // (self.body.n or 1)]
        text, scores = echo(self.tokenizer, ids, added, piece.prompt)
        answer.offset = len(text)
        later = [score._replace(start=score.start + len(text)) for score in delta.scores]
        return Delta(text + delta.text, delta.parts, scores + later, delta.finish)

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        started: set[int] = set()
        counted = bool(self.body.stream_options and self.body.stream_options.include_usage)
        no_usage = {"usage": None} if counted else {}
        try:
            async for index, delta in self.deltas(KEEP_ALIVE_SECS):
                if index < 0:
                    yield ": waiting\n\n"
                    continue
                first = index not in started
                if not (first or any(delta)):
                    continue
                started.add(index)
                choice = self.envelope.choice(index, delta, chunk=True, first=first)
                yield _event(self.envelope.wrap([choice], chunk=True, **no_usage))
            if counted:
                yield _event(self.envelope.wrap([], chunk=True, usage=self.usage()))
        except ApiError as error:
            yield _event(error.body)
        finally:  # also when the client leaves
            self.ticket.cancel()
        yield "data: [DONE]\n\n"

    async def whole(self, http: Request) -> str:
        """The answer as one JSON object; no longer written once the client has left."""
        seen: list[list[Delta]] = [[] for _ in self.answers]
        left = asyncio.create_task(_until_left(http))
        left.add_done_callback(lambda _: self.ticket.cancel())
        try:
            async for index, delta in self.deltas():
                seen[index].append(delta)
        finally:
            left.cancel()
            self.ticket.cancel()
        return await asyncio.to_thread(self._join, seen)  # scores of long prompts take a while

    def _join(self, seen: list[list[Delta]]) -> str:
        choices = []
        for index, deltas in enumerate(seen):
            text = "".join(delta.text for delta in deltas)
            parts: list[dict[str, Any]] = []
            for part in (part for delta in deltas for part in delta.parts):
                add_part(parts, part)
            parts = [{"type": part["type"], "text": part["text"]} for part in parts]
            scores = [score for delta in deltas for score in delta.scores]
            one = Delta(text, parts, scores, deltas[-1].finish)
            choices.append(self.envelope.choice(index, one, chunk=False, first=True))
        return _json(self.envelope.wrap(choices, chunk=False, usage=self.usage()))


async def _until_left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _event(value: Any) -> str:
    return f"data: {_json(value)}\n\n"


def _refusal(error: Refused) -> ApiError:
    busy = error.why == "busy"
    return ApiError(
        429 if busy else 503,
        str(error),
        kind="rate_limit_error" if busy else "server_error",
        code="queue_full" if busy else error.why,
        headers={"retry-after": str(RETRY_SECS)},
    )


def _failure(finish: str, reason: str) -> ApiError:
    if finish == "timeout":  # the client's library need not ask again by itself
        no_retry = {"x-should-retry": "false"}
        words = "the answer took longer than this server allows (--timeout-secs)"
        return ApiError(408, words, kind="timeout_error", code="timeout", headers=no_retry)
    if finish == "cancelled":
        return ApiError(499, "the client has left", code="cancelled")
    return ApiError(500, f"the answer failed: {reason}", kind="server_error", code="engine_error")
