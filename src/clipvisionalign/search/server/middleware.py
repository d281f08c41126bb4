"""Middleware of the service: token, limits of a request, headers, counts.

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
SESSION_COOKIE = "clipvisionalign_session"
#: The only path that is answered without a token, and to what methods.
PUBLIC_PATH, PUBLIC_METHODS = "/health", ("GET", "HEAD")
#: How long a client that sends too much has for reading that.
DRAIN_SECONDS = 2.0
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class BodyTooLargeError(Exception):
    """A body of more bytes than are taken."""


class RequestMiddleware:
    """Checks token and size of a request, limits its time, adds headers, and counts it.

    The token is taken from `Authorization: Bearer`, from `?token=`, and from the cookie that a right `?token=` is
    answered
    with: a random number of this process, which does not reveal the token.

    Args:
        app: The application.
        token: The token; "" lets every request pass.
        limits: The limits of a request.
        metrics: Counts the requests.
    """

    def __init__(self, app: ASGIApp, token: str, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.token, self.session = token.encode(), secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request within the limits, refuse a WebSocket, pass on everything else.

        Args:
            scope: ASGI's scope.
            receive: ASGI's receive.
            send: ASGI's send.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # there is none here
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)

    def credential_source(self, scope: Scope) -> str:
        """Where a request carries a right token; compared in constant time.

        Args:
            scope: ASGI's scope.

        Returns:
            "header" (also where no token is needed), "query" or "cookie"; "" for none.
        """
        if not self.token:
            return "header"
        request = Request(scope)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal_in_constant_time(bearer.strip().encode("latin-1"), self.token):
            return "header"
        if any(
            _equal_in_constant_time(value.encode("utf-8", "replace"), self.token)
            for value in request.query_params.getlist("token")
        ):
            return "query"
        cookie = request.cookies.get(SESSION_COOKIE, "").encode("utf-8", "replace")
        return "cookie" if _equal_in_constant_time(cookie, self.session.encode()) else ""


def _equal_in_constant_time(candidate: bytes, secret: bytes) -> bool:
    """In a time that reveals neither where the two differ nor how long the secret is."""
    return hmac.compare_digest(hashlib.sha256(candidate).digest(), hashlib.sha256(secret).digest())


class _Exchange:
    """One request and its answer."""

    def __init__(self, middleware: RequestMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.limits, self.credential_source = middleware.limits, middleware.credential_source(scope)
        self.status, self.received_bytes, self.started = 0, 0, time.perf_counter()
        #: The body was longer than what is taken, and no answer has been sent yet.
        self.body_too_large = False

    async def run(self) -> None:
        """Answer, and count what was answered."""
        # For routes with more detail for those who are allowed.
        self.scope.setdefault("state", {})["allowed"] = bool(self.credential_source)
        try:
            error_response = self._error_response()
            if error_response is not None:
                await error_response(self.scope, self._receive, self.send)
            elif not self.body_too_large:
                async with asyncio.timeout(self.limits.seconds):
                    await self.middleware.app(self.scope, self.receive, self.send)
        except BodyTooLargeError:
            pass
        except TimeoutError:
            if not self.status:
                timeout_response = JSONResponse({"detail": f"not done within {self.limits.seconds:g} s"}, 503)
                await timeout_response(self.scope, self._receive, self.send)
        finally:
            if self.body_too_large and not self.status:
                await self._reject_and_close()
            path = getattr(self.scope.get("route"), "path", "other")
            self.middleware.metrics.record(path, self.status or 500, time.perf_counter() - self.started)

    def _error_response(self) -> Response | None:
        is_public = self.scope["path"] == PUBLIC_PATH and self.scope["method"] in PUBLIC_METHODS
        if not self.credential_source and not is_public:
            return JSONResponse({"detail": "a token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        length = Headers(scope=self.scope).get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return JSONResponse({"detail": "Content-Length is no number"}, 400)
        self.body_too_large = int(length[:20]) > self.limits.body_bytes
        return None

    async def receive(self) -> Message:
        """The next piece of the body, as long as it is within the limit; a length that was announced is no promise, and
        a chunked body announces none. Raises BodyTooLargeError."""
        message = await self._receive()
        self.received_bytes += len(message.get("body", b""))
        if self.received_bytes > self.limits.body_bytes:
            self.body_too_large = True
            raise BodyTooLargeError
        return message

    async def send(self, message: Message) -> None:
        """Pass a piece of the answer on, with the headers that all answers have."""
        if self.body_too_large and not self.status:
            return  # of a form that ends in the middle: the error is sent instead
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if self.credential_source == "query" and self.status < 400:
                # The page asks for its images without the token in their addresses.
                headers.append("Set-Cookie", self._session_cookie())
        await self._send(message)

    async def _reject_and_close(self) -> None:
        """413, and the end of the connection; what still arrives meanwhile goes nowhere, and is read for a moment only
        because a connection that is closed before takes the answer with it."""
        self.body_too_large = False
        detail = {"detail": f"at most {self.limits.upload_bytes:,} bytes"}

        async def and_wait(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["more_body"] = True
            await self.send(message)

        await JSONResponse(detail, 413, {"Connection": "close"})(self.scope, self._receive, and_wait)
        drained_bytes, more_body = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while more_body and drained_bytes < self.limits.body_bytes:
                    message = await self._receive()
                    drained_bytes += len(message.get("body", b""))
                    more_body = bool(message.get("more_body"))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _session_cookie(self) -> str:
        response = Response()
        secure = self.scope.get("scheme") == "https"
        response.set_cookie(SESSION_COOKIE, self.middleware.session, secure=secure, httponly=True, samesite="strict")
        return response.headers["set-cookie"]
