"""Many processes as one: whose share is what, tensors gathered from all, replicated or sharded models.

Accelerate knows how the processes were started (`accelerate launch`, `torchrun`, or one alone) and what they run on. A
model is replicated by DistributedDataParallel, or its parameters are sharded by FSDP2's `fully_shard` (Zhao et al.,
arXiv:2304.11277) where `shard` is asked for.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

#: How long the others wait for what the first process does alone, such as the features of a large data set. What all do
#: together keeps PyTorch's own, shorter limit: who hangs there is told in minutes.
PATIENCE = timedelta(days=7)

#: Modules that are sharded one by one: transformers' and timm's name for a layer's list.
LAYER_LISTS = ("layer", "layers", "blocks", "stages", "h")

Found = TypeVar("Found")


class Processes:
    """This process among all. Outside of a launcher it is the only one, and nothing here costs anything."""

    def __init__(self, device: torch.device, shard: bool = False, loggers: Any = None, project: Any = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # Buffers (a frozen batch norm's, the weights of a pair's parts) are the same on all processes as they are. Some
        # parameters have no gradient: a bias of keys under one softmax, say.
        how = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", log_with=loggers or None, project_dir=project, kwargs_handlers=[how]
        )
        self.device: torch.device = self.accelerator.device if self.many else device
        #: In which the others wait for the first.
        self.waiting: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if self.many else None
        self.shard = shard or self.accelerator.distributed_type == "FSDP"
        #: Whether this process is at work that it does without the others.
        self.apart = False
        if self.shard and not self.many:
            raise ValueError("--shard true needs several processes: accelerate launch ... clipvisionalign train ...")

    @property
    def number(self) -> int:
        """This process's place among all, from 0."""
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        """How many there are."""
        return self.accelerator.num_processes

    @property
    def share(self) -> tuple[int, int]:
        """Which part of a batch is this process's: every `count`-th image, from its `number` on."""
        return self.number, self.count

    @property
    def many(self) -> bool:
        """Whether there is more than one."""
        return self.accelerator.num_processes > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def _meet(self) -> None:
        """Raises RuntimeError within work that this process does without the others: they are not where they would
        answer, and both would wait for ever, or take one thing for another."""
        if self.apart:
            raise RuntimeError("what all processes do together is called within what each does without the others")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While this process does something without the others."""
        self.apart = True
        try:
            yield
        finally:
            self.apart = False

    def wait(self) -> None:
        """Until all have come here."""
        if self.many:
            self._meet()
            self.accelerator.wait_for_everyone()

    def first_does(self, work: Callable[[], Found]) -> Found:
        """The first process works while the others wait; all get what it found, or its error."""
        if not self.many:
            return work()
        self._meet()
        found: list[Any] = [None, None]
        cause: Exception | None = None
        if self.first:
            try:
                with self._alone():
                    found[0] = work()
            except Exception as error:
                cause, found[1] = error, same_error(error)
        torch.distributed.broadcast_object_list(found, src=0, group=self.waiting)
        if found[1] is not None:
            raise found[1] from cause
        return found[0]

    def everyone(self, work: Callable[[], Found], patient: bool = False) -> list[Found]:
        """Every process works, each for itself and without the others; what each found, in their order, on all.

        Where one fails all raise its error, which names the process: no process goes on, or waits, without another.
        patient: they may need very different times, up to days.
        """
        if not self.many:
            return [work()]
        self._meet()
        mine: tuple[Any, Exception | None] = (None, None)
        cause: Exception | None = None
        try:
            with self._alone():
                mine = work(), None
        except Exception as error:
            cause, mine = error, (None, same_error(error))
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, mine, group=self.waiting if patient else None)
        failed = {number: error for number, (_, error) in enumerate(found) if error is not None}
        if failed:
            number, first = next(iter(failed.items()))
            # What is wrong on all of them is no single one's.
            alike = len(failed) == self.count and len({str(each) for each in failed.values()}) == 1
            raise first if alike else same_error(first, f"process {number} of {self.count}: ") from cause
        return [each for each, _ in found]

    def each(self, work: Callable[[], Found], patient: bool = False) -> Found:
        """`everyone`, for what may be too large to be sent about: what this process found itself."""
        mine: list[Found] = []
        self.everyone(lambda: mine.append(work()), patient)
        return mine[0]

    def objects(self, mine: Any) -> list[Any]:
        """One thing of each process, in their order."""
        if not self.many:
            return [mine]
        self._meet()
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, mine)
        return found

    def gather(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes (any number each), and where one's own are among them. Without gradients."""
        if not self.many:
            return tensor, slice(0, len(tensor))
        self._meet()
        sizes = self.accelerator.gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        # Every process sends as many rows as the longest has.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = self.accelerator.gather(padded).split(max(sizes))
        start = sum(sizes[: self.number])
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)]), slice(
            start, start + len(tensor)
        )

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if not self.many:
            return tensor
        self._meet()
        return self.accelerator.reduce(tensor, reduction="sum")

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes: for what no wrapper has averaged."""
        if not self.many:
            return
        self._meet()
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="sum")

    def prepare(self, model: nn.Module, apart: list[str]) -> nn.Module:
        """The model replicated or sharded over the processes. apart: parameters whose gradients it does not average.

        A model of which nothing else is trained has no gradients to be averaged: it stays as it is.
        """
        trained = any(p.requires_grad for name, p in model.named_parameters() if name not in apart)
        if not self.many or not trained:
            return model
        if self.shard:
            return shard(model, apart)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, apart)
        return self.accelerator.prepare_model(model)

    def unsynchronised(self, model: nn.Module) -> Any:
        """A context in which gradients stay each process's own."""
        wrapped = any(hasattr(model, name) for name in ("no_sync", "set_requires_gradient_sync"))
        return self.accelerator.no_sync(model) if self.many and wrapped else nullcontext()

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        """Scale all gradients down to a norm of at most `most`, over all processes; the norm that they had."""
        if not self.shard:
            return float(nn.utils.clip_grad_norm_(parameters, most))
        # Some are sharded and some are not, which no function of PyTorch takes together.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kinds = [[g for g in gradients if is_shard(g) == kind] for kind in (True, False)]
        norms = [whole(nn.utils.get_total_norm(some)) for some in kinds if some]
        norm = float(torch.stack(norms).norm())
        share = min(1.0, most / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(share)
        return norm

    def end(self) -> None:
        """Close loggers, and the process group where there is one."""
        self.accelerator.end_training()


def same_error(error: Exception, before: str = "") -> Exception:
    """An error that can be sent to other processes: of the same kind if that is possible, else of the nearest one above
    it, with the same words. before: what they begin with."""
    words = f"{before}{error}" if str(error) else f"{before}{type(error).__name__}"
    for kind in type(error).__mro__:
        try:
            again = pickle.loads(pickle.dumps(kind(words)))
        except Exception:
            continue
        if isinstance(again, Exception) and type(again) is kind and str(again) == words:
            return again
    return RuntimeError(words)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """Of a tensor that is spread over processes, what is this one's."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes where it is spread over them; every process calls this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def shard(model: nn.Module, apart: list[str]) -> nn.Module:
    """FSDP2: every layer of a tower, then what is left, sharded over all processes; in place. apart: parameters that
    are used outside of the model's own call, and stay whole on every process."""
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        # It cuts along the first axis of plain memory, and knows no channels-last.
        parameter.data = parameter.data.contiguous()
    for name, module in list(model.named_modules()):
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and name.rpartition(".")[2] in LAYER_LISTS
        if is_list and not any(own.startswith(f"{name}.") for own in apart):
            for layer in module:
                fully_shard(layer)
    parameters = dict(model.named_parameters())
    fully_shard(model, ignored_params={parameters[name] for name in apart})
    return model
