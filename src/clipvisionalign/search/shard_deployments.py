"""The shards of an index as deployments of Ray Serve: each is searched where its replicas run, answers are merged here.

A deployment holds one shard; Ray starts a replica again that ends. `ShardedReader` asks through `ShardDeployments.ask`,
and names the shards that do not answer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipvisionalign.search.index_reader import VectorQuery
from clipvisionalign.search.manifest import read_shards, read_whole_manifest
from clipvisionalign.search.ray_cluster import LOCAL_RAY, connected_to_ray
from clipvisionalign.search.shard_replicas import ShardResponse, ShardSearch
from clipvisionalign.search.sharded_reader import ShardedReader
from clipvisionalign.search.storage import as_storage

logger = logging.getLogger(__name__)

#: Seconds between two questions which replicas run, and between Ray's own to each of them.
STATE_SECONDS, HEALTH_SECONDS = 0.5, 1.0
#: Seconds without a word of Ray Serve after which a shard is down that has not answered meanwhile either.
SILENT_SECONDS = 10.0
#: Seconds within which all shards have to be open at the start, and within which they are taken away at the end.
START_SECONDS, END_SECONDS = 300.0, 8.0
#: Requests that a replica answers at the same time.
CONCURRENT_REQUESTS = 16


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
        self.aligner = read_whole_manifest(index).aligner
        shards = read_shards(index)
        # A relative path means another folder where Ray was started.
        self.index, self.replicas = as_storage(index).location, replicas
        self.shards = list(shards.shards) if shards else [""]
        prefix = f"clipvisionalign-{uuid.uuid4().hex[:8]}"
        self.names = [f"{prefix}-{shard or 'index'}" for shard in self.shards]
        self._handles: list[Any] = []
        #: For each shard the number of replicas that run, and when the only one was last seen to be lost.
        self._running = [0] * len(self.shards)
        self._lost = [0.0] * len(self.shards)
        #: When Ray Serve last gave its state, and when each shard last answered.
        self._state_time = time.monotonic()
        self._answer_times = [0.0] * len(self.shards)
        self._ended = threading.Event()

    def start(self, cores: float) -> None:
        """Deploy all shards, and wait until they answer.

        Args:
            cores: Processor cores of the cluster that replicas reserve, a share each, and none more than one.

        Raises:
            RuntimeError: A shard does not start.
        """
        from ray import serve

        # Rounded down: a service reserves half of the cluster at most, so that another one fits beside it.
        share = min(1.0, math.floor(1000 * cores / len(self.shards) / self.replicas) / 1000)
        deployment = serve.deployment(
            ShardSearch, num_replicas=self.replicas, max_ongoing_requests=CONCURRENT_REQUESTS,
            health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=10 * HEALTH_SECONDS,
            graceful_shutdown_timeout_s=HEALTH_SECONDS, ray_actor_options={"num_cpus": share},
        )  # fmt: skip
        targets = [
            serve.RunTarget(deployment.bind(self.index, shard, self.aligner), name=name, route_prefix=None)
            for shard, name in zip(self.shards, self.names, strict=True)
        ]
        handles = [handle.search for handle in serve.run_many(targets, wait_for_applications_running=False)]
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
        for watch in (self._watch_replicas, self._watch_cluster):
            threading.Thread(target=watch, name=watch.__name__.strip("_"), daemon=True).start()

    def _read_states(self) -> list[int]:
        from ray import serve

        asked, applications = time.monotonic(), serve.status().applications
        self._state_time = time.monotonic()
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

        applications = [each for name, each in serve.status().applications.items() if name in self.names]
        deployments = [deployment for each in applications for deployment in each.deployments.values()]
        failed = [each.message for each in deployments if each.status_trigger == "REPLICA_STARTUP_FAILED"]
        failed += [each.message for each in applications if each.status == "DEPLOY_FAILED"]
        messages = failed or [each.message for each in deployments if is_late]
        last_lines = [message.strip().splitlines()[-1] for message in messages if message.strip()]
        return next(iter(last_lines), f"not within {START_SECONDS:g} s" if is_late else "")

    def _watch_replicas(self) -> None:
        while not self._ended.wait(STATE_SECONDS):
            try:
                self._read_states()
            except Exception as error:
                # The cluster is gone, or busy.
                logger.debug(f"Ray Serve does not give its state: {error}")

    def _watch_cluster(self) -> None:
        """Say that the cluster is gone: whoever asks it for its state then waits."""
        is_silent = False
        while not self._ended.wait(STATE_SECONDS):
            was_silent, is_silent = is_silent, time.monotonic() - self._state_time >= SILENT_SECONDS
            if is_silent and not was_silent:
                logger.warning(f"{self.index}: the Ray cluster does not answer; Ray ends this command after a minute")

    def is_up(self, shard: int) -> bool:
        """Whether a replica of a shard runs.

        Args:
            shard: Its number.

        Returns:
            Whether one does.
        """
        return self._running[shard] > 0

    def is_heard(self, shard: int) -> bool:
        """Whether a replica of a shard runs as far as is known: the cluster said so, or it answered, a moment ago.

        Args:
            shard: Its number.

        Returns:
            Whether one does.
        """
        last = max(self._state_time, self._answer_times[shard])
        return self.is_up(shard) and time.monotonic() - last < SILENT_SECONDS

    def lost(self, shard: int) -> None:
        """The only replica of a shard has died: it is not asked until Ray reports that one runs again.

        Args:
            shard: Its number.
        """
        self._lost[shard] = time.monotonic()
        self._set_running(shard, 0)

    def answered(self, shard: int) -> None:
        """A replica of a shard has answered.

        Args:
            shard: Its number.
        """
        self._answer_times[shard] = time.monotonic()

    def ask(self, shard: int, queries: Sequence[VectorQuery], columns: Sequence[str]) -> ShardResponse:
        """Ask a shard for its nearest rows (`AskShard`).

        Args:
            shard: Its number.
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            The answer to wait for.
        """
        return ShardResponse(self, shard, (list(queries), list(columns)))

    def send(self, shard: int, request: tuple[list[VectorQuery], list[str]]) -> Any:
        """Send a request to a replica of a shard.

        Args:
            shard: Its number.
            request: The queries and the columns.

        Returns:
            Ray Serve's response.
        """
        return self._handles[shard].remote(*request)

    def reader(self) -> ShardedReader:
        """The index, searched through the deployments.

        Returns:
            A reader for `Searcher`.
        """
        return ShardedReader(self.index, self.ask, self.is_heard)

    def end(self) -> None:
        """Ask Ray Serve to take the deployments away, without waiting for it."""
        from ray import serve

        self._ended.set()
        for name in self.names:
            # One that was never deployed is gone.
            with suppress(Exception):
                serve.delete(name, _blocking=False)


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
        InvalidIndexError: There is no index.
        RuntimeError: A shard does not start.
        ValueError: `replicas` is below one.
    """
    if replicas < 1:
        raise ValueError(f"{replicas} replicas: at least one")
    deployments = [ShardDeployments(index, replicas) for index in indexes]
    with connected_to_ray(address):
        import ray
        from ray import serve

        # What it reports of replicas that end is reported here, by the name of the shard.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        is_first = not _has_serve()
        try:
            # Without its HTTP server: the requests come to the service, which encodes, filters and merges.
            serve.start(proxy_location="Disabled")
            cores = ray.cluster_resources().get("CPU", 1.0)
            for each in deployments:
                count = len(each.shards) * replicas
                logger.info(f"{each.index}: starting {count} replicas of {len(each.shards)} shards on Ray")
                each.start(cores / 2 / len(deployments))
            yield [each.reader() for each in deployments]
        finally:
            for each in deployments:
                each.end()
            if address != LOCAL_RAY:
                _wait_until_gone({name for each in deployments for name in each.names}, is_first)


def _has_serve() -> bool:
    """Whether Ray Serve runs on the cluster already."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _wait_until_gone(names: set[str], is_first: bool) -> None:
    """Wait until applications are gone, and end Ray Serve itself where these were its first and only ones."""
    from ray import serve

    limit, left = time.monotonic() + END_SECONDS, names
    try:
        while left and time.monotonic() < limit:
            there = set(serve.status().applications)
            left = names & there
            if is_first and there <= names:
                serve.shutdown()
                return
            time.sleep(0.2)
    except Exception as error:
        logger.info(f"Ray Serve does not answer: {error}")
    if left:
        logger.info(
            f"Ray Serve is still ending {', '.join(sorted(left))}; 'serve shutdown' ends all of its applications"
        )
