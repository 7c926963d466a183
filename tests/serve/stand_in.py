"""A server of the chat page whose answers are written down here, in place of a model's."""

import asyncio
import json
import threading
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from nanochat_jax.serve import guard, markdown

FOLDER = Path(markdown.__file__).parent / "page"
CARD = {"id": "demo-rl", "stage": "rl", "step": 20, "chat": True, "context": 256}
CARD |= {"tools": ["calculator", "none"]}
HOSTILE = {
    "script": "<script>window.hacked = 1</script> after",
    "onerror": "<img src=x onerror='window.hacked = 1'> ![a](x onerror=alert(1)) after",
    "javascript": "[a](javascript:window.hacked=1) <a href='javascript:window.hacked=1'>b</a> "
    "[c](JaVaScRiPt&colon;window.hacked=1) [d](data:text/html,<script>x</script>) after",
    "svg": "<svg onload='window.hacked=1'><script>window.hacked=1</script></svg> after",
    "nested": "```html\n<script>window.hacked=1</script>\n```\n> - ```\n> <img src=x "
    "onerror=window.hacked=1>\n\n| <script>window.hacked=1</script> |\n|:-:|\n| `</code><b>` |\n\n"
    "[x]: javascript:window.hacked=1\n[x] <style>body{display:none}</style> after",
    "deep": ">" * 3000 + "- " * 3000 + "*_" * 3000 + "[" * 3000 + "\n\nafter",
    "backticks": "`" * 100_000 + " after",
}


class StandIn:
    """A server that answers by the last message's first word, and can be killed and started."""

    def __init__(self, port: int = 0):
        self.bodies, self.full, self.left, self.key, self.card = [], 0, 0, "", CARD
        self.app = FastAPI()
        self.app.middleware("http")(self._guard)
        self.app.get("/health")(lambda: {})
        self.app.get("/v1/models")(lambda: {"object": "list", "data": [self.card]})
        self.app.post("/tokenize")(self._tokenize)
        self.app.post("/render")(self._render)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.post("/v1/completions")(self._complete)
        self.app.mount("/", StaticFiles(directory=FOLDER, html=True))
        self.port = port
        self.start()

    def start(self):
        config = uvicorn.Config(
            self.app, port=self.port, log_level="error", ws="none", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def kill(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    async def _guard(self, request: Request, call_next):
        wanted = f"Bearer {self.key}"
        if (
            "/v1/" in request.url.path
            and self.key
            and request.headers.get("Authorization") != wanted
        ):
            return refusal(401, "a key is needed")
        response = await call_next(request)
        response.headers.update(guard.HEADERS)
        return response

    async def _tokenize(self, request: Request):
        return {"count": len((await request.json())["prompt"].split())}

    async def _render(self, request: Request):
        return {"html": markdown.render((await request.json())["text"])}

    async def _chat(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        said = body["messages"][-1]["content"]
        asked = said if isinstance(said, str) else "".join(part["text"] for part in said)
        word = asked.split()[0]
        if self.full and word == "full":
            self.full -= 1
            return refusal(429, "the queue is full", headers={"Retry-After": "2"})
        if word == "long":
            return refusal(400, "too long", code="context_length_exceeded")
        return StreamingResponse(self._events(word, asked), media_type="text/event-stream")

    async def _events(self, word: str, asked: str):
        number, finish = len(self.bodies), "stop"
        parts = [{"type": "text", "text": f"Answer {number} to "}, {"type": "text", "text": asked}]
        if word == "slow":
            parts = [{"type": "text", "text": f"word{i} "} for i in range(200)]
        elif word == "sum":
            parts = [{"type": "python", "text": "12+30"}, {"type": "python_output", "text": "42"}]
            parts = [{"type": "text", "text": "It is "}, *parts, {"type": "text", "text": "42."}]
        elif word == "impossible":
            parts = [{"type": "python", "text": "1/0"}, {"type": "text", "text": "I cannot."}]
        elif word == "cut":
            finish = "length"
        elif word == "word":
            parts = parts[:1]
        elif word in HOSTILE:
            parts = [{"type": "text", "text": piece} for piece in split(HOSTILE[word])]
        elif word == "markdown":
            parts = [{"type": "text", "text": MARKDOWN}]
        yield ": waiting\n\n"
        for at, part in enumerate(parts):
            delta = {"parts": [part], "content": part["text"] if part["type"] == "text" else ""}
            yield event({"choices": [{"delta": delta, "finish_reason": None}]})
            if word == "broken" and at:
                yield event({"error": {"message": "row 3 broke", "code": None}})
                return
            try:
                await asyncio.sleep(0.05 if word == "slow" else 0)
            except (asyncio.CancelledError, GeneratorExit):
                self.left += 1
                raise
        yield event({"choices": [{"delta": {}, "finish_reason": finish}]})
        yield event({"choices": [], "usage": {"completion_tokens": 7}})
        yield "data: [DONE]\n\n"

    async def _complete(self, request: Request):
        self.bodies.append(await request.json())

        async def events():
            yield event({"choices": [{"text": " there was", "finish_reason": "length"}]})
            yield event({"choices": [], "usage": {"completion_tokens": 2}})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


MARKDOWN = (
    "# Title\n\nSome **bold** text, `code` and a [link](https://example.org).\n\n- one\n- two\n\n"
    "1. first\n2. second\n\n> A quote.\n\n```python\ndef double(x):  # twice as much\n"
    '    """Twice."""\n    return 2 * x + 0\n```\n\n| letter | count |\n|---|---|\n'
    "| a | 3 |\n| n | 2 |\n"
)


def event(value):
    return f"data: {json.dumps(value)}\n\n"


def refusal(status, message, code=None, **kwargs):
    return JSONResponse({"error": {"message": message, "code": code}}, status, **kwargs)


def split(text, size=5000):
    return [text[at : at + size] for at in range(0, len(text), size)]
