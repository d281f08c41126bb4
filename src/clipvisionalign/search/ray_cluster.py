"""Connecting to a Ray cluster, and leaving it."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

#: The address that starts Ray on this machine, for the time of the command.
LOCAL_RAY = "local"
#: Seconds within which the machine of a cluster has to accept a connection.
CONNECT_SECONDS = 5.0

_WAY_OUT = (
    "'ray start --head' starts a cluster, and names its address; of one with tokens set RAY_AUTH_MODE=token in the "
    "environment"
)


@contextmanager
def connected_to_ray(address: str) -> Iterator[None]:
    """Connect to a Ray cluster for the time of a block.

    Args:
        address: "local" starts Ray on this machine, "auto" finds the cluster around; else HOST:PORT.

    Yields:
        Nothing.

    Raises:
        ConnectionError: No cluster answers.
        ModuleNotFoundError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _check_reachable(address)
    logging.getLogger("asyncio").addFilter(_is_not_of_a_replica)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    except ConnectionError as error:
        raise ConnectionError(f"Ray cluster {address}: it does not answer ({error}): {_WAY_OUT}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for a machine that does not accept a connection."""
    matched = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address)
    if matched is None:
        return
    try:
        socket.create_connection((matched[1], int(matched[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"Ray cluster {address}: nothing accepts a connection there ({error}): {_WAY_OUT}"
        ) from None


def _is_not_of_a_replica(record: logging.LogRecord) -> bool:
    """False for a replica that is gone, which a question of Ray Serve's own for its load did not expect."""
    from ray.exceptions import RayError

    return not (record.exc_info and isinstance(record.exc_info[1], RayError))
