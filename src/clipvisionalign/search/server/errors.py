"""Errors of a request as HTTP answers."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException


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
        if filter_text.strip():
            raise HTTPException(422, f"filter '{filter_text}': the database cannot answer it: {error}") from None
        if not isinstance(error, (RuntimeError, OSError)):
            raise
        logging.getLogger(__name__).exception("a request could not be answered")
        raise HTTPException(503, "the index cannot be read now; see the log of the service") from None
