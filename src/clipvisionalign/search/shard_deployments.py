"""The shards of an index as deployments of Ray Serve: each is searched where its replicas run, answers are merged here.

A deployment holds one shard; Ray starts a replica again that ends. `ShardedReader` asks through `ShardDeployments.ask`,
and names the shards that do not answer.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery
from clipvisionalign.search.manifest import read_shards, read_whole_manifest, shard_storage
from clipvisionalign.search.sharded_reader import ShardedReader, ShardUnavailable

logger = logging.getLogger(__name__)

#: Seconds after which a shard is taken not to answer.
RESPONSE_SECONDS = 5.0
#: Seconds between two questions which replicas run, and between Ray's own to each of them.
STATE_SECONDS, HEALTH_SECONDS = 0.5, 1.0
#: Seconds within which all shards have to be open at the start.
START_SECONDS = 300.0
#: Requests that a replica answers at the same time.
CONCURRENT_REQUESTS = 16


class ShardSearch:
    """What a replica runs: one shard, searched by vectors.

    Args:
        index: Path or URL of the index, under which the replica's machine reaches it too.
        shard: Name of the shard; "" for an index that has none.
    """

    def __init__(self, index: str, shard: str) -> None:
        self.reader = IndexReader(shard_storage(index, shard) if shard else index)

    def search(self, queries: Sequence[VectorQuery], columns: Sequence[str]) -> list[NearestRows | Exception]:
        """Search the shard, see `IndexReader.search`.

        Args:
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            For each query its rows, or its error.
        """
        return self.reader.search(queries, columns)


class _Response:
    """An answer of a deployment that is waited for (`PendingRows`).

    Args:
        deployments: Of the index.
        shard: Number of the shard that is asked.
        request: What is asked: the queries and the columns.
    """

    def __init__(self, deployments: ShardDeployments, shard: int, request: tuple[list[VectorQuery], list[str]]) -> None:
        self.deployments, self.shard, self.request = deployments, shard, request
        self.limit = time.monotonic() + RESPONSE_SECONDS
        self.response = deployments.send(shard, request) if deployments.is_up(shard) else None

    def result(self) -> list[NearestRows | Exception]:
        """Wait for the rows. Where a replica dies of several, another one is asked.

        Returns:
            For each query its rows, or its error.

        Raises:
            ShardUnavailable: There is no answer in time, or no replica.
            Exception: What the shard raised.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        while self.response is not None:
            try:
                rows: list[NearestRows | Exception] = self.response.result(
                    timeout_s=max(0.0, self.limit - time.monotonic())
                )
                return rows
            except RayTaskError as error:
                # Of the shard itself, such as a table that cannot be read.
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except (RayError, RayServeException, TimeoutError):
                self.deployments.lost(self.shard)
                is_late = time.monotonic() >= self.limit
                can_retry = self.deployments.is_up(self.shard) and not is_late
                self.response = self.deployments.send(self.shard, self.request) if can_retry else None
        raise ShardUnavailable


