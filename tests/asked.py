"""An ASGI application asked without a client in between, which would put odd paths and headers right first; and over a
real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from forked import wait_until

BOUNDARY = "limit-of-a-part"
FORM = [("content-type", f"multipart/form-data; boundary={BOUNDARY}")]


#: One loop for all that is asked: a new one each time would take longer than the answer.
_LOOP = asyncio.Runner()


@dataclass(frozen=True)
class Response:
    """What came back."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """A header's value; "" where there is none."""
        return next((value for each, value in self.headers if each == name), "")


def form(image: bytes) -> bytes:
    """A form with one image in it."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(
    app: Any, path: str, query: str | bytes = "", method: str = "GET", headers: Sequence[tuple[str, str]] = (),
    pieces: Sequence[bytes] = (b"",), kind: str = "http",
) -> Response:  # fmt: skip
    """One request; its body in the pieces in which it arrives."""
    scope = {
        "type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode("utf-8", "replace"), "root_path": "",
        "query_string": query.encode() if isinstance(query, str) else query,
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in [("host", "here"), *headers]],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting[-1]["more_body"] = False
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    _LOOP.run(app(scope, receive, send))
    start = sent[0]
    response_headers = [
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in start.get("headers", ())
    ]
    return Response(
        start.get("status", 0), response_headers, b"".join(message.get("body", b"") for message in sent[1:])
    )


@contextmanager
def served(app: Any) -> Iterator[int]:
    """The port of a server of its own, in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)
