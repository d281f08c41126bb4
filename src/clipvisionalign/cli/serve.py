"""`serve`: the search page and its HTTP interface."""

from __future__ import annotations

import argparse
import logging

from clipvisionalign.cli.parser import add_offline_flag, command_parser

logger = logging.getLogger(__name__)


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `serve`."""
    parser = command_parser(
        "serve",
        description="Serve a search page and an HTTP interface for an index, or for two to compare. Bound to this\n"
        "machine unless set otherwise; /docs describes the interface, /metrics is for Prometheus. Of a folder of\n"
        "images an index is made first, or updated, in the user's cache folder.",
    )
    parser.add_argument(
        "indexes", nargs="+", metavar="INDEX|FOLDER",
        help="folders that 'index' wrote; or folders of images, which the starter model encodes (or --run)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--token-file", default="", metavar="FILE",
        help="file whose one line is asked of every request; the environment variable CLIPVISIONALIGN_TOKEN gives the "
        "token as well. One of them is needed where --host opens the network",
    )  # fmt: skip
    how.add_argument("--token", default="", help="the token itself, which every process list shows: deprecated")
    parser.add_argument(
        "--run", default="", help="where the aligner is, if it was moved; of a folder of images, the one that encodes"
    )
    parser.add_argument(
        "--read-only", action="store_true",
        help="write nothing to an index: store neither queries that are judged on the page nor decisions on duplicates",
    )  # fmt: skip
    parser.add_argument(
        "--ray", nargs="?", const="local", default="", metavar="ADDRESS",
        help="search each shard in processes of its own on the Ray cluster at an address, or the one around (auto); "
        "without one on this machine. A shard that does not answer is named with the result",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, default=None, metavar="N", help="with --ray: processes for each shard (default 1)"
    )
    add_offline_flag(parser)
    return parser


def serve(arguments: list[str]) -> int:
    """Run the search page and its HTTP interface until it is stopped.

    Args:
        arguments: The command's arguments.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: Flags do not fit each other.
    """
    args = serve_parser().parse_args(arguments)
    if args.replicas is not None and not args.ray:
        raise ValueError("--replicas sets how many processes of a Ray cluster search each shard: give --ray too")
    if args.replicas is not None and args.replicas < 1:
        raise ValueError(f"--replicas {args.replicas}: at least one")
    from clipvisionalign.search.folder_index import index_folder, is_image_folder
    from clipvisionalign.search.server.run import bind_sockets, read_token
    from clipvisionalign.search.server.run import run_server as run_service

    if args.token:
        instead = "use --token-file FILE, or the environment variable CLIPVISIONALIGN_TOKEN"
        logger.info(f"--token shows the token in the list of processes and is to be removed: {instead}")
    token = read_token(args.token, args.token_file)
    # Before a folder is indexed, which takes its time.
    for each in bind_sockets(args.host, args.port):
        each.close()
    indexes = [str(index_folder(name, args.run)) if is_image_folder(name) else name for name in args.indexes]
    run_service(
        indexes, args.host, args.port, token, args.run, read_only=args.read_only, ray=args.ray,
        replicas=args.replicas or 1,
    )  # fmt: skip
    return 0
