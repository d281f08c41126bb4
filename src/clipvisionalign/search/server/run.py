"""Starting the service: its token, its address, uvicorn."""

import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clipvisionalign.data.run_data import unfinished_note
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.server.settings import ServiceSettings
from clipvisionalign.search.sharded_reader import ShardedReader

logger = logging.getLogger(__name__)

#: The environment variable that holds the token.
TOKEN_VARIABLE = "CLIPVISIONALIGN_TOKEN"
#: How long requests that are being answered may take once the service is stopped.
SHUTDOWN_SECONDS = 10
#: Connections that wait to be accepted.
BACKLOG = 2048


def read_token(value: str = "", file: str | Path = "") -> str:
    """The token of the service: from a file, else as it is given, else from the environment.

    Args:
        value: The token itself, "" for none.
        file: A file whose only line is the token, "" for none.

    Returns:
        The token; "" where there is none.

    Raises:
        ValueError: The file is empty, or no header can carry the token.
        FileNotFoundError: There is no such file.
    """
    if file:
        token, source = Path(file).read_text(encoding="utf-8").strip(), str(file)
        if not token:
            raise ValueError(f"{source}: no token in it")
    elif value:
        token, source = value, "--token"
    else:
        token, source = ServiceSettings().token.get_secret_value(), TOKEN_VARIABLE
    if not token.isprintable() or token != token.strip():
        raise ValueError(f"{source}: a token is one line of printable characters, without blanks around it")
    return token


def run_server(
    indexes: Sequence[str], host: str = "127.0.0.1", port: int = 8000, token: str = "", run: str = "", *,
    read_only: bool = False, ray: str = "", replicas: int = 1,
) -> None:  # fmt: skip
    """Serve one index, or several side by side, until stopped.

    Args:
        indexes: Paths or URLs of the indexes.
        host: Address to listen on; one other than loopback requires a token.
        port: Port to listen on.
        token: The token; "" for none.
        run: Where the aligner is, if it was moved; "" for where the indexes have it.
        read_only: Whether judged queries and decisions on duplicates are refused, so that nothing is written.
        ray: Address of a Ray cluster that searches the shards; "local" for one on this machine, "" for this process.
        replicas: Of each shard, on a cluster.

    Raises:
        ValueError: It would be open to the network without a token.
        OSError: The port is in use, or the host is none of this machine.
        InvalidIndexError: An index cannot be opened.
        ConnectionError: No cluster answers.
        RuntimeError: A shard does not start on the cluster.
    """
    loopback = host in ("127.0.0.1", "localhost", "::1")
    if not loopback and not token:
        raise ValueError(
            f"--host {host} opens the images to the network: set a --token-file FILE, or {TOKEN_VARIABLE} "
            "in the environment"
        )
    with ExitStack() as stack:
        # First: all else takes its time.
        sockets = [stack.enter_context(each) for each in bind_sockets(host, port)]
        readers: Sequence[ShardedReader | None] = [None] * len(indexes)
        if ray:
            from clipvisionalign.search.shard_deployments import serve_shards

            readers = stack.enter_context(serve_shards(indexes, ray, replicas))
        searchers = [Searcher(index, run, reader=reader) for index, reader in zip(indexes, readers, strict=True)]
        _serve(searchers, sockets, host, token, loopback, read_only)


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Reserve a port, before anything listens on it.

    Args:
        host: Name or address.
        port: Port; 0 for any that is free.

    Returns:
        A socket for each address of the host that this machine has.

    Raises:
        OSError: The port is in use, or the host is none of this machine.
        ValueError: It is no number of a port.

    >>> (bound,) = bind_sockets("127.0.0.1", 0)
    >>> with bound:
    ...     bound.getsockname()[0]
    '127.0.0.1'
    """
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}: from 0, for any that is free, to 65535")
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            try:
                sockets.append(_bind(socket.socket(family, kind, protocol), address))
            except OSError as error:
                # A name may have an address of IPv6 on a machine without it.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                refused = error
        if not sockets and refused is not None:
            raise refused
    except OSError as error:
        for each in sockets:
            each.close()
        raise _port_error(host, port, error) from None
    return sockets


def _port_error(host: str, port: int, error: OSError) -> OSError:
    way_out = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
    return OSError(f"{host}, port {port}: {error.strerror or error}: {way_out}")


def _bind(unbound: socket.socket, address: Any) -> socket.socket:
    try:
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if unbound.family == socket.AF_INET6:
            unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        unbound.bind(address)
    except OSError:
        unbound.close()
        raise
    return unbound


def _serve(
    searchers: Sequence[Searcher], sockets: Sequence[socket.socket], host: str, token: str, loopback: bool,
    read_only: bool,
) -> None:  # fmt: skip
    """Serve open indexes until stopped."""
    import uvicorn

    for searcher in searchers:
        # Images, re-ranking and explanations load the rest when they are first asked for, beside searches by words.
        searcher.encoder.load()
    for note in dict.fromkeys(filter(None, (unfinished_note(searcher.run) for searcher in searchers))):
        logger.info(f"note: {note}")
    # A page elsewhere must not reach a service on loopback by a name that it makes point there.
    hosts = ["localhost", "127.0.0.1", "[::1]", "::1"] if loopback else ["*"]
    app = create_app(searchers, token, hosts=hosts, read_only=read_only)
    # All addresses of a machine are none that another one can open.
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    port = sockets[0].getsockname()[1]
    try:
        # Here, as uvloop serves nothing where this fails: of two that have reserved a port the first one has it.
        for each in sockets:
            each.listen(BACKLOG)
    except OSError as error:
        raise _port_error(host, port, error) from None
    logger.info(f"{page_url(shown, port, token)} (Ctrl-C stops it; /docs describes the interface)")
    # Ctrl-C does not wait longer for a client that never sends the rest of its request.
    config = uvicorn.Config(
        app, log_level="warning", backlog=BACKLOG, timeout_keep_alive=15, timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(list(sockets))


def page_url(host: str, port: int, token: str = "") -> str:
    """The link to the page, whatever characters the token has.

    Args:
        host: Host name or address.
        port: Port.
        token: The token; "" for none.

    Returns:
        The URL.

    >>> page_url("::1", 8000, "a b")
    'http://[::1]:8000/?token=a%20b'
    """
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")
