"""Odd inputs to each reader, by hypothesis, for as long as wanted: what is raised that should not be.

    python benchmarks/fuzz.py READER [--minutes 10] [--seed 0] [--json]

A reader's line in `FUZZES` names the inputs, and the check that each of them has to pass; a short form of each, with a
fixed seed, runs in `make test`. Every round of `ROUND` inputs has a seed of its own, which is printed where it fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the inputs of the short forms are made

#: Inputs that are tried between two looks at the clock.
ROUND = 500

#: The inputs of a reader, and what has to hold of each of them: it raises where it does not.
Fuzz = tuple[SearchStrategy[Any], Callable[[Any], None]]


def exif() -> Fuzz:
    """EXIF blocks in JPEG, PNG and WebP: none of them costs the image that it stands in."""
    from odd_images import check_exif, exif_blocks

    return exif_blocks(), check_exif


def shards() -> Fuzz:
    """Shards with any members in any order: each sample is read or listed."""
    from odd_shards import hold, shards

    return shards(), _in_folder(hold)


def tables() -> Fuzz:
    """Delimited tables, lists of captions, JSON lines, of any bytes: each row is read or listed, or all is refused."""
    from odd_tables import check_table, tables

    return tables(), _in_folder(lambda folder, table: check_table(table, folder))


def json_files() -> Fuzz:
    """The layouts of one JSON file, with rows of any form: each is read or listed, and spoils no other."""
    from odd_tables import check_json, json_files

    return json_files(), _in_folder(lambda folder, file: check_json(file, folder))


def _in_folder(check: Callable[[Path, Any], Any]) -> Callable[[Any], None]:
    """A check with a folder of its own for each input."""

    def fresh(value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder), value)

    return fresh


def metadata() -> Fuzz:
    """Tables of metadata, as CSV, TSV and JSON lines: each row is of one image or listed, each cell as written."""
    from metadata_tables import check_table, tables

    return tables(), _in_folder(lambda folder, table: check_table(table, folder))


#: The readers, by the name that the command takes.
FUZZES: dict[str, Callable[[], Fuzz]] = {
    "exif": exif,
    "shards": shards,
    "tables": tables,
    "json": json_files,
    "metadata": metadata,
}


def fuzz(name: str, minutes: float, first_seed: int) -> dict[str, Any]:
    """Try inputs for so many minutes; how many were tried, and what failed, smallest input first of its round."""
    inputs, check = FUZZES[name]()
    until, tried, failures = time.monotonic() + 60 * minutes, 0, []
    number = first_seed

    def counted(value: Any) -> None:
        nonlocal tried
        tried += 1
        check(value)

    while time.monotonic() < until:
        options = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
        )
        try:
            seed(number)(options(given(inputs)(counted)))()
        except Exception:
            failures.append({"seed": number, "error": traceback.format_exc(limit=-3)})
        number += 1
    return {"reader": name, "minutes": minutes, "rounds": number - first_seed, "inputs": tried, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", choices=sorted(FUZZES), metavar="READER", help=", ".join(sorted(FUZZES)))
    parser.add_argument("--minutes", type=float, default=10, help="for each reader (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given_ = parser.parse_args()
    results = [fuzz(name, given_.minutes, given_.seed) for name in given_.readers]
    if given_.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(f"{result['reader']}: {result['inputs']:,} inputs, {len(result['failures'])} rounds failed")
            for failure in result["failures"]:
                print(f"seed {failure['seed']}:\n{failure['error']}")
    return 1 if any(result["failures"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