class ShardDeployments:
    """The deployments of one index; `serve_shards` starts and ends them.

    Args:
        index: Path or URL of the index.
        replicas: Of each shard.

    Raises:
        InvalidIndexError: There is no index.

    Attributes:
        names: Of the applications of Ray Serve, one for each shard.
    """

    def __init__(self, index: str | Path, replicas: int = 1) -> None:
        # Whatever is wrong with the index is found before Ray starts.
        read_whole_manifest(index)
        shards = read_shards(index)
        self.index, self.replicas = str(index), replicas
        self.shards = list(shards.shards) if shards else [""]
        prefix = f"clipvisionalign-{uuid.uuid4().hex[:8]}"
        self.names = [f"{prefix}-{shard or 'index'}" for shard in self.shards]
        self._handles: list[Any] = []
        #: For each shard the number of replicas that run, and when one was last seen to be lost.
        self._running = [0] * len(self.shards)
        self._lost = [0.0] * len(self.shards)
        self._ended = threading.Event()

    def start(self, cores: float) -> None:
        """Deploy all shards, and wait until they answer.

        Args:
            cores: Processor cores of the cluster that replicas may take, a share each, and none more than one.

        Raises:
            RuntimeError: A shard does not start.
        """
        from ray import serve

        # Rounded down: a service takes half of the cluster at most, so that another one fits beside it.
        share = min(1.0, math.floor(1000 * cores / len(self.shards) / self.replicas) / 1000)
        deployment = serve.deployment(
            ShardSearch, num_replicas=self.replicas, max_ongoing_requests=CONCURRENT_REQUESTS,
            health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=10 * HEALTH_SECONDS,
            graceful_shutdown_timeout_s=HEALTH_SECONDS,
            ray_actor_options={"num_cpus": share},
        )  # fmt: skip
        # Without its HTTP server: the requests come to the service, which encodes, filters and merges.
        serve.start(proxy_location="Disabled")
        targets = [
            serve.RunTarget(deployment.bind(self.index, shard), name=name, route_prefix=None)
            for shard, name in zip(self.shards, self.names, strict=True)
        ]
        handles = serve.run_many(targets, wait_for_applications_running=False)
        limit, up = time.monotonic() + START_SECONDS, 0
        while not all(self._read_states()):
            reason = self._start_error(time.monotonic() > limit)
            if reason:
                raise RuntimeError(f"{self.index}: a shard does not start: {reason}")
            if sum(map(bool, self._running)) > up:
                up = sum(map(bool, self._running))
                logger.info(f"{self.index}: {up} of {len(self.shards)} shards answer")
            time.sleep(STATE_SECONDS)
        self._handles = handles
        threading.Thread(target=self._watch, name="replicas", daemon=True).start()

    def _read_states(self) -> list[int]:
        from ray import serve

        asked, applications = time.monotonic(), serve.status().applications
        for position, name in enumerate(self.names):
            deployments = applications[name].deployments.values() if name in applications else ()
            count = sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments)
            # A state from before a loss is none.
            if asked > self._lost[position] + HEALTH_SECONDS:
                self._set_running(position, count)
        return self._running

    def _set_running(self, position: int, count: int) -> None:
        if self._handles and bool(count) != bool(self._running[position]):
            name = f"{self.index}: {self.shards[position] or 'its only shard'}"
            if count:
                logger.info(f"{name} answers again")
            else:
                logger.warning(f"{name} does not answer; Ray starts it again, until then results are incomplete")
        self._running[position] = count

    def _start_error(self, is_late: bool) -> str:
        """Why a shard does not start: its own error, or once it is late what Ray waits for; "" for no reason yet."""
        from ray import serve

        applications = serve.status().applications
        deployments = [
            deployment
            for name in self.names
            if name in applications
            for deployment in applications[name].deployments.values()
        ]
        failed = [each for each in deployments if each.status_trigger == "REPLICA_STARTUP_FAILED"]
        messages = [each.message.strip() for each in (failed or deployments if is_late else failed)]
        last_lines = [message.splitlines()[-1] for message in messages if message]
        return next(iter(last_lines), f"not within {START_SECONDS:g} s" if is_late else "")

    def _watch(self) -> None:
        while not self._ended.wait(STATE_SECONDS):
            try:
                self._read_states()
            except Exception as error:
                # The cluster itself is gone, or busy: what was known stays until it answers.
                logger.debug(f"Ray Serve does not give its state: {error}")

    def is_up(self, shard: int) -> bool:
        """Whether a replica of a shard runs.

        Args:
            shard: Its number.

        Returns:
            Whether one does.
        """
        return self._running[shard] > 0

    def lost(self, shard: int) -> None:
        """A replica of a shard has not answered: without others the shard is not asked until one runs again.

        Args:
            shard: Its number.
        """
        self._lost[shard] = time.monotonic()
        self._set_running(shard, max(0, self._running[shard] - 1))

    def ask(self, shard: int, queries: Sequence[VectorQuery], columns: Sequence[str]) -> _Response:
        """Ask a shard for its nearest rows (`AskShard`).

        Args:
            shard: Its number.
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            The answer to wait for.
        """
        return _Response(self, shard, (list(queries), list(columns)))

    def send(self, shard: int, request: tuple[list[VectorQuery], list[str]]) -> Any:
        """Send a request to a replica of a shard.

        Args:
            shard: Its number.
            request: The queries and the columns.

        Returns:
            Ray Serve's response.
        """
        return self._handles[shard].search.remote(*request)

    def reader(self) -> ShardedReader:
        """The index, searched through the deployments.

        Returns:
            A reader for `Searcher`.
        """
        return ShardedReader(self.index, self.ask, self.is_up)

    def end(self) -> None:
        """Take the deployments away."""
        from ray import serve

        self._ended.set()
        for name in self.names:
            try:
                serve.delete(name)
            except Exception as error:
                logger.info(f"Ray Serve keeps {name}: {error}; 'serve shutdown' ends all of its applications")


@contextmanager
def serve_shards(indexes: Sequence[str | Path], address: str, replicas: int = 1) -> Iterator[list[ShardedReader]]:
    """Deploy the shards of indexes on a Ray cluster for the time of a block.

    Args:
        indexes: Paths or URLs, under which every machine of the cluster reaches them.
        address: Of the cluster: "local" starts one on this machine, "auto" finds the one around.
        replicas: Of each shard.

    Yields:
        A reader of each index.

    Raises:
        ConnectionError: No cluster answers.
        RuntimeError: A shard does not start.
        ValueError: `replicas` is below one.
    """
    if replicas < 1:
        raise ValueError(f"{replicas} replicas: at least one")
    deployments = [ShardDeployments(index, replicas) for index in indexes]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.serve

    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    # What it reports of replicas that end is reported here, by the name of the shard.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        cores = ray.cluster_resources().get("CPU", 1.0)
        for each in deployments:
            count = len(each.shards) * replicas
            logger.info(f"{each.index}: starting {count} replicas of {len(each.shards)} shards on Ray")
            each.start(cores / 2 / len(deployments))
        yield [each.reader() for each in deployments]
    finally:
        for each in deployments:
            each.end()
        ray.shutdown()
