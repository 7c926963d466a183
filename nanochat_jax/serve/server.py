"""The server: OpenAI's API, health and metrics, and the page, over a pool of engines.

  POST /v1/chat/completions  /v1/completions  /tokenize  /detokenize  /render
  GET  /  /v1/models  /tokenizer_info  /health  /metrics  /openapi.json

Before the routes stands guard.py. One process, one event loop; text is tokenized and rendered in
threads, and each engine has its own.
"""

import asyncio
import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat_jax.common import log
from nanochat_jax.serve import markdown, schema
from nanochat_jax.serve.api import Api, Meter, Served
from nanochat_jax.serve.guard import Access, Guard, error_response
from nanochat_jax.serve.schema import ApiError, ChatBody, CompletionBody
from nanochat_jax.serve.worker import Pool
from nanochat_jax.tokenizer.bpe import Tokenizer

PAGE = Path(__file__).parent / "page"
PAGE_SUFFIXES = (".html", ".css", ".js", ".svg")
FLUSH_SECS = 10  # at the end, for clients to fetch what is written
IDLE_SECS = 60  # after which a connection closes; clients ask several times over one


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def make_app(
    pool: Pool, tokenizer: Tokenizer, served: Served, access: Access, created: int = 0
) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_):
        pool.start()
        with renderer:
            yield
            await pool.close()

    renderer = ThreadPoolExecutor(1, "render")  # of its own: Markdown holds up nothing else

    app = FastAPI(
        title="nanochat-jax",
        lifespan=lifespan,
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    meter = Meter(pool)
    api = Api(pool, tokenizer, served, meter)
    open_paths = {"/health"}
    for file in sorted(file for file in PAGE.glob("*.*") if file.suffix in PAGE_SUFFIXES):
        path = "/" if file.name == "index.html" else f"/{file.name}"
        open_paths.add(path)
        _serve_file(app, path, file)

    streamed: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=streamed)
    async def chat_completions(body: ChatBody, http: Request):
        return await api.complete(body, http)

    @app.post("/v1/completions", responses=streamed)
    async def completions(body: CompletionBody, http: Request):
        return await api.complete(body, http)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [served.card(created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        schema.check_fields(schema.Sampling(model=name), served.id)
        return served.card(created)

    @app.post("/tokenize")
    async def tokenize(body: schema.TokenizeBody):
        schema.check_chars([body.prompt])
        if body.prompt in tokenizer.special:  # alone: how clients ask for the id of a special token
            ids = [tokenizer.special_id(body.prompt)]
        else:
            bos = bool(body.add_special_tokens)
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt, bos=bos)
        return {"tokens": ids, "count": len(ids), "max_model_len": served.max_len}

    @app.post("/detokenize")
    async def detokenize(body: schema.DetokenizeBody):
        return {"prompt": tokenizer.decode([id for id in body.tokens if id < tokenizer.vocab_size])}

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        ends = "<|assistant_end|>" if served.chat else "<|bos|>"
        names = {"bos_token": "<|bos|>", "eos_token": ends, "pad_token": "<|bos|>"}
        return names | {"tokenizer_class": "nanochat-jax", "vocab_size": tokenizer.vocab_size}

    @app.post("/render")
    async def render(body: schema.RenderBody):
        schema.check_chars([body.text])
        loop = asyncio.get_running_loop()
        return {"html": await loop.run_in_executor(renderer, markdown.render, body.text)}

    @app.get("/health")
    async def health():
        if (state := pool.health()) != "ok":
            raise ApiError(503, f"the server is {state}", kind="server_error", code=state)
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        return generate_latest(meter.registry).decode()

    @app.exception_handler(ApiError)
    async def told(_, error: ApiError):
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def wrong(http: Request, error: RequestValidationError):
        if "json" not in (kind := http.headers.get("content-type", "")):
            what = f"got a body of Content-Type {kind!r:.100}, expected application/json"
            return error_response(ApiError(400, what))
        return error_response(schema.first_mistake(error.errors()))

    @app.exception_handler(HTTPException)
    async def elsewhere(http: Request, error: HTTPException):
        message = f"{http.method} {http.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def ours(_, error: Exception):  # it is logged with its traceback
        what = f"the server failed ({type(error).__name__}); its log says more"
        return error_response(ApiError(500, what, kind="server_error"))

    app.add_middleware(
        Guard,
        key=access.key,
        hosts=access.hosts,
        max_body_bytes=access.max_body_bytes,
        open_paths=open_paths,
        on_end=meter.on_end,
    )
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _serve_file(app: FastAPI, path: str, file: Path) -> None:
    @app.get(path, include_in_schema=False)
    async def send():
        return FileResponse(file, headers={"cache-control": "no-cache"})


class Server(uvicorn.Server):
    """uvicorn that finishes the answers when it is asked to end, and ends when asked again."""

    def __init__(self, app: FastAPI, pool: Pool, greeting: str = ""):
        config = uvicorn.Config(
            app,
            log_config=None,  # what it says goes where all logs go
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECS,
            timeout_graceful_shutdown=FLUSH_SECS,
        )
        super().__init__(config)
        self.pool, self.greeting, self.asked = pool, greeting, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log(self.greeting)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.asked += 1
        self.pool.draining = True
        if self.asked > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self.asked == 1 and not self.pool.texts:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(app: FastAPI, pool: Pool, sock: socket.socket, greeting: str) -> None:
    """Until SIGTERM or Ctrl-C: then answers are finished, or cut off at a second one.

    greeting: a line for the log, once clients are heard.
    """
    server = Server(app, pool, greeting)
    server.run(sockets=[sock])
    if server.force_exit:
        os._exit(1)  # threads of engines may be in the middle of a step
