"""The routes of the service: search, images, state, page.

Images are served by their number, never by a path; what is sent in is limited in size, in pixels and in length. The
limits of a service are part of its interface, so the routes are made for one service.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from clipvisionalign import __version__
from clipvisionalign.explain.colours import COLOUR_ANCHORS, MAP_OPACITY
from clipvisionalign.images import open_image
from clipvisionalign.search.filters import MAX_FILTER_LENGTH
from clipvisionalign.search.hits import CaptionHit, Hit
from clipvisionalign.search.promise import SearchResult
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.rerank_margin import MARGIN_DEPTH
from clipvisionalign.search.server.errors import translate_errors
from clipvisionalign.search.server.service import SearchService, index_info
from clipvisionalign.search.terms import Term, parse_term
from clipvisionalign.search.time_limit import parse_seconds
from clipvisionalign.search.unreachable import missing_note

if TYPE_CHECKING:
    from clipvisionalign.explain.heatmaps import Explanation

#: Pixels of the longer side of an image that is shown large.
LARGE_IMAGE_SIZE = 1600

INDEX_DESCRIPTION = "which index, where there are several"
OFFSET_DESCRIPTION = "how many of the first results to leave out: those of the answer before"

ImageIdParam = Annotated[int, Query(ge=0, lt=2**63, description="an image's number in the index")]


def hits_to_json(hits: Sequence[Hit | CaptionHit], terms: Sequence[Term] = (), offset: int = 0) -> dict[str, Any]:
    """The answer of a search.

    Args:
        hits: The hits.
        terms: The terms of the query, whose notes are added.
        offset: Number of first hits that are left out; the verdict is on all.

    Returns:
        "found", "notes", and of a search by words "promise", "nothing" and "reason" (`SearchResult.verdict`).

    Raises:
        ValueError: A score is not finite.
    """
    if not all(math.isfinite(hit.score) for hit in hits):
        raise ValueError("the query's vector has no length that can be counted with: are its weights too large?")
    notes = [term.note for term in terms if term.note]
    result = hits if isinstance(hits, SearchResult) else SearchResult(hits)
    page = [hit.to_dict() for hit in hits[offset:]]
    return {"found": page, "notes": [*notes, *result.notes], **result.verdict()}


def explanation_to_json(explanation: "Explanation") -> dict[str, Any]:
    """The maps of an explanation, with the colours that they are to be drawn in.

    Args:
        explanation: The maps.

    Returns:
        "caption", "score" (None where it is not finite), "method", "map", "words" (each with "word" and "map"),
        "ignored", "colours" (sRGB at equal steps from 0 to 1) and "opacity" (of the colours over the image).

    Raises:
        ValueError: A map is not finite.
    """
    if not all(
        np.isfinite(grid).all() for grid in (explanation.heatmap, *(grid for _, grid in explanation.word_heatmaps))
    ):
        raise ValueError("the model's map of this image is not finite")
    return {
        "caption": explanation.caption,
        "score": explanation.score if math.isfinite(explanation.score) else None,
        "method": explanation.method,
        "map": explanation.heatmap.round(3).tolist(),
        "words": [{"word": word, "map": grid.round(3).tolist()} for word, grid in explanation.word_heatmaps],
        "ignored": explanation.ignored_words,
        "colours": COLOUR_ANCHORS,
        "opacity": MAP_OPACITY,
    }


def add_search_routes(app: FastAPI, service: SearchService) -> None:
    """Add the search by words, /search.

    Args:
        app: The application.
        service: Its state.
    """
    limits = service.limits
    CountParam = Annotated[int, Query(ge=1, le=limits.results)]
    OffsetParam = Annotated[int, Query(ge=0, le=limits.offset, description=OFFSET_DESCRIPTION)]
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description=INDEX_DESCRIPTION)]

    @app.get("/search", responses={422: {}})
    def search(
        q: Annotated[list[str], Query(min_length=1, max_length=limits.terms, description="words; ^2 red counts twice")],
        minus: Annotated[list[str], Query(max_length=limits.terms)] = [],  # noqa: B006
        count: CountParam = 20,
        where: Annotated[str, Query(max_length=MAX_FILTER_LENGTH)] = "",
        rerank: Annotated[int, Query(ge=0, le=limits.rerank)] = 0,
        index: IndexParam = 0,
        offset: OffsetParam = 0,
        promise: Annotated[
            float, Query(ge=0, lt=1, description="probability that what is meant is among the hits; 0 for none")
        ] = 0.0,
        within: Annotated[
            str, Query(max_length=20, description="such as 50ms: time within which hits of unsure order are re-ranked")
        ] = "",
        late: Annotated[
            bool, Query(description="rank all images by late interaction, where the index has the files for it")
        ] = False,
    ) -> dict[str, Any]:
        """Images by words, without others, filtered, re-ranked; with a promise as many as it needs, up to count."""

        def work() -> dict[str, Any]:
            terms = [parse_term(text) for text in q] + [parse_term(text, -1.0) for text in minus]
            for text in [*q, *minus]:
                if len(text) > limits.characters:
                    raise ValueError(f"a query of {len(text):,} characters; at most {limits.characters:,}")
            # Re-ranking orders the first results only: what comes after them stays where it is.
            rerank_count = rerank if rerank > offset else 0
            seconds = parse_seconds(within) if within else 0.0
            if seconds and 0 < offset < (rerank or MARGIN_DEPTH):
                raise ValueError(
                    f"how far a time lasts differs from page to page: with within, an offset of {offset} would repeat "
                    "images or leave some out; ask for more at once by count, or give rerank instead"
                )
            seconds = 0.0 if offset else seconds
            query = SearchQuery(terms, offset + count, where, rerank_count, promise=promise, within=seconds, late=late)
            return hits_to_json(service.search(query, index), terms, offset)

        return translate_errors(work, where)


def add_similar_routes(app: FastAPI, service: SearchService) -> None:
    """Add the searches by an image: /similar for images, /captions for captions.

    Args:
        app: The application.
        service: Its state.
    """
    searchers = service.searchers
    CountParam = Annotated[int, Query(ge=1, le=service.limits.results)]
    OffsetParam = Annotated[int, Query(ge=0, le=service.limits.offset, description=OFFSET_DESCRIPTION)]
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description=INDEX_DESCRIPTION)]

    @app.get("/similar", responses={404: {}, 422: {}})
    def similar_to(
        id: ImageIdParam, count: CountParam = 20, where: str = "", index: IndexParam = 0, offset: OffsetParam = 0
    ) -> dict[str, Any]:
        """Images like one of the index."""

        def work() -> dict[str, Any]:
            query = SearchQuery(count=offset + count + 1, where=where, vector=searchers[index].vector_of(id))
            hits = service.search(query, index)
            others = [hit for hit in hits if hit.id != id][: offset + count]
            return hits_to_json(hits.with_hits(others) if isinstance(hits, SearchResult) else others, offset=offset)

        return translate_errors(work, where)

    @app.post("/similar", responses={413: {}, 422: {}})
    def similar_upload(
        picture: Annotated[UploadFile, File()], count: CountParam = 20, where: str = "", index: IndexParam = 0,
        offset: OffsetParam = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Images like one that is sent in."""

        def work() -> dict[str, Any]:
            query = SearchQuery([service.read_upload(picture)], offset + count, where)
            return hits_to_json(service.search(query, index), offset=offset)

        return translate_errors(work, where)

    @app.get("/captions", responses={404: {}, 422: {}})
    def captions_of(id: ImageIdParam, count: CountParam = 20, index: IndexParam = 0) -> dict[str, Any]:
        """Captions near an image of the index; where it has captions."""

        def work() -> dict[str, Any]:
            query = SearchQuery(count=count, captions=True, vector=searchers[index].vector_of(id))
            return hits_to_json(service.search(query, index))

        return translate_errors(work)

    @app.post("/captions", responses={413: {}, 422: {}})
    def captions_of_upload(
        picture: Annotated[UploadFile, File()], count: CountParam = 20, index: IndexParam = 0
    ) -> dict[str, Any]:
        """Captions near an image that is sent in."""

        def work() -> dict[str, Any]:
            return hits_to_json(
                service.search(SearchQuery([service.read_upload(picture)], count, captions=True), index)
            )

        return translate_errors(work)


