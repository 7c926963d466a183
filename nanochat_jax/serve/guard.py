"""What stands before every route: who may ask, how much at once, and what each answer carries.

Pages of other sites reach a server on loopback through the user's browser: no CORS header is sent
unless asked for, and a name that was bound anew to 127.0.0.1 fails at the check of Host.
The log has method, path, status and time: no text, no key, no query.
"""

import asyncio
import base64
import hmac
import json
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.common import UserError
from nanochat_jax.serve.schema import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECS = 30.0  # in which a body has to arrive
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server. key: "" for everybody. hosts: names in Host, empty for any."""

    key: str = ""
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # sites whose pages may use it (CORS)
    max_body_bytes: int = 4 * 2**20


def error_response(error: ApiError) -> Response:
    # ASCII: what a client sent need not be writable as UTF-8.
    return Response(
        json.dumps(error.body), error.status, dict(error.headers or {}), "application/json"
    )


class Guard:
    """ASGI middleware. key: what Authorization must bear, "": nothing. hosts: what Host may say,
    empty: anything. open_paths: what is shown without a key. on_end: gets the scope, the status and
    the seconds of every request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str,
        hosts: Collection[str],
        max_body_bytes: int,
        open_paths: Collection[str],
        on_end: Callable[[Scope, int, float], object],
    ):
        self.app, self.key, self.hosts = app, key, hosts
        self.max_body_bytes, self.open_paths, self.on_end = max_body_bytes, open_paths, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # the client left before anything was sent

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                had = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(m for m in more if m[0] not in had)]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send_more)
        else:
            await self.app(scope, _replay(body, receive), send_more)
        finally:
            self.on_end(scope, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name not in self.hosts:
            raise ApiError(403, f"got Host {host!r:.200}, expected {', '.join(sorted(self.hosts))}")
        if not self.key or scope["path"] in self.open_paths:
            return
        scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
        expected = "bearer"
        if scope["path"].startswith("/report"):  # pages of their own: the browser asks for the key
            expected = "basic"
            key = _password(key)
        if scheme.lower() != expected.encode() or not hmac.compare_digest(key, self.key.encode()):
            raise ApiError(
                401,
                "expected the header Authorization: Bearer KEY with the key this server was given",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": f'{expected.title()} realm="the key of the server"'},
            )

    async def _read(self, receive: Receive) -> bytes:
        """The body. One that is too long is read on for a while: who still sends hears nothing."""
        body, total = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECS):
                while True:
                    message = await receive()
                    chunk = message.get("body", b"")  # none when the client has left
                    total += len(chunk)
                    if total <= self.max_body_bytes:
                        body += chunk
                    if not message.get("more_body") or total > 8 * self.max_body_bytes:
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {BODY_SECS:.0f} seconds") from None
        if total > self.max_body_bytes:
            raise ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes")
        return bytes(body)


def _password(basic: bytes) -> bytes:
    """What stands behind the user's name in HTTP's basic authentication; empty if malformed."""
    try:
        return base64.b64decode(basic, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that yields the body once, then whatever comes: that the client has left."""
    waiting = [body]

    async def receive_again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receive_again


def open_socket(host: str, port: int) -> socket.socket:
    """Bound, not listening yet: so that a port that is taken is told before the model is loaded."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        what = f"--host={host} --port={port} cannot be listened at"
        raise UserError(f"{what} ({error}); is it this machine's, and free?") from None
    return sock


def access_of(host: str, key: str, allow_public: bool, origins: Sequence[str] = ()) -> Access:
    """Who may use a server that listens at `host`. UserError for a public one without a key."""
    if host in LOOPBACK:
        return Access(key, ("127.0.0.1", "localhost", "[::1]"), tuple(origins))
    if not (key or allow_public):
        raise UserError(
            f"--host={host} can be reached from other machines, and everybody there could use it; "
            "set a key with --api-key or $NANOCHAT_API_KEY, or say --allow-public"
        )
    return Access(key, (), tuple(origins))


def address(sock: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
