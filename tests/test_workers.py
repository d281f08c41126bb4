"""What workers are sent where they are not forked, as on macOS and from Python 3.14 on: everything but weights."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from forked import Forked, wait_until
from pretrained_models import FAMILIES
from torch.utils.data import Dataset

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.loader import iterate_dataset
from clipvisionalign.models.tokenizer import without_weights


def loaders(aligner, flip: float = 0.0) -> list:
    """The loaders of images without and, where the model has it, with crops."""
    transform = aligner.image_tower.image_transform
    made = [transform.image_loader(flip=flip)]
    try:
        return [*made, transform.image_loader(augment=True, flip=flip)]
    except ValueError:
        return made


def assert_equal(batch, other) -> None:
    for field in fields(batch):
        if field.name == "seconds":
            continue
        one, two = getattr(batch, field.name), getattr(other, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), field.name
        elif isinstance(one, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in one):
            assert all(map(torch.equal, one, two)), field.name
        else:
            assert str(one) == str(two), field.name


@pytest.mark.parametrize("family", ["run", *FAMILIES])
def test_workers_that_are_not_forked_make_the_same_batches_and_are_sent_no_weights(
    family, folders, tiny_runs, scenes_folder
):
    assert multiprocessing.get_start_method() == "forkserver"
    aligner = load_aligner(tiny_runs["cross"] if family == "run" else folders(family))
    data = read_captioned_images(scenes_folder).split("dev")
    tower = without_weights(aligner.text_tower)
    assert tower.tokenize(data.captions) == aligner.text_tower.tokenize(data.captions)
    for load in loaders(aligner, 0.5):
        batches = CaptionedBatches(data, tower.tokenize, tower.pad, load, 3)
        sent = pickle.dumps(batches)
        assert b"_rebuild_parameter" not in sent
        # A batch's random numbers are drawn from a seed of its own.
        plan = batches.plan_epoch(4, 1, 0)[:2]
        here = [batches[each] for each in plan]
        for mine, other in zip(
            here, iterate_dataset(batches, 2 if family in ("run", "clip") else 1, plan), strict=True
        ):
            assert_equal(mine, other)
    # The tower itself has kept what it had.
    assert aligner.encode_captions(["a red circle"]).isfinite().all()


SERVER = """
import multiprocessing, signal, sys

from torch.utils.data import TensorDataset
import torch

from clipvisionalign.data.loader import iterate_dataset


def blocked(queue):
    queue.put(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))


if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    # It starts the tracker of resources, which unblocks signals where it is started within.
    queue = multiprocessing.Queue()
    assert len(list(iterate_dataset(TensorDataset(torch.arange(4)), 1, [0, 1, 2, 3]))) == 4
    process = multiprocessing.Process(target=blocked, args=(queue,))
    process.start()
    print("blocked:", queue.get(timeout=60), "here:", signal.pthread_sigmask(signal.SIG_BLOCK, []))
    process.join()
"""


def test_a_server_that_forks_workers_hands_no_blocked_signals_on(tmp_path):
    """Its later processes, whoever starts them, can be asked to stop."""
    (tmp_path / "program.py").write_text(SERVER)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "blocked: [] here: set()" in done.stdout, done.stdout + done.stderr[-2000:]


class Stuck(Dataset):
    """Items, of which the second is never made: by a worker that lets none of its threads run."""

    def __getitem__(self, index: int) -> int:
        if index % 4 > 1:
            # What was made before is sent by another thread of the worker.
            time.sleep(0.5)
            re.match(r"(a+)+$", "a" * 40 + "b")
        return os.getpid()


def leave_while_stuck(out: str, kept: bool) -> None:
    multiprocessing.set_start_method("fork", force=True)
    items = iterate_dataset(Stuck(), 2, list(range(40)))
    Path(out).write_text(f"{next(items)} {next(items)}")
    if kept:
        global forgotten
        forgotten = items
        time.sleep(1)
    else:
        time.sleep(1)
        items.close()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["at the exit", "closed"])
def test_workers_that_let_no_thread_run_are_killed_when_they_are_needed_no_more(tmp_path, kept):
    process, workers = Forked(leave_while_stuck, str(tmp_path / "workers"), kept, out=tmp_path / "said"), []
    try:
        wait_until(lambda: (tmp_path / "workers").is_file() and (tmp_path / "workers").read_text(), process)
        workers = [Path(f"/proc/{number}") for number in (tmp_path / "workers").read_text().split()]
        assert process.wait(60) == 0, process.said
        assert [each for each in workers if each.exists()] == []
    finally:
        process.kill()
        for each in workers:
            if each.exists():
                os.kill(int(each.name), signal.SIGKILL)
