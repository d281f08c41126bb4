"""Errors of a request as HTTP answers."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from clipvisionalign.search.unreachable import is_unreadable

logger = logging.getLogger(__name__)


def translate_errors(work: Callable[[], Any], filter_text: str = "") -> Any:
    """The result of a route's work; an error that a user can correct becomes an HTTP error with its message.

    Args:
        work: What the route does.
        filter_text: The filter of the request: an error of the database is then an error of the filter.

    Returns:
        What `work` returns.

    Raises:
        HTTPException: 404 for what is not in the index, 413 for too large an image, 422 for what cannot be answered,
            503 for an index that cannot be read.
    """
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
        if is_unreadable(error):
            logger.error(f"the index cannot be read: {error}")
        elif filter_text.strip():
            raise HTTPException(422, f"filter '{filter_text}': the database cannot answer it: {error}") from None
        elif isinstance(error, (RuntimeError, OSError)):
            logger.exception("a request could not be answered")
        else:
            raise
        raise HTTPException(503, "the index cannot be read now; see the log of the service") from None


async def answer_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """422 for a request that its route does not take.

    What was sent is not repeated, as it is by FastAPI's own handler: of JSON it may be what no answer can hold, half of
    a pair of surrogates or a number that is not finite.

    Args:
        request: The request.
        error: The RequestValidationError.

    Returns:
        The answer: "detail", a list with "type", "loc" and "msg" of each fault.
    """
    assert isinstance(error, RequestValidationError)
    faults = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
    return JSONResponse({"detail": faults}, 422)
