"""What a replica of a shard runs, and a request to the replicas of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery
from clipvisionalign.search.manifest import read_manifest, shard_storage
from clipvisionalign.search.storage import InvalidIndexError, as_storage
from clipvisionalign.search.unreachable import ShardUnavailable

#: Seconds after which a shard is taken not to answer; and those that one has all the same whose answer is fetched late,
#: because another shard was waited for.
RESPONSE_SECONDS, LAST_SECONDS = 5.0, 0.25
#: Seconds for which each of two replicas is waited for in turns.
POLL_SECONDS = 0.02


class ShardSearch:
    """What a replica runs: one shard, searched by vectors.

    Args:
        index: Path or URL of the index, under which the replica's machine reaches it too.
        shard: Name of the shard; "" for an index that has none.
        aligner: Fingerprint of the model by which it was encoded, as the service reads it.

    Raises:
        InvalidIndexError: There is another index.
    """

    def __init__(self, index: str, shard: str, aligner: str) -> None:
        self.storage = shard_storage(index, shard) if shard else as_storage(index)
        if read_manifest(self.storage).aligner != aligner:
            raise InvalidIndexError(f"{self.storage}: an index of another model on this machine")
        self.reader = IndexReader(self.storage)

    def search(self, queries: Sequence[VectorQuery], columns: Sequence[str]) -> list[NearestRows | Exception]:
        """Search the shard, see `IndexReader.search`.

        Args:
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            For each query its rows, or its error.
        """
        results = self.reader.search(queries, columns)
        if any(isinstance(each, Exception) for each in results):
            # The service may have seen an update, with a new column, that this reader has not.
            self.reader = IndexReader(self.storage)
            results = self.reader.search(queries, columns)
        return results


class Replicas(Protocol):
    """Those of all shards, as `ShardDeployments` has them."""

    replicas: int

    def is_up(self, shard: int) -> bool:
        """Whether a replica of a shard runs.

        Args:
            shard: Its number.

        Returns:
            Whether one does.
        """

    def lost(self, shard: int) -> None:
        """The only replica of a shard has died.

        Args:
            shard: Its number.
        """

    def answered(self, shard: int) -> None:
        """A replica of a shard has answered.

        Args:
            shard: Its number.
        """

    def send(self, shard: int, request: tuple[list[VectorQuery], list[str]]) -> Any:
        """Send a request to a replica of a shard.

        Args:
            shard: Its number.
            request: The queries and the columns.

        Returns:
            Ray Serve's response.
        """


class ShardResponse:
    """An answer of a deployment that is waited for (`PendingRows`).

    Args:
        deployments: Of the index.
        shard: Number of the shard that is asked.
        request: What is asked: the queries and the columns.
    """

    def __init__(self, deployments: Replicas, shard: int, request: tuple[list[VectorQuery], list[str]]) -> None:
        self.deployments, self.shard, self.request = deployments, shard, request
        self.start = time.monotonic()
        self.responses: list[Any] = []
        if deployments.is_up(shard):
            self._send()

    def _send(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            self.responses.append(self.deployments.send(self.shard, self.request))
        except (RayError, RayServeException):
            time.sleep(POLL_SECONDS)

    def result(self) -> list[NearestRows | Exception]:
        """Wait for the rows. Where a replica of several dies, or takes half of the time, another one is asked as well.

        Returns:
            For each query its rows, or its error.

        Raises:
            ShardUnavailable: There is no answer in time, or no replica.
            Exception: What the shard raised.
        """
        limit = self.start + RESPONSE_SECONDS
        another = limit if self.deployments.replicas == 1 else self.start + RESPONSE_SECONDS / 2
        try:
            while True:
                for response in [*self.responses]:
                    is_only = len(self.responses) == 1
                    rows = self._wait(
                        response, max(LAST_SECONDS, another - time.monotonic()) if is_only else POLL_SECONDS
                    )
                    if rows is not None:
                        self.deployments.answered(self.shard)
                        return rows
                now = time.monotonic()
                if now >= limit or not (self.responses or self.deployments.is_up(self.shard)):
                    raise ShardUnavailable("it does not answer now")
                if not self.responses:
                    self._send()
                elif now >= another:
                    another = limit
                    self._send()
        finally:
            # One that is late may be slow and no more: nothing is concluded for the next request.
            for response in self.responses:
                response.cancel()

    def _wait(self, response: Any, seconds: float) -> list[NearestRows | Exception] | None:
        """The rows of one replica; None where it is late, and where it is gone, which is then waited for no more."""
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        try:
            rows: list[NearestRows | Exception] = response.result(timeout_s=seconds)
        except RayTaskError as error:
            self.responses.remove(response)
            # Of the shard itself, such as a table that cannot be read.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except (TimeoutError, GetTimeoutError):
            return None
        except (RayError, RayServeException):
            self.responses.remove(response)
            if self.deployments.replicas == 1:
                self.deployments.lost(self.shard)
            return None
        self.responses.remove(response)
        return rows
