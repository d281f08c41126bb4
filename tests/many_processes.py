"""What `test_processes.py` runs in several processes, by torchrun or forked: `many_processes.py WORK JSON`; the first one
writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from forked import Forked
from tolerance import in_float64


def gradients(given: dict) -> None:
    """The gradients of one step, as `given` says, of a batch that is shared out; into given["out"]."""
    from clipvisionalign import read_captioned_images
    from clipvisionalign.data.batches import CaptionedBatches
    from clipvisionalign.models.aligner import Aligner, AlignerConfig
    from clipvisionalign.settings import config_from_dict
    from clipvisionalign.training.contrastive import DualEncoderLoss, LossConfig
    from clipvisionalign.training.distributed import Distributed
    from clipvisionalign.training.forward import PrecomputedFeatures, Towers
    from clipvisionalign.training.step import Step

    distributed = Distributed(torch.device("cpu"), given.get("shard", False))
    torch.manual_seed(0)
    aligner = Aligner(config_from_dict(AlignerConfig, given["model"]))
    # No dropout: it would differ from process to process, as it should.
    aligner.eval()
    aligner = in_float64(aligner) if given.get("exact") else aligner
    loss_of = DualEncoderLoss(LossConfig(given["loss"], beta=0.3, bias=-2.0))
    step = Step(Towers(aligner, loss_of, (torch.float32, torch.float32)), distributed)
    data = read_captioned_images(given["data"]).split("train").with_identity(given.get("identity", "auto"))
    tower = aligner.text_tower
    batches = CaptionedBatches(data, tower.tokenize, tower.pad, aligner.image_tower.image_transform.image_loader())
    chunk = given.get("chunk", 0)
    dealt = batches.plan_epoch(24, 1, 0, chunk_size=chunk, process_rank=distributed.rank_and_world_size)
    if chunk:
        chunks = batches.num_chunks(24, 0, chunk, distributed.world_size)
        figures = step.backward_cached(
            (batches[one] for one in dealt[: 2 * chunks]), chunks, lambda batch: PrecomputedFeatures()
        )
    else:
        figures = step.backward(batches[dealt[0]], PrecomputedFeatures())
    named_gradients = {}
    for name, parameter in step.towers.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            named_gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if distributed.is_main:
        torch.save({"gradients": named_gradients, "loss": figures.loss, "images": figures.images}, given["out"])
    distributed.barrier()
    distributed.close()


def train(given: dict) -> None:
    """A run with these settings; or the one in given["resume"] goes on."""
    from clipvisionalign.settings import config_from_dict
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import resume
    from clipvisionalign.training.train import train as train_run

    if "resume" in given:
        resume(given["resume"])
    else:
        train_run(config_from_dict(RunConfig, given))


def stop(given: dict) -> None:
    """A run that is sent a real signal after given["after"] steps, on its first process or on given["rank"]; its first
    given["none"] steps are none, as where none of their images could be read."""
    import os
    import signal

    from clipvisionalign.settings import config_from_dict
    from clipvisionalign.training import train as training
    from clipvisionalign.training import trainer
    from clipvisionalign.training.config import RunConfig

    after, none, rank, taken = given.pop("after"), given.pop("none", 0), given.pop("rank", 0), 0
    forward_backward = trainer.forward_backward

    def counted(step, stream, *arguments):
        nonlocal taken
        taken += 1
        if taken == after and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return step.skip([next(stream)]) if taken <= none else forward_backward(step, stream, *arguments)

    trainer.forward_backward = counted
    try:
        training.train(config_from_dict(RunConfig, given))
    except KeyboardInterrupt:
        return


def trouble(given: dict) -> None:
    """A run in which the file given["gone"] is gone after the first step; without one, process 1 has no room for
    checkpoints between its second and its fourth step."""
    from clipvisionalign.settings import config_from_dict
    from clipvisionalign.training import train as training
    from clipvisionalign.training import trainer
    from clipvisionalign.training.config import RunConfig

    gone, taken, lift = given.pop("gone", None), 0, None
    forward_backward = trainer.forward_backward

    def counted(*arguments):
        nonlocal taken, lift
        taken += 1
        if gone:
            Path(gone).unlink(missing_ok=True)
        elif taken == 2:
            lift = no_room(1)
        elif taken == 4:
            lift()
        return forward_backward(*arguments)

    trainer.forward_backward = counted
    training.train(config_from_dict(RunConfig, given))


def shards(given: dict) -> None:
    """The names of all samples that this process gets in one epoch, from step given["start"] on."""
    from clipvisionalign.data.streams.loader import StreamedBatches
    from clipvisionalign.data.streams.sources import open_stream
    from clipvisionalign.training.distributed import Distributed

    distributed = Distributed(torch.device("cpu"))
    batches = StreamedBatches(open_stream(given["data"]), lambda captions: [[1] for _ in captions], 0, None)
    names = []
    for batch in batches.epoch(
        8, 1, 0, workers=2, start=given.get("start", 0), process_rank=distributed.rank_and_world_size
    ):
        names.append(batch.names)
        if len(names) == given.get("stop"):
            break
    Path(f"{given['out']}.{distributed.rank}").write_text(json.dumps(names))
    distributed.barrier()
    distributed.close()


def wait(given: dict) -> None:
    """The first process works longer than a collective may take."""
    import time
    from datetime import timedelta

    from clipvisionalign.training.distributed import Distributed

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    distributed = Distributed(torch.device("cpu"))
    result = distributed.run_on_main(lambda: time.sleep(5) or "done")
    Path(f"{given['out']}.{distributed.rank}").write_text(result)
    distributed.barrier()
    distributed.close()


def no_room(number: int) -> Callable[[], None]:
    """From now on the process of this number cannot write files of more than some bytes, as where its disk is full;
    returns what lifts that."""
    import os
    import resource
    import signal

    if os.environ["RANK"] != str(number):
        return lambda: None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_sharded(given: dict) -> None:
    """Two sharded checkpoints, the second of which process given["fails"] cannot write; what each process was told."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from clipvisionalign.training.checkpoint import save_sharded as save
    from clipvisionalign.training.distributed import Distributed

    distributed = Distributed(torch.device("cpu"))
    mesh = init_device_mesh("cpu", (distributed.world_size,))
    tensors = {"weights": distribute_tensor(torch.arange(4096.0), mesh, [Shard(0)])}
    run = Path(given["out"])
    save(run, 1, tensors, {"step": 1}, distributed)
    lift = no_room(given["fails"])
    try:
        save(run, 2, tensors, {"step": 2, "much": torch.zeros(4096)}, distributed)
        outcome = "nothing"
    except OSError as error:
        outcome = str(error)
    lift()
    (run / f"told.{distributed.rank}").write_text(outcome)
    # And all are where they can go on together.
    assert distributed.all_gather_object(distributed.rank) == [0, 1]
    save(run, 3, tensors, {"step": 3}, distributed)
    distributed.barrier()
    distributed.close()


