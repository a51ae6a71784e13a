"""The server's addresses, what it checks before a request counts, and how a client may leave.

    GET  /  /health  /v1/models  /v1/models/NAME          all but the page also without /v1
    POST /v1/chat/completions  /v1/completions
"""

import asyncio
import contextlib
import hmac
import json
import sys
import traceback
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from minids.serve.asked import read_asked
from minids.serve.errors import Refused
from minids.serve.replies import Reply, told
from minids.serve.served import Served

PAGE = Path(__file__).with_name("page.html")
LOCAL = ("127.0.0.1", "localhost", "::1")
DRAINED = 2 ** 28  # bytes of a body that is too large, which are read before it is refused
# The page loads nothing from anywhere, and no other page may show it in a frame.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cache-control": "no-cache"}


@dataclass(frozen=True)
class Limits:
    """Limits on clients.

    local: whether the server is bound to this machine alone, and the Host header is checked
    key: that requests must bring; "" for none; cors: origins of other pages that may ask
    body: bytes of a request; seconds: of a reply; slow: seconds in which a client must take a chunk
    """

    local: bool = True
    key: str = ""
    cors: tuple[str, ...] = ()
    body: int = 1 << 20
    seconds: float = 600
    slow: float = 60


class Guard:
    """Refuses requests by their Host header and their key, before anything else.

    A page of another site can make its own name point to this machine (DNS rebinding): its requests
    come from the user's browser, and only the Host header tells.
    """

    def __init__(self, app, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            try:
                self.check(Request(scope))
            except Refused as refused:
                return await error_response(refused)(scope, receive, send)
        await self.app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Raise `Refused` for a request that may not come in."""
        host = request.headers.get("host", "").rsplit("@")[-1]
        name = host[1:].partition("]")[0] if host[:1] == "[" else host.partition(":")[0]
        if self.limits.local and name.lower() not in LOCAL:
            raise Refused(403, f"the Host header {host!r:.80} is not this machine's", code="host")
        if self.limits.key and request.url.path not in ("/", "/health") and (
                request.method != "OPTIONS"):
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.limits.key.encode())
            if not right or scheme.lower() != "bearer":
                raise Refused(401, "Incorrect API key: send it as Authorization: Bearer KEY",
                              code="invalid_api_key", headers={"www-authenticate": "Bearer"})


class Stream(Response):
    """Sends a reply as it is written, until the client leaves, is too slow, or time is up."""

    def __init__(self, reply: Reply, limits: Limits):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.reply, self.limits = reply, limits

    async def __call__(self, scope, receive, send) -> None:
        try:
            await unless_gone(receive, self.send(send), None)
        except (ClientDisconnect, OSError):
            return
        finally:
            self.reply.cancel()

    async def send(self, send) -> None:
        """Send all chunks."""
        async def body(data: bytes, more: bool = True) -> None:
            message = dict(type="http.response.body", body=data, more_body=more)
            try:  # Python 3.11's `wait_for` forgets that it was cancelled, if `send` is just done
                async with asyncio.timeout(self.limits.slow):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        await send(dict(type="http.response.start", status=200, headers=self.raw_headers))
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in self.reply.stream():
                    await body(chunk)
        except TimeoutError:
            await body(b"data: " + too_long(self.limits).body() + b"\n\n")
        await body(b"", more=False)


def too_long(limits: Limits) -> Refused:
    """Return the refusal of a reply that takes too long."""
    return Refused(504, f"the reply took longer than {limits.seconds:g} s", code="timeout")


async def unless_gone(receive, work: Awaitable, seconds: float | None):
    """Return what `work` returns; end it if the client leaves, or time is up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        while True:
            done, _ = await asyncio.wait({task, gone}, timeout=seconds,
                                         return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
            if not done:
                raise TimeoutError
            if gone.result()["type"] == "http.disconnect":
                raise ClientDisconnect
            gone = asyncio.ensure_future(receive())
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request; raise `Refused` if it is too large, too slow or not JSON's.

    What is too large is read all the same, and forgotten: a client that is still sending would not
    see the answer.
    """
    found, size = [], 0
    try:
        async with asyncio.timeout(limits.slow):
            async for chunk in request.stream():
                size += len(chunk)
                found += [chunk] if size <= limits.body else []
                if size > limits.body + DRAINED:
                    break
    except TimeoutError:
        raise Refused(408, f"the body took longer than {limits.slow:g} s", code="timeout",
                      headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(499, "the client has left") from None
    if size > limits.body:
        raise Refused(413, f"the body is too large: at most {limits.body} bytes",
                      code="body_too_large", headers={"connection": "close"})
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise Refused(415, "the header Content-Type must be application/json", code="content_type")
    return b"".join(found)


def error_response(refused: Refused) -> Response:
    """Return an error as a response."""
    return Response(refused.body(), refused.status, refused.headers, "application/json")


def as_json(body: dict) -> Response:
    """Return an object as a response."""
    return Response(json.dumps(body), media_type="application/json")


def make_app(served: Served, limits: Limits) -> Starlette:
    """Return the server."""
    page = PAGE.read_bytes()

    async def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    async def health(request: Request) -> Response:
        up = not served.engine.stopping
        response = as_json(dict(status="ok" if up else "stopped") | served.engine.state())
        response.status_code = 200 if up else 503
        return response

    async def models(request: Request) -> Response:
        return as_json(dict(object="list", data=[served.describe()]))

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != served.name:
            raise Refused(404, f"The model {name!r:.80} does not exist", "model",
                          "model_not_found")
        return as_json(served.describe())

    def completions(kind: str):
        async def answer(request: Request) -> Response:
            raw = await read_body(request, limits)
            reply = Reply(read_asked(raw, kind, served), served)
            reply.begin()
            if reply.asked.stream:
                return Stream(reply, limits)
            try:
                return as_json(await unless_gone(request.receive, reply.whole(), limits.seconds))
            except ClientDisconnect:
                raise Refused(499, "the client has left") from None
            except TimeoutError:
                raise too_long(limits) from None
            finally:
                reply.cancel()
        return answer

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, f"{request.method} {request.url.path}: "
                            f"{error.detail}", headers=dict(error.headers or {}))
        elif not isinstance(error, Refused):
            traceback.print_exception(error, file=sys.stderr)
        return error_response(told(error))

    routes = [Route("/", show_page), Route("/health", health)]
    for start in ("/v1", ""):
        routes += [Route(f"{start}/models", models), Route(f"{start}/models/{{name:path}}", model),
                   Route(f"{start}/chat/completions", completions("chat"), methods=["POST"]),
                   Route(f"{start}/completions", completions("text"), methods=["POST"])]
    middleware = [Middleware(Guard, limits=limits)]
    if limits.cors:
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=limits.cors,
                                        allow_methods=["*"], allow_headers=["*"]))
    kinds = (Refused, HTTPException, ValueError, RuntimeError, ArithmeticError, LookupError,
             TypeError, AttributeError, OSError, AssertionError)
    return Starlette(routes=routes, middleware=middleware,
                     exception_handlers=dict.fromkeys(kinds, refuse))
