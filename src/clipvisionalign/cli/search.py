"""Commands on indexes: index, search."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import print_hits, print_index_report, write_paths
from clipvisionalign.cli.parser import MODEL_HELP, PROGRAM, add_offline_flag, command_parser
from clipvisionalign.counts import count_noun

if TYPE_CHECKING:
    from clipvisionalign.search.promise import SearchResult
    from clipvisionalign.search.queries import SearchQuery
    from clipvisionalign.search.searcher import Hits, Searcher

logger = logging.getLogger(__name__)

#: A pattern as SQL has them, with the % that stands for itself here.
_SQL_PATTERN = re.compile(r"""\blike\s+(?:"[^"*]*%[^"*]*"|'[^'*]*%[^'*]*')""", re.IGNORECASE)
#: Queries of a file that are searched for together.
QUERIES_PER_BATCH = 64


def index_parser() -> argparse.ArgumentParser:
    """The parser of `index`."""
    parser = command_parser(
        "index",
        description="Encode images into an index to search. A repeated call encodes only new and changed files,\n"
        "recognises moved ones, and drops those that are gone. Files that cannot be read or decoded are listed.",
        epilog="examples:\n"
        f"  {PROGRAM} index images/ --out INDEX                              # with the starter model\n"
        f"  {PROGRAM} index RUN images/ --out INDEX\n"
        f"  {PROGRAM} index RUN images/ --out INDEX --metadata years.csv    # then: search --where 'year > 2020'\n"
        f"  {PROGRAM} index RUN flickr8k --captions --out INDEX               # then: search --like a.jpg --captions\n"
        f"  {PROGRAM} index RUN s3://bucket/images --out s3://bucket/index  # docs/search.md has the settings\n"
        f"  {PROGRAM} index RUN images/ --out INDEX --ray auto\n"
        f"  {PROGRAM} index RUN images/ --out INDEX --shards 4",
    )
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        default="",
        help=f"{MODEL_HELP}; without one, the model of the index that is there already, else the starter model",
    )
    parser.add_argument(
        "source",
        metavar="FOLDER|DATA",
        help="folder of images, with all below it, or a data set's file; a path or a URL",
    )
    parser.add_argument("--out", required=True, help="the index to write or to update; a path or a URL")
    parser.add_argument("--captions", action="store_true", help="read a data set, and index its captions as well")
    parser.add_argument("--layout", default="auto", help="dataset layout (default: recognised)")
    parser.add_argument(
        "--group", default="", metavar="COLUMN", help="a data set's column: images of one value of it are of one split"
    )
    parser.add_argument(
        "--metadata",
        default="",
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet: a column of paths, others to filter by",
    )
    _add_patch_flags(parser)
    parser.add_argument(
        "--ray", nargs="?", const="local", default="", metavar="ADDRESS",
        help="encode on the Ray cluster at an address, or the one around (auto); without one on this machine",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0, help="with --ray: number of models that encode (default: by the cluster)"
    )
    parser.add_argument(
        "--shards", type=int, default=None, metavar="N",
        help="deal the images of a new index to N complete indexes below it, shard-00 and on, which are searched as "
        "one; later updates need no flag",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="read every file: one of the same size and time may hold another image"
    )
    parser.add_argument(
        "--allow-drop", action="store_true",
        help="drop rows though more than 20 %% of them (of fewer than five: more than one) lose their files at once, "
        "the folder is empty or one below cannot be listed; without it such a run is refused: the drive may not be "
        "mounted",
    )  # fmt: skip
    parser.add_argument(
        "--vectors", default="", metavar="FORM",
        help="how the memory-mapped lists of an index of more than 100,000 images keep vectors: float32, float16, "
        "int8 (default) or binary; candidates are compared again by the full vectors",
    )  # fmt: skip
    parser.add_argument(
        "--vector-width", type=int, default=0, metavar="N",
        help="numbers of a vector, from its beginning, that the lists keep (default: all)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_offline_flag(parser)
    return parser


def _add_patch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patches", nargs="?", const=0, type=int, metavar="N",
        help="of a run of the design late or cross: keep the patches of images, in 8 bits, so that --rerank opens no "
        "image; with N, groups of so many similar ones as one. Later updates keep them too",
    )  # fmt: skip
    parser.add_argument(
        "--late", action="store_true",
        help="of a run of the design late: keep patches, as --patches does, and centroids of them, by which 'search "
        "--late' ranks all images by late interaction. Later updates keep them too",
    )  # fmt: skip


def index(arguments: list[str]) -> int:
    """Build an index of a folder or data set, or update one.

    Args:
        arguments: The command's arguments.

    Returns:
        The exit status: 0.
    """
    # Flags may stand between the run and the folder.
    args = index_parser().parse_intermixed_args(arguments)
    from clipvisionalign.search.broken_files import read_broken_files
    from clipvisionalign.search.folder_index import default_run
    from clipvisionalign.search.indexer import build_index

    run = args.run or default_run(args.source, args.out)
    index_report = build_index(
        run, args.source, args.out, captions=args.captions, layout=args.layout,
        metadata=args.metadata, ray=args.ray, workers=args.workers, verify=args.verify,
        allow_drop=args.allow_drop, group=args.group, patches=args.patches, vectors=args.vectors,
        vector_width=args.vector_width, shards=args.shards, late=args.late,
    )  # fmt: skip
    if args.json:
        print(json.dumps(index_report.to_dict() | {"broken_files": read_broken_files(args.out)}, indent=2))
        return 0
    print_index_report(args.out, index_report)
    return 0


def search_parser() -> argparse.ArgumentParser:
    """The parser of `search`."""
    parser = command_parser(
        "search",
        description='Find images of an index by words, by an image, or by several of both. "^2 red" counts twice.',
        epilog="examples:\n"
        f'  {PROGRAM} search INDEX "a dog on the grass"\n'
        f'  {PROGRAM} search INDEX "beach" --minus "people"\n'
        f'  {PROGRAM} search INDEX "^2 red" "car" --where "width >= 1000"\n'
        f'  {PROGRAM} search INDEX "a dog" --where \'path like "2024/*" and not (width < 500 or height < 500)\'\n'
        f"  {PROGRAM} search INDEX \"a dog\" --where 'taken = 2023-05 and near(48.1, 11.6, 20km)'\n"
        f"  {PROGRAM} search INDEX --like a.jpg --sheet found.png\n"
        f'  {PROGRAM} search INDEX "a dog on the grass" --promise 0.9\n'
        f'  {PROGRAM} search INDEX "a dog on the grass" --within 50ms\n'
        f'  {PROGRAM} search INDEX "a dog on the grass" --late\n'
        f"  {PROGRAM} search INDEX --like a.jpg --captions\n"
        f"  {PROGRAM} search INDEX --queries words.txt --json\n"
        f'  {PROGRAM} search INDEX "a dog" --paths --null | xargs -0 ls -l',
    )
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument("words", nargs="*", help="terms to search for; several are added up")
    parser.add_argument("--minus", action="append", default=[], metavar="WORDS", help="words to avoid")
    parser.add_argument("--like", action="append", default=[], metavar="IMAGE", help="an image to search by")
    parser.add_argument("--queries", metavar="FILE", help="a file with one query per line ('-': standard input)")
    parser.add_argument(
        "--where", default="", metavar="FILTER", help='filter, such as: width > 1000 and path like "2024/*"'
    )
    parser.add_argument(
        "--count", type=int, default=None, help="images to find (default 10; with --promise as many as it needs)"
    )
    parser.add_argument(
        "--promise", type=float, default=0.0, metavar="P",
        help="find as many images as hold what is meant with probability P, such as 0.9, or none where nothing fits; "
        "the index is calibrated by 'calibrate'",
    )  # fmt: skip
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="re-rank the first K by pair scores (designs late and cross)"
    )
    parser.add_argument(
        "--within", default="", metavar="TIME",
        help="re-rank the first hits whose order is unsure, as far as this time of a query lasts, such as 50ms; which "
        "are unsure 'calibrate' measures, --rerank limits (default 32)",
    )  # fmt: skip
    parser.add_argument(
        "--late", action="store_true",
        help="rank all images by late interaction, not only the nearest vectors; of an index by 'index --late', and "
        "without --rerank, --within, --captions and --promise",
    )  # fmt: skip
    parser.add_argument("--captions", action="store_true", help="find captions instead of images")
    parser.add_argument("--sheet", metavar="FILE", help="also write a sheet of the images found, as PNG")
    parser.add_argument("--previews", action="store_true", help="show the images in the table, as the terminal can")
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--paths", action="store_true", help="print paths only, for pipes")
    how.add_argument("--json", action="store_true", help="print the hits as JSON")
    add_offline_flag(parser)
    parser.add_argument(
        "--null", action="store_true", help="with --paths: end each by a zero byte instead of a new line"
    )
    return parser


def search(arguments: list[str]) -> int:
    """Find images or captions of an index.

    Args:
        arguments: The command's arguments.

    Returns:
        The exit status: 1 if no query has a hit.

    Raises:
        ValueError: Flags do not fit each other, or a query is not valid.
    """
    args = search_parser().parse_args(arguments)
    not_of_texts = (args.where, args.rerank, args.within, args.late, args.sheet, args.paths, args.previews)
    if args.captions and any(not_of_texts):
        raise ValueError(
            "--captions finds texts: leave --where, --rerank, --within, --late, --sheet, --paths and --previews out"
        )
    from clipvisionalign.search.checks import check_query
    from clipvisionalign.search.manifest import is_gone
    from clipvisionalign.search.promise import SearchResult
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.storage import printable

    queries = _read_queries(args)
    for word in args.words:
        if _is_index(word):
            logger.info(f"note: '{printable(word)}' is an index, and taken as words: 'search' takes one index")
    for note in dict.fromkeys(term.note for _, query in queries for term in query.terms if term.note):
        logger.info(f"note: {note}")
    for _, query in queries:
        check_query(args.index, query, args.run)
    searcher = Searcher(args.index, args.run)
    if not (searcher.run / "results.json").is_file():
        from clipvisionalign.data.run_data import unfinished_note

        if unfinished := unfinished_note(searcher.run):
            logger.info(f"note: {unfinished}")
    if searcher.manifest.folder and is_gone(searcher.manifest.folder):
        logger.info(
            f"note: {printable(searcher.manifest.folder)}, where the images were, is gone; if it was moved, "
            f"'{PROGRAM} index NEW_FOLDER --out {printable(args.index)}' records where it is, and encodes nothing again"
        )
    results: list[dict[str, Any]] = []
    for start in range(0, len(queries), QUERIES_PER_BATCH):
        batch = queries[start : start + QUERIES_PER_BATCH]
        for (text, _), hits in zip(batch, searcher.search_batch([query for _, query in batch]), strict=True):
            if isinstance(hits, Exception):
                raise hits
            verdict = hits.verdict() if isinstance(hits, SearchResult) else {}
            results.append({"query": text, "found": [each.to_dict() for each in hits], **verdict})
            _print_result(args, searcher, text, hits)
            if isinstance(hits, SearchResult):
                _print_verdict(args, text, hits)
    if args.json:
        print(json.dumps(results if args.queries else results[0], indent=2))
    if args.sheet:
        _write_sheet(args.sheet, searcher, results)
    return 0 if any(result["found"] for result in results) else 1


def _is_index(word: str) -> bool:
    """Whether a word of a query is the path of an index."""
    if not os.path.isdir(word):
        return False
    from clipvisionalign.search.manifest import read_whole_manifest

    try:
        read_whole_manifest(word)
    except (OSError, ValueError):
        return False
    return True


def _read_queries(args: argparse.Namespace) -> list[tuple[str, SearchQuery]]:
    """The queries of the command line, or of the file of --queries, with their texts."""
    from clipvisionalign.data.text_files import decode, split_lines
    from clipvisionalign.search.queries import NO_COUNT, SearchQuery
    from clipvisionalign.search.terms import Term, parse_term
    from clipvisionalign.search.time_limit import parse_seconds

    count = NO_COUNT if args.count is None else args.count
    minus = [parse_term(text, -1.0) for text in args.minus]
    like = [Term(path, is_image=True) for path in args.like]
    terms = [(" + ".join([*args.words, *args.like]), [*(parse_term(text) for text in args.words), *like])]
    if args.queries:
        if args.words or args.like:
            raise ValueError("--queries takes the queries from its file: leave words and --like out")
        text = sys.stdin.read() if args.queries == "-" else decode(Path(args.queries).read_bytes()).text
        lines = [line.strip() for line in split_lines(text)]
        terms = [(line, [parse_term(line)]) for line in lines if line]
    within = parse_seconds(args.within) if args.within else 0.0
    shared = (count, args.where, args.rerank, args.captions, args.promise)
    return [(text, SearchQuery([*wanted, *minus], *shared, within=within, late=args.late)) for text, wanted in terms]


def _print_result(args: argparse.Namespace, searcher: Searcher, query: str, hits: Hits) -> None:
    """Print the hits of one query: captions, paths or a table of images; with --json only that there are none."""
    from clipvisionalign.search.hits import CaptionHit, Hit
    from clipvisionalign.search.storage import printable

    image_hits = [each for each in hits if isinstance(each, Hit)]
    if args.captions:
        for each in hits:
            if isinstance(each, CaptionHit) and not args.json:
                print(f"{each.score:.3f}  {printable(each.text)}  ({printable(each.path)})")
    elif not image_hits:
        reason = getattr(hits, "reason", "")
        where = f" where {args.where}" if args.where.strip() else ""
        if _SQL_PATTERN.search(args.where):
            where += " (in 'like' a * stands for anything, and % for itself)"
        logger.info(f"{printable(query)}: nothing found{where}{f': {printable(reason)}' if reason else ''}")
    elif args.paths:
        ids = [each.id for each in image_hits]
        raw_paths = searcher.values(ids, "raw")
        write_paths(str(searcher.storage), [raw_paths[image_id] for image_id in ids], b"\0" if args.null else b"\n")
    elif not args.json:
        thumbnails = searcher.values([each.id for each in image_hits], "thumbnail") if args.previews else {}
        print_hits(query, args.minus, image_hits, thumbnails)


def _print_verdict(args: argparse.Namespace, query: str, result: SearchResult) -> None:
    """Print up to where the hits hold what is meant, and whether they fit at all, on standard error."""
    from clipvisionalign.search.storage import printable

    for note in result.notes:
        logger.info(f"note: {printable(note)}")
    if result.reason and result:
        logger.info(f"{printable(query)}: nothing fits: {printable(result.reason)}; these are the nearest all the same")
    if result.spent is not None and not args.json:
        logger.info(f"note: {printable(query)}: {result.spent.describe()}")
    promise = result.promise
    if promise is None or not result or args.json:
        return
    if not args.promise and (result.reason or any(getattr(hit, "pair_score", None) is not None for hit in result)):
        # The line of a promise is one of cosines: it does not hold for hits in another order.
        return
    percent = f"{100 * promise.level:g} %"
    shown = f"; showing the first {len(result):,}" if len(result) < promise.promised else ""
    if args.promise:
        images = count_noun(promise.promised, "image")
        verb = "is" if promise.promised == 1 else "are"
        line = f"{images} {verb} needed to hold what is meant in {percent} of all cases{shown}"
    elif promise.more or promise.promised > len(result):
        line = (
            f"more than these may fit: --promise {promise.level:g} shows all that are needed for {percent} of all cases"
        )
    elif not promise.promised:
        line = f"none of these fits as well as what is meant does in {percent} of all cases"
    else:
        line = f"in {percent} of all cases what is meant is among the first {promise.promised} of these"
    name = f"{printable(query)}: " if args.queries else ""
    logger.info(f"{name}{line}, in collections like {promise.calibrated_on}")


def _write_sheet(file: str, searcher: Searcher, results: list[dict[str, Any]]) -> None:
    """Write the images of all results on one sheet."""
    from clipvisionalign.explain.contact_sheet import thumbnail_sheet

    hits = [each for result in results for each in result["found"]]
    thumbnails = searcher.values([each["id"] for each in hits], "thumbnail")
    entries = [(thumbnails[each["id"]], f"{each['score']:.3f} {each['path']}") for each in hits]
    thumbnail_sheet(entries, "; ".join(result["query"] for result in results)).save(file, "PNG")
    logger.info(f"{file}: written")