def fails(given: dict) -> None:
    """`Distributed.each`, where process 1 fails: what each process was told."""
    from clipvisionalign.data.captioned import DataError
    from clipvisionalign.training.distributed import Distributed

    distributed = Distributed(torch.device("cpu"))

    def work() -> int:
        if distributed.rank == 1:
            if given["kind"] == "UnicodeError":
                b"\xff".decode()
            raise DataError("/there: no image")
        return distributed.rank

    messages = []
    for together in (lambda: distributed.run_on_all(work), lambda: distributed.run_and_gather(work, long_timeout=True)):
        try:
            together()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    messages.append(str(distributed.run_and_gather(lambda: distributed.rank)))
    Path(f"{given['out']}.{distributed.rank}").write_text(json.dumps(messages))
    distributed.barrier()
    distributed.close()


def differing(given: dict) -> None:
    """`open_data`, where the shards lie on process 1's machine only; then collectives within others. What each
    process was told."""
    import os
    from datetime import timedelta

    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.data import open_data
    from clipvisionalign.training.distributed import Distributed

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=10))
    distributed = Distributed(torch.device("cpu"))
    here = Path(given["out"]) / str(distributed.rank)
    (here / "shards").mkdir(parents=True)
    if distributed.rank:
        (here / "shards" / "train-0.tar").touch()
    os.chdir(here)
    messages = []
    for work in (
        lambda: open_data(RunConfig(data="shards"), distributed),
        lambda: distributed.run_on_all(lambda: distributed.run_on_main(lambda: 1), long_timeout=True),
        lambda: distributed.run_on_main(lambda: distributed.all_gather_object(1)),
    ):
        try:
            work()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    messages.append(str(distributed.run_and_gather(lambda: distributed.rank)))
    (here / "told").write_text(json.dumps(messages))
    distributed.barrier()
    distributed.close()


