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

from clipvisionalign.training.sharding import full_tensor, is_sharded, shard_model

#: How long the others wait for what the main process does alone, such as the features of a large data set. What all do
#: together keeps PyTorch's own, shorter limit: a hang there is an error within minutes.
LONG_TIMEOUT = timedelta(days=7)

Result = TypeVar("Result")


class Distributed:
    """This process among all processes of a training; outside of a launcher it is the only one, and nothing is sent.

    What is called on all processes together raises RuntimeError within work that each does without the others.

    Args:
        device: The device of a process that is the only one; under a launcher Accelerate chooses.
        shard: Whether parameters are sharded over the processes (FSDP2).
        loggers: Names of Accelerate's trackers; None for none.
        project: Folder of the trackers' files.

    Raises:
        ValueError: `shard` without several processes.
    """

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
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Which part of a batch is this process's: every `world_size`-th image, from its `rank` on."""
        return self.rank, self.world_size

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
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
        """Wait until all processes have come here."""
        if self.is_distributed:
            self._check_collective_allowed()
            self.accelerator.wait_for_everyone()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """Let the main process work while the others wait, up to days.

        Args:
            work: The work; what it returns has to be picklable.

        Returns:
            What it returns, on all processes.

        Raises:
            Exception: Its error, on all processes.
        """
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
        """Let every process work by itself.

        Args:
            work: The work; what it returns has to be picklable.
            long_timeout: Whether processes may need very different times, up to days.

        Returns:
            What each returned, in the order of their ranks, on all processes.

        Raises:
            Exception: The error of the process of the lowest rank that failed, on all processes; its message names that
                process, unless all have the same error.
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
        """`run_and_gather` for results that are too large to send.

        Args:
            work: The work.
            long_timeout: Whether processes may need very different times, up to days.

        Returns:
            What this process's work returned.

        Raises:
            Exception: As `run_and_gather`.
        """
        results: list[Result] = []
        self.run_and_gather(lambda: results.append(work()), long_timeout)
        return results[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather an object of each process.

        Args:
            value: A picklable object.

        Returns:
            The objects in the order of their ranks, on all processes.
        """
        if not self.is_distributed:
            return [value]
        self._check_collective_allowed()
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """Concatenate rows of all processes, without gradients.

        Args:
            tensor: (n, ...), n may differ between processes.

        Returns:
            All rows in the order of the ranks, and where this process's own are among them.
        """
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
        """Sum a tensor over all processes.

        Args:
            tensor: Of the same shape on all.

        Returns:
            The sum.
        """
        if not self.is_distributed:
            return tensor
        self._check_collective_allowed()
        return self.accelerator.reduce(tensor, reduction="sum")

    def all_reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes: for what no wrapper has averaged.

        Args:
            parameters: The parameters; one without a gradient gets one.
        """
        if not self.is_distributed:
            return
        self._check_collective_allowed()
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="sum")

    def prepare(self, model: nn.Module, ignored_names: list[str]) -> nn.Module:
        """Replicate (DDP) or shard (FSDP2) a model over the processes.

        A model of which nothing else is trained has no gradients to be averaged, and stays as it is.

        Args:
            model: The model.
            ignored_names: Parameters whose gradients are not averaged, and which are not sharded.

        Returns:
            The model, wrapped or sharded in place.
        """
        trained = any(p.requires_grad for name, p in model.named_parameters() if name not in ignored_names)
        if not self.is_distributed or not trained:
            return model
        if self.shard:
            return shard_model(model, ignored_names)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored_names)
        return self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module) -> Any:
        """A context in which gradients stay each process's own.

        Args:
            model: The model, as `prepare` returned it.

        Returns:
            A context manager.
        """
        wrapped = any(hasattr(model, name) for name in ("no_sync", "set_requires_gradient_sync"))
        return self.accelerator.no_sync(model) if self.is_distributed and wrapped else nullcontext()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Scale all gradients down to a norm of at most `max_norm`, over all processes.

        Args:
            parameters: The parameters, sharded or whole.
            max_norm: The largest norm.

        Returns:
            The norm that they had.
        """
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
        """Close trackers, and the process group where there is one.

        Args:
            between_stages: Whether another stage of the training follows, which uses the process group.
        """
        if not between_stages:
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()


def picklable_error(error: Exception, prefix: str = "") -> Exception:
    """An error that can be sent to other processes: of the same class if possible, else of the nearest base class.

    Args:
        error: The error.
        prefix: What its message begins with.

    Returns:
        An error with the same message.

    >>> picklable_error(UnicodeDecodeError("utf-8", b"a", 0, 1, "no"), "process 1: ").__class__.__name__
    'UnicodeError'
    """
    message = f"{prefix}{error}" if str(error) else f"{prefix}{type(error).__name__}"
    for kind in type(error).__mro__:
        try:
            restored = pickle.loads(pickle.dumps(kind(message)))
        except Exception:
            continue
        if isinstance(restored, Exception) and type(restored) is kind and str(restored) == message:
            return restored
    return RuntimeError(message)
