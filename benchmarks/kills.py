"""A run that is killed again and again, and one whose disk fills up, against the undisturbed run: bit for bit.

    python benchmarks/kills.py [--kills 30] [--json]

Every run is a real process, killed with SIGKILL at a random moment, the writing of a checkpoint included; with root's
rights a small tmpfs is also filled up while another run writes its checkpoints there.
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

SETTINGS = [
    "--model.image_tower.name", "resnet10t", "--model.image_tower.weights", "random", "--model.image_tower.size", "64",
    "--epochs", "3", "--batch", "16", "--views", "2", "--checkpoint_minutes", "0", "--precision", "float32",
    "--freeze_layers", '["text_tower.encoder.embeddings.*"]', "--trackers", "",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "clipvisionalign", *arguments]


def run(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def same(first: Path, second: Path) -> bool:
    """Whether two finished runs have the same weights, bit for bit, and the same records, each step once."""
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return equal and records(first) == records(second)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*")}


def killed(data: Path, folder: Path, reference: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs that are killed, a few times each, until there have been `kills` of them."""
    done, runs, inside, good = 0, 0, 0, True
    while done < kills:
        out = folder / f"run{runs}"
        process = run("train", str(data), "--out", str(out), "--cache", str(folder / "cache"), *SETTINGS)
        mine = rng.randint(2, 6)
        for _ in range(mine):
            known_checkpoints = checkpoints(out)
            while checkpoints(out) <= known_checkpoints and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.5)]))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            inside += any(name.endswith(".part") for name in checkpoints(out))
            process = run("train", "--resume", str(out))
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(said[-2000:])
        good = good and same(out, reference)
        runs += 1
        print(f"{done} kills in {runs} runs, all as the undisturbed one: {good}", file=sys.stderr, flush=True)
    return {"kills": done, "runs": runs, "inside a checkpoint's writing": inside, "all bit for bit": good}


def filled(data: Path, folder: Path, reference: Path) -> dict[str, Any]:
    """A run on a small tmpfs: it goes on without the checkpoints that find no room, or ends with an error where even
    its model finds none; then the disk is made larger, and the run goes on."""
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 4}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return {"full disk": "no right to mount a tmpfs: not run"}
    try:
        out = disk / "run"
        process = run("train", str(data), "--out", str(out), "--cache", str(folder / "cache"), *SETTINGS)
        said, _ = process.communicate()
        result = {"checkpoints not written": said.count("no checkpoint at step"), "stopped": process.returncode != 0}
        if process.returncode:
            result["said"] = said.strip().splitlines()[-1].replace(str(disk), "DISK")
            subprocess.run(["mount", "-o", f"remount,size={size * 20}", str(disk)], check=True)
            process = run("train", "--resume", str(out))
            said, _ = process.communicate()
        return {"full disk": {**result, "all bit for bit": process.returncode == 0 and same(out, reference)}}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="how many (default 30; 0 for the full disk alone)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    from clipvisionalign.data.scene_dataset import write_scenes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_scenes(folder / "scenes", 120, seed=1, size=64)
        reference = folder / "whole"
        process = run("train", str(data), "--out", str(reference), "--cache", str(folder / "cache"), *SETTINGS)
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(said[-2000:])
        result = killed(data, folder, reference, given.kills, random.Random(given.seed)) if given.kills else {}
        result |= filled(data, folder, reference)
    print(json.dumps(result, indent=2) if given.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/kills.py", in_terminal=False):
        main()