def fails_sharded(given: dict) -> None:
    """A step in chunks of a sharded model, in which process 1 fails within the second pass; what it was told there."""
    from clipvisionalign.training.forward import Towers

    forward, calls = Towers.forward, 0

    def failing(self, *arguments, **named):
        nonlocal calls
        calls += 1
        if calls == given["after"] and torch.distributed.get_rank() == 1:
            raise MemoryError("no room for the second pass")
        return forward(self, *arguments, **named)

    Towers.forward = failing
    gradients({**given, "shard": True})


def index(run: str, source: str, out: str) -> None:
    """`build_index` for a process that is killed: eight rows at a time, and a line about each eight."""
    from clipvisionalign.log import log_to
    from clipvisionalign.search import embed, image_rows
    from clipvisionalign.search.indexer import build_index

    image_rows.IMAGES_PER_WRITE = embed.EMBED_BATCH_SIZE = 8
    with log_to(print):
        build_index(run, source, out)


def measure_cost(run: str, data: str, split: str, layout: str, brief: bool, out: str) -> None:
    """The cost of a run, into the file `out`."""
    from clipvisionalign.study.profile import measure_costs

    Path(out).write_text(json.dumps(measure_costs(run, data, split, layout, brief=brief)))


class Costs:
    """`profile_run` in forked processes, which start sooner than fresh interpreters; for the cells that `fresh` names it
    stays as it is."""

    def __init__(self, folder: Path, *fresh: str):
        self.folder, self.fresh = folder, fresh

    def __call__(self, trial: Path, data: str, split: str, layout: str, brief: bool) -> dict:
        from clipvisionalign.study.profile import profile_run

        if trial.name in self.fresh:
            return profile_run(trial, data, split, layout, brief)
        out = self.folder / f"{trial.name}.json"
        Forked(measure_cost, str(trial), data, split, layout, brief, str(out), out=self.folder / "said").ended()
        return json.loads(out.read_text())


def study(*arguments: str) -> int:
    """`clipvisionalign study`, its costs measured in its own process: without an interpreter's start for each."""
    from clipvisionalign.cli import main
    from clipvisionalign.study import cost_rounds
    from clipvisionalign.study.profile import measure_costs

    cost_rounds.profile_run = lambda folder, *more: measure_costs(str(folder), *more[:-1], brief=more[-1])
    return main(["study", *arguments])


def measure_costlier(run: str, data: str, mebibytes: int, milliseconds: int) -> None:
    """The cost, as JSON, of an aligner that holds so much memory more and sleeps so long for each call."""
    import time

    import numpy as np

    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.study.profile import measure_costs

    def load(run):
        aligner = load_aligner(run)
        aligner.ballast = np.ones(mebibytes * 2**20, dtype=np.uint8)
        encode = aligner.encode_captions

        def slower(captions, *more, **others):
            time.sleep(milliseconds / 1000)
            return encode(captions, *more, **others)

        aligner.encode_captions = slower
        return aligner

    print(json.dumps(measure_costs(run, data, "dev", "auto", load, brief=True)))


def work(name: str, given: dict) -> None:
    """One of the works above; what it logs is printed."""
    from clipvisionalign.log import log_to

    works = (gradients, train, stop, shards, wait, save_sharded, fails, trouble, differing, fails_sharded)
    with log_to(print):
        {each.__name__: each for each in works}[name](given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]))
