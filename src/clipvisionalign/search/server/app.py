"""The search service as an ASGI application.

Bound to loopback unless set otherwise (`run.py`); then with a token, if one is set.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clipvisionalign import __version__
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server import routes
from clipvisionalign.search.server.decision_routes import add_decision_routes, add_keeper_routes
from clipvisionalign.search.server.duplicate_routes import add_duplicate_routes
from clipvisionalign.search.server.errors import answer_invalid_request
from clipvisionalign.search.server.judgement_routes import add_judgement_routes
from clipvisionalign.search.server.limits import Limits
from clipvisionalign.search.server.middleware import RequestMiddleware
from clipvisionalign.search.server.service import SearchService


def create_app(
    searchers: Sequence[Searcher], token: str = "", limits: Limits | None = None, hosts: Sequence[str] = ("*",),
    read_only: bool = False,
) -> FastAPI:  # fmt: skip
    """The service over one index, or over several to compare.

    Args:
        searchers: One for each index.
        token: Asked of every request but /health; "" for none.
        limits: What a request may ask for.
        hosts: Names that the service may be called by.
        read_only: Whether judged queries and decisions on duplicates are refused, so that nothing is ever written.

    Returns:
        The application; its threads end with its lifespan.
    """
    limits = limits or Limits()
    service = SearchService(searchers, limits, read_only)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # FastAPI's own pages of documentation load their scripts from elsewhere; those of /docs are files of this service.
    app = FastAPI(
        title="CLIPVisionAlign", version=__version__, description="Search images by words or by an image.",
        lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # a redirection repeats the address, and the token in it
    )  # fmt: skip
    app.add_exception_handler(RequestValidationError, answer_invalid_request)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(RequestMiddleware, token=token, limits=limits, metrics=service.metrics)
    routes.add_search_routes(app, service)
    routes.add_similar_routes(app, service)
    routes.add_image_routes(app, service)
    routes.add_explain_routes(app, service)
    routes.add_state_routes(app, service)
    add_judgement_routes(app, service)
    add_duplicate_routes(app, service)
    add_decision_routes(app, service)
    add_keeper_routes(app, service)
    for route in app.routes:
        if isinstance(route, APIRoute):
            route.summary = route.description.partition(":")[0].rstrip(".")
    routes.add_page_routes(app)
    return app
