"""An index as a service: FastAPI, with a page on it.

- Queries that arrive together are answered together: a thread takes what is waiting, up to `TOGETHER` texts at a time.
- Pictures are served by their number, never by a path; what is sent in is limited in size, in pixels and in length.
- Bound to loopback unless told otherwise; then with a token, if one is set.
"""

import logging
import math
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clipvisionalign import __version__
from clipvisionalign.data.of_run import unfinished_note
from clipvisionalign.images import open_picture
from clipvisionalign.search.explain import explain
from clipvisionalign.search.filters import LONGEST
from clipvisionalign.search.middleware import Guard, Limits, Metrics
from clipvisionalign.search.query import FILTERS, Found, FoundCaption, Searcher, Term, parse_term
from clipvisionalign.search.sheet import sheet_of_explanation

#: Texts that are encoded together at most, and how long the first of them waits for others.
TOGETHER, WAIT_SECONDS = 64, 0.004
#: Pixels of the longer side of a picture that is shown large.
LARGE = 1600
#: The environment variable that holds the token.
TOKEN = "CLIPVISIONALIGN_TOKEN"

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


def create_app(
    searchers: Sequence[Searcher], token: str = "", limits: Limits | None = None, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The service over one index, or over several to compare. token: asked of every request but /health; hosts: names
    that it may be called by."""
    limits = limits or Limits()
    batchers = [Batcher(each.answers) for each in searchers]
    metrics = Metrics(lambda: (sum(each.texts for each in batchers), sum(each.calls for each in batchers)))
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
        redirect_slashes=False,  # a redirection repeats the address, and the token in it
    )  # fmt: skip
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    Number = Annotated[int, Query(ge=0, lt=len(searchers), description="which index, where there are several")]
    Count = Annotated[int, Query(ge=1, le=limits.results)]
    Picture = Annotated[int, Query(ge=0, lt=2**63, description="a picture's number in the index")]

    app.add_middleware(Guard, token=token, limits=limits, metrics=metrics)

    def found_as_json(found: Sequence[Found | FoundCaption], terms: Sequence[Term] = ()) -> dict[str, Any]:
        """What was found; and what to say of the terms that were asked for."""
        if not all(math.isfinite(each.score) for each in found):
            raise ValueError("the query's vector has no length that can be counted with: are its weights too large?")
        return {"found": [each.to_dict() for each in found], "notes": [term.note for term in terms if term.note]}

    def do(work: Callable[[], Any], where: str = "") -> Any:
        """What a user can mend is told, and is no fault of the service. where: the filter that came with it."""
        try:
            return work()
        except (HTTPException, TimeoutError):
            raise
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except KeyError as error:
            raise HTTPException(404, str(error.args[0])) from None
        except MemoryError:
            raise HTTPException(413, "more than this machine has memory for") from None
        except Exception as error:
            if where.strip():
                raise HTTPException(422, f"filter '{where}': the database cannot answer it: {error}") from None
            if not isinstance(error, (RuntimeError, OSError)):
                raise
            logging.getLogger(__name__).exception("a request could not be answered")
            raise HTTPException(503, "the index cannot be read now; the log of the service says why") from None

    @app.get("/search", responses={422: {}})
    def search(
        q: Annotated[list[str], Query(min_length=1, max_length=limits.terms, description="words; ^2 red counts twice")],
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
                return found_as_json(found, terms)
            if not np.isfinite(found).all():
                raise ValueError("the weights are too large to be counted with")
            if not rerank:
                return found_as_json(searchers[index].search_vector(found, count, where), terms)
            with model:
                return found_as_json(searchers[index].search_vector(found, count, where, rerank, terms), terms)

        return do(work, where)

    @app.get("/similar", responses={404: {}, 422: {}})
    def similar_to(id: Picture, count: Count = 20, where: str = "", index: Number = 0) -> dict[str, Any]:
        """Pictures like one of the index."""

        def work() -> dict[str, Any]:
            searcher = searchers[index]
            found = searcher.search_vector(searcher.vector_of(id), count + 1, where)
            return found_as_json([each for each in found if each.id != id][:count])

        return do(work, where)

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
        return do(
            lambda: found_as_json(searchers[index].search_vector(vector_of_upload(picture, index), count, where)), where
        )

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

    def about(searcher: Searcher) -> dict[str, Any]:
        return {
            "pictures": searcher.table.count_rows(),
            "kind": searcher.about.kind,
            "recall": searcher.about.recall,
            "design": searcher.aligner.config.design,
            "reranks": searcher.aligner.late is not None,
            "captions": 0 if searcher.caption_table is None else searcher.caption_table.count_rows(),
            "filters": [*FILTERS, *searcher.metadata],
        }

    @app.get("/health")
    def health(request: Request) -> dict[str, Any]:
        """Whether the service is up; and over what, for those who have its token."""
        up = {"status": "ok", "version": __version__}
        if not request.state.allowed:
            return up
        return up | {"indexes": do(lambda: [about(each) for each in searchers])}

    @app.get("/metrics", response_class=Response)
    def measured() -> Response:
        """Counts and times of requests, for Prometheus."""
        return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)

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


def _png(picture: Image.Image) -> Response:
    out = BytesIO()
    picture.save(out, "PNG")
    return Response(out.getvalue(), media_type="image/png")


def _jpeg(picture: Image.Image) -> Response:
    out = BytesIO()
    picture.save(out, "JPEG", quality=88)
    return Response(out.getvalue(), media_type="image/jpeg")


def read_token(value: str = "", file: str | Path = "") -> str:
    """The token that is given by itself, in a file, or else in the environment; "" for none. Raises ValueError for one
    that is empty or that no header can carry, FileNotFoundError."""
    token, source = os.environ.get(TOKEN, ""), TOKEN
    if file:
        token, source = Path(file).read_text(encoding="utf-8").strip(), str(file)
        if not token:
            raise ValueError(f"{source}: no token in it")
    elif value:
        token, source = value, "--token"
    if not token.isprintable() or token != token.strip():
        raise ValueError(f"{source}: a token is one line of printable characters, without blanks around it")
    return token


def serve(
    indexes: Sequence[str], host: str = "127.0.0.1", port: int = 8000, token: str = "", run: str = "",
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve one index, or several side by side, until stopped. Raises ValueError for one that is open to the network
    without a token."""
    import uvicorn

    loopback = host in ("127.0.0.1", "localhost", "::1")
    if not loopback and not token:
        raise ValueError(
            f"--host {host} opens the pictures to the network: set a --token-file FILE, or {TOKEN} in the environment"
        )
    searchers = [Searcher(index, run) for index in indexes]
    for note in dict.fromkeys(filter(None, (unfinished_note(searcher.run) for searcher in searchers))):
        say(f"note: {note}")
    # A page elsewhere must not reach a service on loopback by a name that it makes point there.
    hosts = ["localhost", "127.0.0.1", "[::1]", "::1"] if loopback else ["*"]
    app = create_app(searchers, token, hosts=hosts)
    say(f"{page_address(host, port, token)} (Ctrl-C stops it; /docs describes the interface)")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=15)


def page_address(host: str, port: int, token: str = "") -> str:
    """The link to the page, whatever characters the token has."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")
