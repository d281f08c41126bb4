"""Several processes: shares, gathering of tensors, replicated and sharded models.

Accelerate detects how the processes were started (`accelerate launch`, `torchrun`, or one alone) and what they run on.
A model is replicated by DistributedDataParallel, or its parameters are sharded by FSDP2's `fully_shard` (Zhao et al.,
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

#: How long the others wait for what the main process does alone, such as the features of a large data set. What all do
#: together keeps PyTorch's own, shorter limit: a hang there is an error within minutes.
LONG_TIMEOUT = timedelta(days=7)

#: Modules that are sharded one by one: transformers' and timm's name for a layer's list.
LAYER_LISTS = ("layer", "layers", "blocks", "stages", "h")

Result = TypeVar("Result")


class Distributed:
    """This process among all. Outside of a launcher it is the only one, and nothing here costs anything."""

    def __init__(self, device: torch.device, shard: bool = False, loggers: Any = None, project: Any = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # Buffers (a frozen batch norm's, the weights of a pair's parts) are the same on all processes as they are. Some
        # parameters have no gradient: such as a bias of keys under one softmax.
        ddp_kwargs = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", log_with=loggers or None, project_dir=project, kwargs_handlers=[ddp_kwargs]
        )
        self.device: torch.device = self.accelerator.device if self.is_distributed else device
        #: In which the others wait for the first.
        self.long_timeout_group: Any = (
            torch.distributed.new_group(backend="gloo", timeout=LONG_TIMEOUT) if self.is_distributed else None
        )
        self.shard = shard or self.accelerator.distributed_type == "FSDP"
        #: Whether this process is at work that it does without the others.
        self.in_local_work = False
        if self.shard and not self.is_distributed:
            raise ValueError("--shard true needs several processes: accelerate launch ... clipvisionalign train ...")

    @property
    def rank(self) -> int:
        """This process's place among all, from 0."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """How many there are."""
        return self.accelerator.num_processes

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Which part of a batch is this process's: every `world_size`-th image, from its `rank` on."""
        return self.rank, self.world_size

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one."""
        return self.accelerator.num_processes > 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.accelerator.is_main_process

    def _check_collective_allowed(self) -> None:
        """Raises RuntimeError within work that this process does without the others: they are not where they would
        answer, and both would wait for ever, or take one thing for another."""
        if self.in_local_work:
            raise RuntimeError("what all processes do together is called within what each does without the others")

    @contextmanager
    def _local_work(self) -> Iterator[None]:
        """While this process does something without the others."""
        self.in_local_work = True
        try:
            yield
        finally:
            self.in_local_work = False

    def barrier(self) -> None:
        """Until all have come here."""
        if self.is_distributed:
            self._check_collective_allowed()
            self.accelerator.wait_for_everyone()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """The main process works while the others wait; all get what it found, or its error."""
        if not self.is_distributed:
            return work()
        self._check_collective_allowed()
        result: list[Any] = [None, None]
        cause: Exception | None = None
        if self.is_main:
            try:
                with self._local_work():
                    result[0] = work()
            except Exception as error:
                cause, result[1] = error, picklable_error(error)
        torch.distributed.broadcast_object_list(result, src=0, group=self.long_timeout_group)
        if result[1] is not None:
            raise result[1] from cause
        return result[0]

    def run_and_gather(self, work: Callable[[], Result], long_timeout: bool = False) -> list[Result]:
        """Every process works, each for itself and without the others; what each found, in their order, on all.

        Where one fails all raise its error, which names the process: no process continues, or waits, without another.
        long_timeout: they may need very different times, up to days.
        """
        if not self.is_distributed:
            return [work()]
        self._check_collective_allowed()
        own_result: tuple[Any, Exception | None] = (None, None)
        cause: Exception | None = None
        try:
            with self._local_work():
                own_result = work(), None
        except Exception as error:
            cause, own_result = error, (None, picklable_error(error))
        results: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(
            results, own_result, group=self.long_timeout_group if long_timeout else None
        )
        failed = {rank: error for rank, (_, error) in enumerate(results) if error is not None}
        if failed:
            rank, first_error = next(iter(failed.items()))
            # What is wrong on all of them is no single one's.
            same_everywhere = len(failed) == self.world_size and len({str(each) for each in failed.values()}) == 1
            raise (
                first_error
                if same_everywhere
                else picklable_error(first_error, f"process {rank} of {self.world_size}: ")
            ) from cause
        return [each for each, _ in results]

    def run_on_all(self, work: Callable[[], Result], long_timeout: bool = False) -> Result:
        """`run_and_gather` for what may be too large to send: this process's own result."""
        results: list[Result] = []
        self.run_and_gather(lambda: results.append(work()), long_timeout)
        return results[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """One thing of each process, in their order."""
        if not self.is_distributed:
            return [value]
        self._check_collective_allowed()
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes (any number each), and where one's own are among them. Without gradients."""
        if not self.is_distributed:
            return tensor, slice(0, len(tensor))
        self._check_collective_allowed()
        sizes = self.accelerator.gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        # Every process sends as many rows as the longest has.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = self.accelerator.gather(padded).split(max(sizes))
        start = sum(sizes[: self.rank])
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), slice(
            start, start + len(tensor)
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if not self.is_distributed:
            return tensor
        self._check_collective_allowed()
        return self.accelerator.reduce(tensor, reduction="sum")

    def all_reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes: for what no wrapper has averaged."""
        if not self.is_distributed:
            return
        self._check_collective_allowed()
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="sum")

    def prepare(self, model: nn.Module, ignored_names: list[str]) -> nn.Module:
        """The model replicated or sharded over the processes.

        ignored_names: parameters whose gradients it does not average.

        A model of which nothing else is trained has no gradients to be averaged: it stays as it is.
        """
        trained = any(p.requires_grad for name, p in model.named_parameters() if name not in ignored_names)
        if not self.is_distributed or not trained:
            return model
        if self.shard:
            return shard_model(model, ignored_names)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored_names)
        return self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module) -> Any:
        """A context in which gradients stay each process's own."""
        wrapped = any(hasattr(model, name) for name in ("no_sync", "set_requires_gradient_sync"))
        return self.accelerator.no_sync(model) if self.is_distributed and wrapped else nullcontext()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Scale all gradients down to a norm of at most `max_norm`, over all processes; the norm that they had."""
        if not self.shard:
            return float(nn.utils.clip_grad_norm_(parameters, max_norm))
        # Some are sharded and some are not, which no function of PyTorch takes together.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kinds = [[g for g in gradients if is_sharded(g) == kind] for kind in (True, False)]
        norms = [full_tensor(nn.utils.get_total_norm(group)) for group in kinds if group]
        norm = float(torch.stack(norms).norm())
        share = min(1.0, max_norm / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(share)
        return norm

    def close(self, between_stages: bool = False) -> None:
        """Close loggers, and the process group where there is one; not between the stages of a training."""
        if not between_stages:
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()


def picklable_error(error: Exception, prefix: str = "") -> Exception:
    """An error that can be sent to other processes: of the same kind if that is possible, else of the nearest one above
    it, with the same words. prefix: what they begin with."""
    message = f"{prefix}{error}" if str(error) else f"{prefix}{type(error).__name__}"
    for kind in type(error).__mro__:
        try:
            restored = pickle.loads(pickle.dumps(kind(message)))
        except Exception:
            continue
        if isinstance(restored, Exception) and type(restored) is kind and str(restored) == message:
            return restored
    return RuntimeError(message)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """Of a tensor that is spread over processes, what is this one's."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes where it is spread over them; every process calls this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_model(model: nn.Module, ignored_names: list[str]) -> nn.Module:
    """FSDP2: every layer of a tower, then what is left, sharded over all processes; in place.

    ignored_names: parameters that are used outside of the model's own call, and stay whole on every process.
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        # It cuts along the first axis of plain memory, and does not support channels-last.
        parameter.data = parameter.data.contiguous()
    for name, module in list(model.named_modules()):
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and name.rpartition(".")[2] in LAYER_LISTS
        if is_list and not any(ignored_name.startswith(f"{name}.") for ignored_name in ignored_names):
            for layer in module:
                fully_shard(layer)
    parameters = dict(model.named_parameters())
    fully_shard(model, ignored_params={parameters[name] for name in ignored_names})
    return model
