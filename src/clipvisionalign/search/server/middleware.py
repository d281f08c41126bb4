"""What every request to the service goes through before and after its route, and what is counted of it.

Nothing acts on a request before it was allowed: the token is looked for first, by the path as the server has decoded
it and by nothing that a client can word otherwise (such as its Host header).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipvisionalign.search.server.limits import Limits
from clipvisionalign.search.server.metrics import Metrics

#: The cookie that stands for the token once it was given in an address.
COOKIE = "clipvisionalign_session"
#: The only path that is answered without a token, and to what methods.
OPEN_PATH, OPEN_METHODS = "/health", ("GET", "HEAD")
#: How long a client that sends too much has for reading that.
LAST_SECONDS = 2.0
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class BodyTooLong(Exception):
    """A body of more bytes than are taken."""


class Guard:
    """Token, size of what is sent in, time that it may take, headers, counts.

    The token is taken from `Authorization: Bearer`, from `?token=`, and from the cookie that a right `?token=` is
    answered with: a random number of this process, by which nobody learns the token.
    """

    def __init__(self, app: ASGIApp, token: str, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.token, self.session = token.encode(), secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # there is none here
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)

    def given(self, scope: Scope) -> str:
        """Where a request carries what it is allowed by: "header", "query", "cookie"; "" where nowhere."""
        if not self.token:
            return "header"
        request = Request(scope)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(bearer.strip().encode("latin-1"), self.token):
            return "header"
        if any(_same(value.encode("utf-8", "replace"), self.token) for value in request.query_params.getlist("token")):
            return "query"
        cookie = request.cookies.get(COOKIE, "").encode("utf-8", "replace")
        return "cookie" if _same(cookie, self.session.encode()) else ""


def _same(given: bytes, secret: bytes) -> bool:
    """In a time that tells neither where the two differ nor how long the secret is."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(secret).digest())


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.limits, self.given = guard.limits, guard.given(scope)
        self.status, self.received, self.begun = 0, 0, time.perf_counter()
        #: The body was longer than what is taken, and nobody has been told yet.
        self.cut = False

    async def run(self) -> None:
        """Answer, and count what was answered."""
        # For routes that tell more to those who are allowed.
        self.scope.setdefault("state", {})["allowed"] = bool(self.given)
        try:
            refusal = self._refusal()
            if refusal is not None:
                await refusal(self.scope, self._receive, self.send)
            elif not self.cut:
                async with asyncio.timeout(self.limits.seconds):
                    await self.guard.app(self.scope, self.receive, self.send)
        except BodyTooLong:
            pass
        except TimeoutError:
            if not self.status:
                late = JSONResponse({"detail": f"not done within {self.limits.seconds:g} s"}, 503)
                await late(self.scope, self._receive, self.send)
        finally:
            if self.cut and not self.status:
                await self._answer_and_close()
            path = getattr(self.scope.get("route"), "path", "other")
            self.guard.metrics.add(path, self.status or 500, time.perf_counter() - self.begun)

    def _refusal(self) -> Response | None:
        is_open = self.scope["path"] == OPEN_PATH and self.scope["method"] in OPEN_METHODS
        if not self.given and not is_open:
            return JSONResponse({"detail": "a token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        length = Headers(scope=self.scope).get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return JSONResponse({"detail": "Content-Length is no number"}, 400)
        self.cut = int(length[:20]) > self.limits.body_bytes
        return None

    async def receive(self) -> Message:
        """The next piece of the body, as long as it is within the limit; a length that was announced is no promise, and
        a chunked body announces none. Raises BodyTooLong."""
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.received > self.limits.body_bytes:
            self.cut = True
            raise BodyTooLong
        return message

    async def send(self, message: Message) -> None:
        """Pass a piece of the answer on, with the headers that all answers have."""
        if self.cut and not self.status:
            return  # of a form that ends in the middle: what is wrong is said instead
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self.given == "query" and self.status < 400:
                # The page asks for its pictures without the token in their addresses.
                headers.append("Set-Cookie", self._cookie())
        await self._send(message)

    async def _answer_and_close(self) -> None:
        """413, and the end of the connection; what still arrives meanwhile goes nowhere, and is read for a moment only
        because a connection that is closed before takes the answer with it."""
        self.cut = False
        told = {"detail": f"at most {self.limits.upload_bytes:,} bytes"}

        async def and_wait(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["more_body"] = True
            await self.send(message)

        await JSONResponse(told, 413, {"Connection": "close"})(self.scope, self._receive, and_wait)
        arrived, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                while more and arrived < self.limits.body_bytes:
                    message = await self._receive()
                    arrived += len(message.get("body", b""))
                    more = bool(message.get("more_body"))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _cookie(self) -> str:
        carrier = Response()
        secure = self.scope.get("scheme") == "https"
        carrier.set_cookie(COOKIE, self.guard.session, secure=secure, httponly=True, samesite="strict")
        return carrier.headers["set-cookie"]
