"""An index as a service: FastAPI, with a page on it.

- Queries that arrive together are answered together: a thread takes what is waiting, up to `TOGETHER` texts at a time.
- Pictures are served by their number, never by a path; what is sent in is limited in size, in pixels and in length.
- Bound to loopback unless told otherwise; then with a token, if one is set.
"""

import asyncio
import hmac
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipvisionalign import __version__
from clipvisionalign.pictures import PictureError, open_picture
from clipvisionalign.search.explain import explain
from clipvisionalign.search.filters import LONGEST
from clipvisionalign.search.query import FILTERS, Found, FoundCaption, Searcher, Term, parse_term
from clipvisionalign.search.sheet import sheet_of_explanation

#: Texts that are encoded together at most, and how long the first of them waits for others.
TOGETHER, WAIT_SECONDS = 64, 0.004
#: Buckets of the response times in /metrics, in seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: Pixels of the longer side of a picture that is shown large.
LARGE = 1600
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    characters: int = 1000
    terms: int = 16
    results: int = 100
    rerank: int = 64
    upload_bytes: int = 20 * 2**20
    seconds: float = 30.0


#: A query's terms, and how many pictures it wants; 0 for its vector alone.
Asked = tuple[list[Term], int]


class Batcher:
    """Answers queries for many threads at once, those together that are waiting together."""

    def __init__(self, answer: Callable[[Sequence[Asked]], Sequence[Any]]) -> None:
        self.answer = answer
        self.waiting: queue.SimpleQueue[tuple[Asked, Future[Any]] | None] = queue.SimpleQueue()
        #: How many terms went through, in how many calls.
        self.texts, self.calls = 0, 0
        self.thread = threading.Thread(target=self._run, daemon=True, name="batcher")
        self.thread.start()

    def __call__(self, terms: list[Term], count: int) -> Future[Any]:
        """What `Searcher.answers` has for the query, later; what is wrong with it is raised."""
        found: Future[Any] = Future()
        self.waiting.put(((terms, count), found))
        return found

    def close(self) -> None:
        """End the thread, after what is waiting."""
        self.waiting.put(None)
        self.thread.join(timeout=30)

    def _run(self) -> None:
        open_ = True
        while open_:
            first = self.waiting.get()
            if first is None:
                return
            together = [first]
            until = time.perf_counter() + WAIT_SECONDS
            while sum(len(terms) for (terms, _), _ in together) < TOGETHER:
                try:
                    more = self.waiting.get(timeout=max(0.0, until - time.perf_counter()))
                except queue.Empty:
                    break
                if more is None:
                    open_ = False
                    break
                together.append(more)
            self._answer(together)

    def _answer(self, together: list[tuple[Asked, Future[Any]]]) -> None:
        self.texts, self.calls = self.texts + sum(len(terms) for (terms, _), _ in together), self.calls + 1
        try:
            answers = list(self.answer([query for query, _ in together]))
        except Exception as error:
            answers = [error] * len(together)
        for (_, found), answer in zip(together, answers, strict=True):
            if isinstance(answer, Exception):
                found.set_exception(answer)
            else:
                found.set_result(answer)