def add_image_routes(app: FastAPI, service: SearchService) -> None:
    """Add the images of an index, /image, and all of them newest first, /browse.

    Args:
        app: The application.
        service: Its state.
    """
    searchers, limits = service.searchers, service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description=INDEX_DESCRIPTION)]

    @app.get("/browse", responses={422: {}})
    def browse(
        count: Annotated[int, Query(ge=1, le=limits.results)] = 40,
        cursor: Annotated[str, Query(max_length=60, description="'next' of the page before")] = "",
        where: Annotated[str, Query(max_length=MAX_FILTER_LENGTH)] = "",
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """All images without a query, newest first: by the column `taken` where there is one, else by file time."""

        def work() -> dict[str, Any]:
            page = service.browsers[index].page(count, cursor, where)
            notes = {"notes": [missing_note(page.missing)]} if page.missing else {}
            return {"found": page.images, "total": page.total, "next": page.next_cursor or None} | notes

        return translate_errors(work, where)

    @app.get("/image/{id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}, 404: {}, 422: {}})
    def image(id: int, large: bool = False, index: IndexParam = 0) -> Response:
        """An image by its number: its thumbnail, or the image itself, up to 1,600 pixels."""

        def work() -> Response:
            if not 0 <= id < 2**63:
                raise KeyError(f"no image {id} in this index")
            searcher = searchers[index]
            if not large:
                return Response(searcher.value(id, "thumbnail"), media_type="image/jpeg")
            opened = open_image(searcher.image_source(id), LARGE_IMAGE_SIZE)
            opened.thumbnail((LARGE_IMAGE_SIZE, LARGE_IMAGE_SIZE))
            return _jpeg(opened)

        return translate_errors(work)


def add_explain_routes(app: FastAPI, service: SearchService) -> None:
    """Add the explanations of images, /explain and /explanation.

    Args:
        app: The application.
        service: Its state.
    """
    searchers, limits = service.searchers, service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description=INDEX_DESCRIPTION)]

    @app.get("/explain", response_class=Response, responses={200: {"content": {"image/png": {}}}, 404: {}, 422: {}})
    def explain_image(
        id: ImageIdParam,
        caption: Annotated[str, Query(min_length=1, max_length=limits.characters)],
        index: IndexParam = 0,
    ) -> Response:
        """Which parts of an image carry the words, as a PNG."""

        def work() -> Response:
            if not caption.strip():
                raise ValueError("a caption needs words")
            from clipvisionalign.explain.contact_sheet import explanation_sheet
            from clipvisionalign.explain.heatmaps import explain

            searcher = searchers[index]
            image_source = searcher.image_source(id)
            with service.model_lock:
                page = explanation_sheet(image_source, explain(searcher.aligner, image_source, caption))
            return _png(page)

        return translate_errors(work)

    @app.get("/explanation", responses={404: {}, 422: {}})
    def explanation(
        id: ImageIdParam,
        caption: Annotated[str, Query(min_length=1, max_length=limits.characters)],
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """Which parts of an image carry the words, as numbers: a map of the caption and, by design, of each word."""

        def work() -> dict[str, Any]:
            if not caption.strip():
                raise ValueError("a caption needs words")
            from clipvisionalign.explain.heatmaps import explain

            searcher = searchers[index]
            image_source = searcher.image_source(id)
            with service.model_lock:
                return explanation_to_json(explain(searcher.aligner, image_source, caption))

        return translate_errors(work)


def add_state_routes(app: FastAPI, service: SearchService) -> None:
    """Add /facets, /health and /metrics.

    Args:
        app: The application.
        service: Its state.
    """
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description=INDEX_DESCRIPTION)]

    @app.get("/facets", responses={422: {}})
    def facet_counts(index: IndexParam = 0) -> dict[str, Any]:
        """Images per month, place and camera, each with the filter that finds them."""
        return translate_errors(service.facets[index].read)

    @app.get("/health")
    def health(request: Request) -> dict[str, Any]:
        """Whether the service is up; and over what, for those who have its token."""
        up = {"status": "ok", "version": __version__}
        if not request.state.allowed:
            return up

        def work() -> list[dict[str, Any]]:
            return [
                index_info(searcher) | {"judging": service.stores_judgements(index)}
                for index, searcher in enumerate(service.searchers)
            ]

        return up | {"indexes": translate_errors(work)}

    @app.get("/metrics", response_class=Response)
    def prometheus_metrics() -> Response:
        """Counts and times of requests, for Prometheus."""
        return Response(service.metrics.render(), media_type=service.metrics.CONTENT_TYPE)


def add_page_routes(app: FastAPI) -> None:
    """Add the search page, Swagger's page and their files.

    Args:
        app: The application.
    """
    static = files("clipvisionalign.search.server").joinpath("static")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return static.joinpath("index.html").read_text(encoding="utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def documentation() -> str:
        return static.joinpath("docs.html").read_text(encoding="utf-8")

    app.mount("/docs/files", StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))), name="docs")
    app.mount("/page", StaticFiles(directory=str(static)), name="page")


def _png(image: Image.Image) -> Response:
    out = BytesIO()
    image.save(out, "PNG")
    return Response(out.getvalue(), media_type="image/png")


def _jpeg(image: Image.Image) -> Response:
    out = BytesIO()
    image.save(out, "JPEG", quality=88)
    return Response(out.getvalue(), media_type="image/jpeg")
