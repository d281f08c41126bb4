"""What benchmarks of several runs share: their words on the command line, each run with its data, the figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def over_runs(parser: argparse.ArgumentParser, measured: Callable[[str, str, argparse.Namespace], Any]) -> None:
    """Measure every run that is named, on the data that is given or its own, and print the figures."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="trained runs")
    parser.add_argument("--data", help="data set (default: each run's own)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    results = []
    for run in given.runs:
        source = given.data or json.loads((Path(run) / "data.json").read_text())["source"]
        results.append(measured(run, source, given))
        print(f"{run}: done", file=sys.stderr)
    if given.json:
        print(json.dumps(results, indent=2))
        return
    for each in results:
        print("\n".join(f"{key}: {value}" for key, value in each.items()) + "\n")
