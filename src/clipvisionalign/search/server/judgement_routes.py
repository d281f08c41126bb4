"""Judged queries of the search page, which are written to one file of the index (`judgement_store.py`).

A page of another site can make a browser send a request here, with the cookie of this service where that is of the same
site. So a request to write is refused unless it comes from the page itself, or from no page at all.
"""

from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Body, FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from pydantic import StringConstraints
from starlette.datastructures import Headers

from clipvisionalign.search.judgement_store import JudgedMeanwhileError, judgement_fields
from clipvisionalign.search.server.errors import translate_errors
from clipvisionalign.search.server.service import SearchService

#: Characters of a path at most, and of the time of a judgement.
MAX_PATH_LENGTH, MAX_TIME_LENGTH = 4096, 40

ImagePath = Annotated[str, StringConstraints(max_length=MAX_PATH_LENGTH)]


def add_judgement_routes(app: FastAPI, service: SearchService) -> None:
    """Add /judgements, to read the judged queries of an index and to store one.

    Args:
        app: The application.
        service: Its state.
    """
    limits = service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description="which index")]
    Text = Annotated[str, StringConstraints(max_length=limits.characters)]

    @app.get("/judgements", responses={422: {}})
    def judgements(index: IndexParam = 0) -> dict[str, Any]:
        """Judged queries: those of an index, how many a promise needs, and the command that calibrates on them."""
        return translate_errors(service.judgements[index].summary)

    @app.post("/judgements", responses={403: {}, 409: {}, 422: {}})
    def judge(
        request: Request,
        query: Annotated[list[Text], Body(min_length=1, max_length=limits.terms)],
        relevant: Annotated[
            list[ImagePath] | None,
            Body(max_length=limits.judged_images, description="paths of ALL relevant images; null takes it back"),
        ],
        searched: Annotated[list[Text], Body(max_length=limits.terms, description="other words that were tried")] = [],  # noqa: B006
        replaces: Annotated[str, Body(max_length=MAX_TIME_LENGTH, description="'time' of the one before")] = "",
        index: IndexParam = 0,
    ) -> Any:
        """A judged query: it is appended to those of an index, or refused where another has judged it meanwhile."""
        if service.read_only:
            raise HTTPException(403, "this service stores no judgements: it was started with --read-only")
        if not service.stores_judgements(index):
            raise HTTPException(403, "judgements are stored in an index of this machine that may be written to")
        if is_from_elsewhere(request.headers):
            raise HTTPException(403, "a judgement is sent by the page of this service")

        def work() -> Any:
            try:
                service.judgements[index].add(query, relevant, replaces, searched)
            except JudgedMeanwhileError as error:
                current = None if error.current is None else judgement_fields(error.current)
                return JSONResponse({"detail": str(error), "current": current}, 409)
            except OSError as error:
                reason = error.strerror or "another process writes to it"
                raise HTTPException(503, f"the judgement cannot be stored in the index: {reason}") from None
            return service.judgements[index].summary()

        return translate_errors(work)


def is_from_elsewhere(headers: Headers) -> bool:
    """Whether a request was made by the page of another site or of another port.

    Args:
        headers: Of the request.

    Returns:
        Whether it was, by the headers that browsers add; a client that is no browser adds none.

    >>> is_from_elsewhere(Headers({"sec-fetch-site": "cross-site"})), is_from_elsewhere(Headers({"host": "a:80"}))
    (True, False)
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