class Metrics:
    """Counts and times of requests, as Prometheus reads them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[tuple[str, int], int] = {}
        self.times: dict[str, list[int]] = {}
        self.sums: dict[str, float] = {}

    def add(self, path: str, status: int, seconds: float) -> None:
        with self.lock:
            self.counts[path, status] = self.counts.get((path, status), 0) + 1
            buckets = self.times.setdefault(path, [0] * (len(BUCKETS) + 1))
            self.sums[path] = self.sums.get(path, 0.0) + seconds
            for place, limit in enumerate(BUCKETS):
                buckets[place] += seconds <= limit
            buckets[-1] += 1

    def text(self, batchers: Sequence[Batcher]) -> str:
        with self.lock:
            lines = ["# TYPE clipvisionalign_requests_total counter"]
            lines += [f'clipvisionalign_requests_total{{path="{path}",status="{status}"}} {count}'
                      for (path, status), count in sorted(self.counts.items())]  # fmt: skip
            lines.append("# TYPE clipvisionalign_request_seconds histogram")
            for path, buckets in sorted(self.times.items()):
                name = "clipvisionalign_request_seconds"
                limits = [*map(str, BUCKETS), "+Inf"]
                lines += [f'{name}_bucket{{path="{path}",le="{limit}"}} {count}'
                          for limit, count in zip(limits, buckets, strict=True)]  # fmt: skip
                lines += [
                    f'{name}_sum{{path="{path}"}} {self.sums[path]:.6f}',
                    f'{name}_count{{path="{path}"}} {buckets[-1]}',
                ]
        lines.append("# TYPE clipvisionalign_encoded_texts_total counter")
        lines.append(f"clipvisionalign_encoded_texts_total {sum(each.texts for each in batchers)}")
        lines.append("# TYPE clipvisionalign_encoder_calls_total counter")
        lines.append(f"clipvisionalign_encoder_calls_total {sum(each.calls for each in batchers)}")
        return "\n".join(lines) + "\n"


class Guard:
    """What every request goes through: token, size of what is sent in, time that it may take, headers, counts."""

    def __init__(self, app: ASGIApp, token: str, limits: Limits, metrics: Metrics) -> None:
        self.app, self.token, self.limits, self.metrics = app, token, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, begun, status = Request(scope), time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self.token and request.query_params.get("token") and status == 200:
                    # The page asks for its pictures without the token in their addresses.
                    cookie = Response()
                    cookie.set_cookie("token", self.token, httponly=True, samesite="strict")
                    headers.append("Set-Cookie", cookie.headers["set-cookie"])
            await send(message)

        try:
            refused = self._refusal(request)
            if refused:
                await refused(scope, receive, answer)
                return
            async with asyncio.timeout(self.limits.seconds):
                await self.app(scope, receive, answer)
        except TimeoutError:
            if not status:
                await JSONResponse({"detail": f"not done within {self.limits.seconds:g} s"}, 503)(
                    scope, receive, answer
                )
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.add(path, status or 500, time.perf_counter() - begun)

    def _refusal(self, request: Request) -> Response | None:
        if self.token and request.url.path != "/health" and not _allowed(request, self.token):
            return JSONResponse({"detail": "a token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        if _too_long(request, self.limits):
            return JSONResponse({"detail": f"at most {self.limits.upload_bytes:,} bytes"}, 413)
        return None


def create_app(
    searchers: Sequence[Searcher], token: str = "", limits: Limits | None = None, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The service over one index, or over several to compare. token: asked of every request but /health; hosts: names
    that it may be called by."""
    limits = limits or Limits()
    batchers = [Batcher(each.answers) for each in searchers]
    metrics = Metrics()
    # The model holds all cores: two at a time would only take turns.
    model = threading.Lock()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        for batcher in batchers:
            batcher.close()

    # Its own pages of documentation take their scripts from elsewhere; /docs below has them with it.
    app = FastAPI(
        title="CLIPVisionAlign", version=__version__, description="Search pictures by words or by a picture.",
        lifespan=life, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    Number = Annotated[int, Query(ge=0, lt=len(searchers), description="which index, where there are several")]
    Count = Annotated[int, Query(ge=1, le=limits.results)]
    Picture = Annotated[int, Query(ge=0, lt=2**63, description="a picture's number in the index")]

    app.add_middleware(Guard, token=token, limits=limits, metrics=metrics)

    def found_as_json(found: Sequence[Found | FoundCaption]) -> dict[str, Any]:
        return {"found": [each.to_dict() for each in found]}

    def do(work: Callable[[], Any]) -> Any:
        """What a user can mend is told, and is no fault of the service."""
        try:
            return work()
        except (ValueError, PictureError) as error:
            raise HTTPException(422, str(error)) from None
        except KeyError as error:
            raise HTTPException(404, str(error.args[0])) from None

    @app.get("/search", responses={422: {}})
    def search(
        q: Annotated[list[str], Query(min_length=1, max_length=limits.terms, description="words; 2:red counts twice")],
        minus: Annotated[list[str], Query(max_length=limits.terms)] = [],  # noqa: B006
        count: Count = 20,
        where: Annotated[str, Query(max_length=LONGEST)] = "",
        rerank: Annotated[int, Query(ge=0, le=limits.rerank)] = 0,
        index: Number = 0,
    ) -> dict[str, Any]:
        """Pictures by words, without others, filtered, re-ranked."""

        def work() -> dict[str, Any]:
            terms = [parse_term(text) for text in q] + [parse_term(text, -1.0) for text in minus]
            for text in [*q, *minus]:
                if len(text) > limits.characters:
                    raise ValueError(f"a query of {len(text):,} characters; at most {limits.characters:,}")
            plain = not (where or rerank)
            found = batchers[index](terms, count if plain else 0).result(limits.seconds)
            if not isinstance(found, np.ndarray):
                return found_as_json(found)
            if not rerank:
                return found_as_json(searchers[index].search_vector(found, count, where))
            with model:
                return found_as_json(searchers[index].search_vector(found, count, where, rerank, terms))

        return do(work)

    @app.get("/similar", responses={404: {}, 422: {}})
    def similar_to(id: Picture, count: Count = 20, where: str = "", index: Number = 0) -> dict[str, Any]:
        """Pictures like one of the index."""

        def work() -> dict[str, Any]:
            searcher = searchers[index]
            found = searcher.search_vector(searcher.vector_of(id), count + 1, where)
            return found_as_json([each for each in found if each.id != id][:count])

        return do(work)

    def vector_of_upload(picture: UploadFile, index: int) -> np.ndarray:
        data = picture.file.read(limits.upload_bytes + 1)
        if len(data) > limits.upload_bytes:
            raise HTTPException(413, f"at most {limits.upload_bytes:,} bytes")
        opened = open_picture(data, 512)
        with model:
            return searchers[index].encode([Term(opened, is_picture=True)])

    @app.post("/similar", responses={413: {}, 422: {}})
    def similar_upload(
        picture: Annotated[UploadFile, File()], count: Count = 20, where: str = "", index: Number = 0
    ) -> dict[str, Any]:
        """Pictures like one that is sent in."""
        return do(lambda: found_as_json(
            searchers[index].search_vector(vector_of_upload(picture, index), count, where)
        ))  # fmt: skip

    @app.get("/captions", responses={404: {}, 422: {}})
    def captions_of(id: Picture, count: Count = 20, index: Number = 0) -> dict[str, Any]:
        """Captions near a picture of the index; where it has captions."""
        return do(lambda: found_as_json(searchers[index].captions(searchers[index].vector_of(id), count)))

    @app.post("/captions", responses={413: {}, 422: {}})
    def captions_of_upload(
        picture: Annotated[UploadFile, File()], count: Count = 20, index: Number = 0
    ) -> dict[str, Any]:
        """Captions near a picture that is sent in."""
        return do(lambda: found_as_json(searchers[index].captions(vector_of_upload(picture, index), count)))

    @app.get("/explain", response_class=Response, responses={200: {"content": {"image/png": {}}}, 404: {}, 422: {}})
    def explained(
        id: Picture, caption: Annotated[str, Query(min_length=1, max_length=limits.characters)], index: Number = 0
    ) -> Response:
        """Which parts of a picture carry the words, as a PNG."""

        def work() -> Response:
            if not caption.strip():
                raise ValueError("a caption needs words")
            searcher = searchers[index]
            picture = searcher.picture(id)
            with model:
                page = sheet_of_explanation(picture, explain(searcher.aligner, picture, caption))
            return _png(page)

        return do(work)

    @app.get("/image/{id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}, 404: {}, 422: {}})
    def image(id: int, large: bool = False, index: Number = 0) -> Response:
        """A picture by its number: its thumbnail, or the picture itself, up to 1,600 pixels."""

        def work() -> Response:
            if not 0 <= id < 2**63:
                raise KeyError(f"no picture {id} in this index")
            searcher = searchers[index]
            if not large:
                return Response(searcher.value(id, "thumbnail"), media_type="image/jpeg")
            opened = open_picture(searcher.picture(id), LARGE)
            opened.thumbnail((LARGE, LARGE))
            return _jpeg(opened)

        return do(work)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the service is up, and over what."""
        told = [
            {
                "pictures": each.table.count_rows(),
                "kind": each.about.kind,
                "recall": each.about.recall,
                "design": each.aligner.config.design,
                "reranks": each.aligner.late is not None,
                "captions": 0 if each.caption_table is None else each.caption_table.count_rows(),
                "filters": [*FILTERS, *each.metadata],
            }
            for each in searchers
        ]
        return {"status": "ok", "version": __version__, "indexes": told}

    @app.get("/metrics", response_class=Response)
    def measured() -> Response:
        """Counts and times of requests, for Prometheus."""
        return Response(metrics.text(batchers), media_type="text/plain; version=0.0.4")

    for route in app.routes:
        if isinstance(route, APIRoute):
            route.summary = route.description.partition(":")[0].rstrip(".")
    pages = files("clipvisionalign.search").joinpath("page")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return pages.joinpath("index.html").read_text(encoding="utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def documentation() -> str:
        return pages.joinpath("docs.html").read_text(encoding="utf-8")

    app.mount("/docs/files", StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))), name="docs")
    app.mount("/page", StaticFiles(directory=str(pages)), name="page")
    app.state.batchers = batchers
    return app


def _allowed(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    given = given or request.query_params.get("token", "") or request.cookies.get("token", "")
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), token.encode())


def _too_long(request: Request, limits: Limits) -> bool:
    length = request.headers.get("content-length", "0")
    # A little more than the picture: the form around it.
    return not length.isdigit() or int(length) > limits.upload_bytes + 10_000


def _png(picture: Image.Image) -> Response:
    out = BytesIO()
    picture.save(out, "PNG")
    return Response(out.getvalue(), media_type="image/png")


def _jpeg(picture: Image.Image) -> Response:
    out = BytesIO()
    picture.save(out, "JPEG", quality=88)
    return Response(out.getvalue(), media_type="image/jpeg")


def serve(
    indexes: Sequence[str], host: str = "127.0.0.1", port: int = 8000, token: str = "", run: str = "",
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve one index, or several side by side, until stopped. Raises ValueError for one that is open to the network
    without a token."""
    import uvicorn

    loopback = host in ("127.0.0.1", "localhost", "::1")
    if not loopback and not token:
        raise ValueError(f"--host {host} opens the pictures to the network: set a --token that has to be known")
    searchers = [Searcher(index, run) for index in indexes]
    # A page elsewhere must not reach a service on loopback by a name that it makes point there.
    hosts = ["localhost", "127.0.0.1", "[::1]"] if loopback else ["*"]
    app = create_app(searchers, token, hosts=hosts)
    say(f"http://{host}:{port}/{f'?token={token}' if token else ''} (Ctrl-C stops it; /docs describes the interface)")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=15)
