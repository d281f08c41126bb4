"""Indexing that is killed, a folder as folders are, and Ray: is every image in the index, and in it once?

    python benchmarks/indexing.py RUN [--kills 20] [--files 10000] [--images FOLDER] [--ray] [--json]

- Kills: real processes and SIGKILL at random moments over the whole time that indexing takes; after each no image
  stands there twice and a search works; in the end the index is that of an undisturbed process, row for row.
- A folder of `--files` files, one in a hundred broken, in twelve ways, with links in circles, odd names, and a true
  image of 40,000 x 40,000 pixels.
- With --ray: two workers of Ray against one process, on the images of `--images` or drawn ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def drawn(folder: Path, count: int) -> Path:
    """Images of noise, each of its own."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        noise.resize((160, 120)).save(folder / f"{number:05}.jpg")
    return folder


def rows_of(index: Path) -> dict[bytes, dict[str, Any]]:
    """An index's rows by path. Raises AssertionError where one stands there twice."""
    from clipvisionalign.search.tables import open_image_table

    table = open_image_table(index)
    rows = table.search().limit(max(1, table.count_rows())).to_arrow().to_pylist()
    assert len({row["raw"] for row in rows}) == len(rows) == len({row["id"] for row in rows}), "twice in the index"
    return {row["raw"]: row for row in rows}


def same(one: dict[bytes, dict[str, Any]], two: dict[bytes, dict[str, Any]]) -> dict[str, Any]:
    """How two indexes differ, numbers aside."""
    gap, other = 0.0, 0
    for raw in one.keys() & two.keys():
        gap = max(gap, float(np.abs(np.array(one[raw]["vector"]) - np.array(two[raw]["vector"])).max()))
        other += any(one[raw][name] != two[raw][name] for name in one[raw] if name not in ("id", "vector"))
    return {"pictures": len(two), "only in one": len(one.keys() ^ two.keys()), "greatest difference of a vector": gap,
            "otherwise different rows": other}  # fmt: skip


def killed(run: str, source: Path, folder: Path, kills: int) -> dict[str, Any]:
    from clipvisionalign.search.indexer import build_index
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.terms import parse_term

    start = time.perf_counter()
    build_index(run, source, folder / "whole")
    undisturbed = rows_of(folder / "whole")
    out, rng = folder / "killed", random.Random(0)
    command = [sys.executable, "-m", "clipvisionalign", "index", run, str(source), "--out", str(out)]
    seconds = time.perf_counter() - start
    done = searched = restarts = 0
    counts = []
    while done < kills:
        if out.exists() and done and counts and counts[-1] == len(undisturbed):
            # It was finished before its time: begin again.
            out = folder / f"killed{restarts}"
            command[-1], restarts = str(out), restarts + 1
            counts.append(0)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Starting takes some seconds; then anywhere in what is left to do.
        until = time.perf_counter() + rng.uniform(0, seconds / 4 + 6)
        while time.perf_counter() < until and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        if not (out / "index.json").is_file() or not list(out.glob("*.lance/_versions/*")):
            continue
        rows = rows_of(out)
        counts.append(len(rows))
        hits = Searcher(out).search([parse_term("a dog")], 5)
        assert len(hits) == min(5, len(rows)), "a search after a kill found too little"
        searched += 1
        print(
            f"kill {done}: {len(rows):,} of {len(undisturbed):,} in the index, none twice", file=sys.stderr, flush=True
        )
    build_index(run, source, out)
    return {"kills": done, "searches after them": searched, "pictures after each": counts,
            "at last against undisturbed": same(undisturbed, rows_of(out))}  # fmt: skip


def messy_folder(run: str, folder: Path, files: int) -> dict[str, Any]:
    import odd_files
    from PIL import Image

    from clipvisionalign.search.broken_files import read_broken_files
    from clipvisionalign.search.indexer import build_index

    source = drawn(folder / "pictures", files - files // 100 - len(odd_files.ODD_NAMES) - 1)
    good = {path.name.encode() for path in source.iterdir()}
    names, bad = odd_files.write_odd_files(source)
    for number in range(files // 100 - len(odd_files.broken())):
        name, data = sorted(odd_files.broken().items())[number % len(odd_files.broken())]
        (source / "sub" / f"{number}-{name}").write_bytes(data)
        bad.add(f"sub/{number}-{name}")
    Image.MAX_IMAGE_PIXELS = None
    Image.new("1", (40_000, 40_000)).save(source / "huge.png")
    there = sum(1 for path in source.rglob("*") if path.is_file() and not path.is_symlink() and path.suffix != ".txt")
    start = time.perf_counter()
    report = build_index(run, source, folder / "index")
    seconds = time.perf_counter() - start
    listed = [entry["path"] for entry in read_broken_files(folder / "index")]
    assert set(rows_of(folder / "index")) == good | names, "indexed otherwise than meant"
    assert sorted(listed) == sorted(bad), "listed otherwise than meant"
    again = build_index(run, source, folder / "index")
    return {"files": there, "indexed, each once": report.there, "listed, each once": len(listed),
            "seconds": round(seconds, 1), "encoded when made again": again.encoded}  # fmt: skip


def by_ray(run: str, source: Path, folder: Path) -> dict[str, Any]:
    from clipvisionalign.search.indexer import build_index

    taken = {}
    for name, options in (("one process", {}), ("two workers", {"ray": "local", "workers": 2})):
        start = time.perf_counter()
        build_index(run, source, folder / name, **options)
        taken[f"{name}, s"] = round(time.perf_counter() - start, 1)
    return taken | same(rows_of(folder / "one process"), rows_of(folder / "two workers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run")
    parser.add_argument("--kills", type=int, default=20, help="kills (default 20; 0: none)")
    parser.add_argument(
        "--files", type=int, default=10_000, help="files of the made-up folder (default 10,000; 0: none)"
    )
    parser.add_argument("--pictures", help="pictures to index for kills and Ray (default: 1,500 drawn ones)")
    parser.add_argument("--ray", action="store_true", help="also two workers of Ray (needs clipvisionalign[ray])")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(given.pictures) if given.pictures else drawn(folder / "drawn", 1500)
        if given.ray:
            results["Ray"] = by_ray(given.run, source, folder / "ray")
        if given.kills:
            results["kills"] = killed(given.run, source, folder / "kills", given.kills)
        if given.files:
            results["a folder"] = messy_folder(given.run, folder / "files", given.files)
    print(
        json.dumps(results, indent=2) if given.json else "\n".join(f"{key}: {value}" for key, value in results.items())
    )


if __name__ == "__main__":
    from clipvisionalign.log import configure_command_line
    from clipvisionalign.progress import progress_step

    configure_command_line()
    with progress_step("benchmarks/indexing.py", in_terminal=False):
        main()
