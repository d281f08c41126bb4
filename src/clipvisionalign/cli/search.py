"""Commands on indexes: index, search, duplicates, serve."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clipvisionalign.cli.output import _print_found, _write_paths, print_index_report, say
from clipvisionalign.cli.parser import PROGRAM, _parser
from clipvisionalign.counts import with_noun


def index_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "index",
        description="Encode pictures into an index to search. Made again, it encodes only what is new or changed,\n"
        "finds what was moved, and drops what is gone. What cannot be read or decoded is listed.",
        epilog="examples:\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX --metadata years.csv    # then: search --where 'year > 2020'\n"
        f"  {PROGRAM} index RUN flickr8k --captions --out INDEX               # then: search --like a.jpg --captions\n"
        f"  {PROGRAM} index RUN s3://bucket/pictures --out s3://bucket/index  # docs/search.md has the settings\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX --ray auto",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    parser.add_argument(
        "source",
        metavar="FOLDER|DATA",
        help="folder of pictures, with all below it, or a data set's file; a path or a URL",
    )
    parser.add_argument("--out", required=True, help="the index to write, or to bring up to date; a path or a URL")
    parser.add_argument("--captions", action="store_true", help="read a data set, and index its captions as well")
    parser.add_argument("--layout", default="auto", help="how the data set lies there (default: recognise it)")
    parser.add_argument(
        "--group", default="", metavar="COLUMN", help="a data set's column: images of one value of it are of one split"
    )
    parser.add_argument(
        "--metadata",
        default="",
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet: a column of paths, others to filter by",
    )
    parser.add_argument(
        "--ray", nargs="?", const="local", default="", metavar="ADDRESS",
        help="encode on the Ray cluster at an address, or the one around (auto); without one on this machine",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="with --ray: models at work (default: by the cluster)")
    parser.add_argument(
        "--verify", action="store_true", help="read every file: one of the same size and time may hold another picture"
    )
    parser.add_argument(
        "--allow-drop", action="store_true",
        help="drop rows though more than 20 %% of them (of fewer than five: more than one) lose their files at once, "
        "the folder is empty or one below cannot be listed; without it such a run is refused: the drive may not be "
        "mounted",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    return parser


def index(arguments: list[str]) -> int:
    """Make an index, or bring one up to date."""
    given = index_parser().parse_args(arguments)
    from clipvisionalign.search.index import build_index, read_broken

    done = build_index(
        given.run, given.source, given.out, say, captions=given.captions, layout=given.layout,
        metadata=given.metadata, ray=given.ray, workers=given.workers, verify=given.verify,
        allow_drop=given.allow_drop, group=given.group,
    )  # fmt: skip
    if given.json:
        print(json.dumps(done.to_dict() | {"broken_files": read_broken(given.out)}, indent=2))
        return 0
    print_index_report(given.out, done)
    return 0


def search_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "search",
        description='Find pictures of an index by words, by a picture, or by several of both. "^2 red" counts twice.',
        epilog="examples:\n"
        f'  {PROGRAM} search INDEX "a dog on the grass"\n'
        f'  {PROGRAM} search INDEX "beach" --minus "people"\n'
        f'  {PROGRAM} search INDEX "^2 red" "car" --where "width >= 1000"\n'
        f"  {PROGRAM} search INDEX --like a.jpg --sheet found.png\n"
        f"  {PROGRAM} search INDEX --like a.jpg --captions\n"
        f"  {PROGRAM} search INDEX --queries words.txt --json\n"
        f'  {PROGRAM} search INDEX "a dog" --paths --null | xargs -0 ls -l',
    )
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument("words", nargs="*", help="what to look for; several terms are added up")
    parser.add_argument("--minus", action="append", default=[], metavar="WORDS", help="what is not wanted")
    parser.add_argument(
        "--like", action="append", default=[], metavar="PICTURE", help="a picture to look for the like of"
    )
    parser.add_argument(
        "--queries", metavar="FILE", help="a file with one query a line, each on its own ('-': standard input)"
    )
    parser.add_argument("--where", default="", metavar="FILTER", help='such as: width > 1000 and path like "2024/*"')
    parser.add_argument("--count", type=int, default=10, help="pictures to find (default 10)")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="put the first K into a new order by pair scores"
    )
    parser.add_argument("--captions", action="store_true", help="find captions instead of pictures")
    parser.add_argument("--sheet", metavar="FILE", help="also write a sheet of the pictures found, as PNG")
    parser.add_argument("--previews", action="store_true", help="show the pictures in the table, as the terminal can")
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--paths", action="store_true", help="print paths only, for pipes")
    how.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--null", action="store_true", help="with --paths: end each by a zero byte instead of a new line"
    )
    return parser


def search(arguments: list[str]) -> int:
    """Find images or captions of an index; the exit status is 1 where nothing is found."""
    given = search_parser().parse_args(arguments)
    if given.captions and (given.where or given.rerank or given.sheet or given.paths or given.previews):
        raise ValueError("--captions finds texts: leave --where, --rerank, --sheet, --paths and --previews out")
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.data.text_files import decode, split_lines
    from clipvisionalign.search.checks import check_query
    from clipvisionalign.search.files import printable
    from clipvisionalign.search.query import Searcher, Term, parse_term

    minus = [parse_term(text, -1.0) for text in given.minus]
    like = [Term(path, is_picture=True) for path in given.like]
    queries = [(" + ".join([*given.words, *given.like]), [parse_term(text) for text in given.words] + like)]
    if given.queries:
        if given.words or given.like:
            raise ValueError("--queries takes the queries from its file: leave words and --like out")
        text = sys.stdin.read() if given.queries == "-" else decode(Path(given.queries).read_bytes()).text
        lines = [line.strip() for line in split_lines(text)]
        queries = [(line, [parse_term(line)]) for line in lines if line]
    for note in dict.fromkeys(term.note for _, terms in queries for term in [*terms, *minus] if term.note):
        say(f"note: {note}")
    for _, terms in queries:
        check_query(
            given.index, [*terms, *minus], given.count, given.where, given.rerank, given.run, captions=given.captions
        )
    searcher = Searcher(given.index, given.run)
    if unfinished := unfinished_note(searcher.run):
        say(f"note: {unfinished}")
    answers: list[dict[str, Any]] = []
    for words, terms in queries:
        if given.captions:
            texts = searcher.captions(searcher.encode([*terms, *minus]), given.count)
            answers.append({"query": words, "found": [each.to_dict() for each in texts]})
            if not given.json:
                for each in texts:
                    print(f"{each.score:.3f}  {printable(each.text)}  ({printable(each.path)})")
            continue
        found = searcher.search([*terms, *minus], given.count, given.where, given.rerank)
        answers.append({"query": words, "found": [each.to_dict() for each in found]})
        if not found:
            say(f"{printable(words)}: nothing found{f' where {given.where}' if given.where.strip() else ''}")
            continue
        if given.paths:
            _write_paths(searcher, [each.id for each in found], b"\0" if given.null else b"\n")
        elif not given.json:
            thumbnails = searcher.values([each.id for each in found], "thumbnail") if given.previews else {}
            _print_found(words, given.minus, found, thumbnails)
    if given.json:
        print(json.dumps(answers if given.queries else answers[0], indent=2))
    if given.sheet:
        from clipvisionalign.explain.contact_sheet import sheet_of_thumbnails

        everything = [each for answer in answers for each in answer["found"]]
        kept = searcher.values([each["id"] for each in everything], "thumbnail")
        shown = [(kept[each["id"]], f"{each['score']:.3f} {each['path']}") for each in everything]
        sheet_of_thumbnails(shown, "; ".join(words for words, _ in queries)).save(given.sheet, "PNG")
        say(f"{given.sheet}: written")
    return 0 if any(answer["found"] for answer in answers) else 1


def duplicates_parser() -> argparse.ArgumentParser:
    parser = _parser("duplicates", description="List pictures of an index that are the same, or nearly.")
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument(
        "--near", type=float, default=0.985, help="cosine from which on two are nearly the same (default 0.985)"
    )
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    parser.add_argument("--json", action="store_true", help="print the groups as JSON")
    return parser


def duplicates(arguments: list[str]) -> int:
    """List images of an index that are the same, or nearly."""
    given = duplicates_parser().parse_args(arguments)
    from clipvisionalign.search.files import printable
    from clipvisionalign.search.query import Searcher
    from clipvisionalign.search.query import duplicates as groups_of

    groups = groups_of(Searcher(given.index, given.run), given.near)
    if given.json:
        print(
            json.dumps(
                [[{"id": row["id"], "path": row["path"], "hash": row["hash"]} for row in g] for g in groups], indent=2
            )
        )
        return 0
    for number, group in enumerate(groups, 1):
        same = len({row["hash"] for row in group}) == 1
        print(f"{number}. {'the same bytes' if same else 'nearly the same'}:")
        for row in group:
            print(f"   {printable(row['path'])} ({row['size']:,} bytes)")
    print(f"{with_noun(len(groups), 'group')} of pictures that are the same or nearly")
    return 0


def serve_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "serve",
        description="A search page and service over an index, or over two to compare. Bound to this machine unless\n"
        "told otherwise; /docs describes the interface, /metrics is for Prometheus.",
    )
    parser.add_argument("indexes", nargs="+", metavar="INDEX", help="folders that 'index' wrote")
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
    how.add_argument("--token", default="", help="the token itself, which every process list shows: to be removed")
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    return parser


def serve(arguments: list[str]) -> int:
    """Run the search page and service until it is stopped."""
    given = serve_parser().parse_args(arguments)
    from clipvisionalign.search.server.run import read_token
    from clipvisionalign.search.server.run import serve as run_service

    if given.token:
        say("--token shows the token in the list of processes and is to be removed: use --token-file FILE, or the "
            "environment variable CLIPVISIONALIGN_TOKEN")  # fmt: skip
    token = read_token(given.token, given.token_file)
    run_service(given.indexes, given.host, given.port, token, given.run, say)
    return 0
