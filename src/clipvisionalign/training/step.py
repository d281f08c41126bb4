"""One training step, from a batch to gradients: one process or several, undivided or in chunks.

The loss needs the vectors of all pairs at once, the towers do not. A step therefore goes through three stations:

1. `Towers` encodes images and captions (this is all that DDP or FSDP2 wrap).
2. The loss is taken over the vectors of all processes, piece by piece, and each piece's gradient is taken at once, up
   to the vectors: no process computes the full square, and memory does not grow with it.
3. The towers go back from these gradients. Those of vectors that other processes' pieces reached are summed first.

With `chunk` the towers work through a batch twice, some images or captions at a time: first without gradients, to have
all vectors, then once more with them, each chunk's random state replayed, so that dropout is the same. This is gradient
caching (Gao et al., "GradCache", arXiv:2101.06983): a batch far larger than memory, with the gradients of the undivided
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipvisionalign.batch import Batch
from clipvisionalign.models.aligner import PAIR_SCORER_PREFIXES
from clipvisionalign.training.config import RuntimeConfig
from clipvisionalign.training.distillation import Distillation
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.distributed_pair_loss import backward_pair_loss
from clipvisionalign.training.forward import FeatureProvider, PrecomputedFeatures, TowerOutputs, Towers
from clipvisionalign.training.gathered_batch import GatheredBatch
from clipvisionalign.training.profiling import Timings
from clipvisionalign.training.replay import capture_random_state, replay_random_state


@dataclass
class StepMetrics:
    """Loss and accuracy of a step, over all processes.

    Args:
        loss: Loss of the dual encoder.
        pair_loss: Loss of late interaction and fusion, without its weight; 0 for a model without them.
        accuracy: Share of captions whose image is first among all images of the step.
        images: Images in the step; 0 for one that was not taken, since a process had no image or all together had fewer
            than two: it has no gradients.
        skipped: What this process left out of the step, each with the reason.
        names: Names of the first five images of this process.
        left_out: Number of images that all processes left out.
        distillation: Distance from the vectors of the start, without its weight, see `Distillation`.
    """

    loss: float
    pair_loss: float
    accuracy: float
    images: int
    skipped: list[str]
    names: list[str]
    left_out: int = 0
    distillation: float = 0.0


class Step:
    """Takes a batch to the gradients of all parameters.

    `distillation`, None at first, is set by a run that keeps vectors near those of its start.

    Args:
        towers: Both towers with their heads, and the loss.
        distributed: This process; it wraps the towers in DDP or FSDP2 where there are several.
        negatives: Hard negatives per image and per caption, for the fusion.
        fusion_weight: Weight of the loss of late interaction and fusion.
        timings: Sums the seconds of the parts of a step; None for sums of its own.
    """

    def __init__(
        self,
        towers: Towers,
        distributed: Distributed,
        negatives: int = 4,
        fusion_weight: float = 1.0,
        timings: Timings | None = None,
    ) -> None:
        self.towers, self.distributed = towers, distributed
        self.aligner, self.loss_fn = towers.aligner, towers.loss_of
        self.negatives, self.fusion_weight = negatives, fusion_weight
        self.timings = timings or Timings()
        self.distillation: Distillation | None = None
        #: Gradients that arise in the loss itself: no wrapper of the towers sees them.
        parameters = dict(towers.named_parameters())
        self.ignored_names = [
            name for name in parameters if name.removeprefix("aligner.").startswith(PAIR_SCORER_PREFIXES)
        ]
        self.ignored_parameters = [parameters[name] for name in self.ignored_names if parameters[name].requires_grad]
        self.parameters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
        self.model = distributed.prepare(towers, self.ignored_names)

    def backward(self, batch: Batch, precomputed: PrecomputedFeatures) -> StepMetrics:
        """Compute the gradients of a batch that goes through the towers undivided.

        Args:
            batch: This process's part of the batch.
            precomputed: Outputs of frozen towers for it.

        Returns:
            Loss and accuracy; parameters have their gradients, summed over all processes.
        """
        batch = self._merge_groups(batch)
        with self.timings("image tower"):
            # Two calls where nothing has to be synchronised, so that each tower's time can be measured.
            is_single = not self.distributed.is_distributed
            outputs = self.model(batch, precomputed, captions=not is_single)
        with self.timings("text tower"):
            if is_single:
                outputs = outputs._replace(captions=self.model(batch, precomputed, images=False).captions)
        leaves = outputs.detached()
        metrics = self._backward_loss([batch], [leaves])
        pairs = list(zip(outputs.tensors(), leaves.tensors(), strict=True))
        image_tensor_count = (
            0 if not is_single or outputs.images is None else len([t for t in outputs.images if t is not None])
        )
        with self.timings("image tower"):
            self._backward_towers(pairs[:image_tensor_count])
        with self.timings("text tower" if is_single else "both towers back"):
            self._backward_towers(pairs[image_tensor_count:], averaged=not is_single)
        self.distributed.all_reduce_gradients(self.ignored_parameters)
        return metrics

    def backward_cached(self, batches: Iterator[Batch], chunks: int, lookup: FeatureProvider) -> StepMetrics:
        """Compute the gradients of a batch that goes through the towers in chunks, twice (gradient caching).

        A chunk of which no image can be read is left out; if a process has no other, the step is not taken.

        Args:
            batches: Gives this process's chunks, and then the same ones again.
            chunks: Number of chunks, the same on every process.
            lookup: Gives the outputs of frozen towers for a chunk.

        Returns:
            Loss and accuracy; parameters have the gradients of the undivided batch.
        """
        distributed = self.distributed
        cached_batches, outputs, random_states = [], [], []
        empty: list[bool] = []
        skipped: list[str] = []

        def first_pass() -> int:
            for _ in range(chunks):
                batch, sizes = self._next_chunk(batches)
                empty.append(min(sizes) == 0)
                if empty[-1]:
                    message = f"{len(batch)} images, in a chunk that another process had none of"
                    skipped.extend(batch.skipped + [message] * len(batch))
                    continue
                batch = self._merge_groups(batch)
                random_states.append(capture_random_state(batch))
                with torch.no_grad(), self.timings("towers, first pass"):
                    outputs.append(self.towers(batch, lookup(batch)).detached())
                # Pixels come once more; what the loss needs is kept.
                cached_batches.append(batch.without_pixels())
            return sum(map(len, cached_batches))

        def second_pass() -> None:
            cached = zip(outputs, random_states, strict=True)
            for passed_over in empty:
                batch, _ = self._next_chunk(batches)
                if passed_over:
                    continue
                leaves, random_state = next(cached)
                batch = self._merge_groups(batch)
                # The first chunk's leaves have the gradients of the scale, which is one for all chunks.
                with replay_random_state(random_state, batch), self.timings("towers, second pass"):
                    recomputed = self.towers(batch, lookup(batch))
                    self._backward_towers(
                        list(zip(recomputed.tensors(), leaves.tensors(), strict=True)), averaged=distributed.shard
                    )

        # A sharded model's layers wait for each other within the pass: a process that fails there ends with its own
        # words, and is not to wait for the others with them.
        sizes = (
            distributed.all_gather_object(first_pass()) if distributed.shard else distributed.run_and_gather(first_pass)
        )
        if min(sizes) == 0 or sum(sizes) < 2:
            # Each is dropped as it comes: all of them with their pixels may be too many.
            distributed.run_on_all(lambda: deque((next(batches) for _ in range(chunks)), maxlen=0))
            return self.skip([*cached_batches], skipped)
        metrics = self._backward_loss(cached_batches, outputs, skipped)
        with distributed.no_sync(self.model):
            if distributed.shard:
                second_pass()
            else:
                distributed.run_on_all(second_pass)
        # What is sharded is reduced with every chunk: nobody holds the whole of it to be summed at the end.
        distributed.all_reduce_gradients(self.ignored_parameters if distributed.shard else self.parameters)
        return metrics

    def _next_chunk(self, batches: Iterator[Batch]) -> tuple[Batch, list[int]]:
        """The next chunk, and how many images every process has in it, as far as that is needed: what is sharded
        is called on all processes, or on none."""
        read: list[Batch] = []

        def one_more() -> int:
            read.append(next(batches))
            return len(read[0])

        sizes = self.distributed.run_and_gather(one_more) if self.distributed.shard else [one_more()]
        return read[0], sizes

    def skip(self, batches: Sequence[Batch], passed_over: Sequence[str] = ()) -> StepMetrics:
        """Report a step that cannot be taken, since a process has no image or all together have fewer than two.

        Every process calls this.

        Args:
            batches: What this process has of the batch all the same.
            passed_over: What it left out before, each with the reason.

        Returns:
            Metrics with `images` 0, and all images of the step in `left_out`.
        """
        skipped = [reason for batch in batches for reason in batch.skipped] + list(passed_over)
        images = sum(map(len, batches))
        if images:
            skipped.append(f"{images} images, whose step was none: too little else in it could be read")
        count = sum(self.distributed.all_gather_object(len(skipped) - bool(images) + images))
        return StepMetrics(0.0, 0.0, 0.0, 0, skipped, [], count)

    def _merge_groups(self, batch: Batch) -> Batch:
        """As a sharded model has to see it: every process calls it as often as every other."""
        return batch.as_single_group(self.aligner.text_tower.pad) if self.distributed.shard else batch

    def _backward_towers(self, pairs: list[tuple[Tensor, Tensor]], averaged: bool = False) -> None:
        """From the gradients of the leaves on through the towers.

        averaged: by a wrapper, over all processes, where the sum is wanted; it also waits for every gradient, those
        that are zero too.
        """
        with_gradients = []
        for state, leaf in pairs:
            if state.requires_grad and averaged:
                with_gradients.append(
                    (state, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * self.distributed.world_size)
                )
            elif state.requires_grad and leaf.grad is not None:
                with_gradients.append((state, leaf.grad))
        if with_gradients:
            torch.autograd.backward(
                [state for state, _ in with_gradients], [gradient for _, gradient in with_gradients]
            )

    def _backward_loss(
        self, batches: Sequence[Batch], outputs: Sequence[TowerOutputs], passed_over: Sequence[str] = ()
    ) -> StepMetrics:
        """The loss over all chunks of all processes; leaves gradients in the states' own leaves.

        passed_over: what of this process's part is not in the batches, as text.
        """
        with self.timings("loss"):
            distributed, first_output = self.distributed, outputs[0]
            images = torch.cat([s.images.vectors.detach() for s in outputs if s.images is not None])
            captions = torch.cat([g.vectors.detach() for s in outputs for g in s.captions])
            identity = torch.cat([batch.identity for batch in batches])
            caption_identity = torch.cat([batch.caption_identity[batch.order] for batch in batches])
            gathered = [distributed.gather_rows(t) for t in (images, captions, identity, caption_identity)]
            (images, own_images), (captions, own_captions) = gathered[:2]
            images.requires_grad_()
            captions.requires_grad_()
            caption_text, true_texts = _texts(batches, distributed)
            gallery = GatheredBatch(
                images, captions, gathered[2][0], gathered[3][0], own_images, own_captions, distributed.world_size,
                caption_text, true_texts,
            )  # fmt: skip
            loss = torch.zeros((), device=images.device)
            for piece in self.loss_fn.chunks(gallery, first_output.scale, first_output.bias):
                piece.backward()
                loss += piece.detach()
            distance = torch.zeros_like(loss)
            if self.distillation is not None:
                part = self.distillation.loss(gallery, batches)
                (self.distillation.weight * part).backward()
                distance = part.detach()
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in (images, captions)]
            if distributed.is_distributed:
                # What other processes' pieces found for the vectors of this one.
                gradients = [distributed.all_reduce(gradient) for gradient in gradients]
            self._scatter_gradients(outputs, gradients[0][own_images], gradients[1][own_captions])
            pair_loss = backward_pair_loss(
                self.aligner, distributed, gallery, outputs, self.negatives, self.fusion_weight, self.towers.dtypes[1]
            )
            with torch.no_grad():
                correct = count_top1_correct(gallery)
            skipped = [reason for batch in batches for reason in batch.skipped] + list(passed_over)
            counts = correct.new_tensor([float(len(identity)), float(len(skipped))])
            sums = torch.cat([torch.stack([loss, pair_loss, correct, distance]), counts])
            loss_sum, pair_sum, right_sum, distance_sum, count, left_out = distributed.all_reduce(sums).tolist()
        names = [name for batch in batches for name in batch.names][:5]
        accuracy = right_sum / len(captions)
        return StepMetrics(loss_sum, pair_sum, accuracy, round(count), skipped, names, round(left_out), distance_sum)

    @staticmethod
    def _scatter_gradients(outputs: Sequence[TowerOutputs], images: Tensor, captions: Tensor) -> None:
        """Give every chunk's vectors their part of the gradients."""
        row = column = 0
        for state in outputs:
            assert state.images is not None
            count = len(state.images.vectors)
            state.images.vectors.grad = images[row : row + count]
            row += count
            for group in state.captions:
                group.vectors.grad = captions[column : column + len(group.vectors)]
                column += len(group.vectors)


@torch.no_grad()
def count_top1_correct(gallery: GatheredBatch) -> Tensor:
    """Count the captions of this process that have one of their images first among all images.

    Args:
        gallery: The vectors of all processes, B images and M captions.

    Returns:
        The number, a scalar tensor.
    """
    own_captions = torch.arange(len(gallery.captions), device=gallery.captions.device)[gallery.own_captions]
    correct = torch.zeros((), device=own_captions.device)
    for rows in own_captions.split(max(1, (1 << 23) // len(gallery.images))):
        best_image = (gallery.captions[rows] @ gallery.images.T).argmax(dim=1)
        correct += gallery.are_positives(best_image, rows).sum()
    return correct


def _texts(batches: Sequence[Batch], distributed: Distributed) -> tuple[Tensor | None, Tensor | None]:
    """Text numbers of the captions of all chunks and processes (M,), and what is true of their images (K, 2); see
    `Batch`."""
    texts = [batch.caption_text_id[batch.order] for batch in batches if batch.caption_text_id is not None]
    true = [batch.identity_texts for batch in batches if batch.identity_texts is not None]
    if not texts or not true:
        return None, None
    return distributed.gather_rows(torch.cat(texts))[0], distributed.gather_rows(torch.cat(true))[0].unique(dim=0)


def forward_backward(
    step: Step, stream: Iterator[Batch], config: RuntimeConfig, lookup: Callable[[Batch], PrecomputedFeatures],
    chunks: int,
) -> StepMetrics:  # fmt: skip
    """Compute the gradients of the next batch of a stream; every process calls this.

    Args:
        step: Takes a batch to its gradients.
        stream: Gives this process's part of the next batch; with `chunks`, its chunks twice.
        config: The settings of the run's computation, of which `chunk` is read.
        lookup: Gives the outputs of frozen towers for a batch.
        chunks: Number of chunks in which the stream gives the batch; 0 if it gives it whole, to be divided here by
            `config.chunk`.

    Returns:
        Loss and accuracy; `images` is 0 for a step that could not be taken.
    """
    distributed, device = step.distributed, step.distributed.device
    if chunks:
        return step.backward_cached((batch.to(device) for batch in stream), chunks, lookup)
    read: list[Batch] = []

    def one_more() -> int:
        read.append(next(stream).to(device))
        return len(read[0])

    # Every process takes part in a step, or none.
    sizes, batch = distributed.run_and_gather(one_more), read[0]
    if min(sizes) == 0 or sum(sizes) < 2:
        return step.skip([batch])
    if config.chunk:
        # As many on every process: a sharded model is called together.
        count = min(-(-max(sizes) // config.chunk), min(sizes))
        parts = [part.to(device) for part in batch.chunks(count, step.aligner.text_tower.pad)]
        return step.backward_cached(iter([*parts, *parts]), len(parts), lookup)
    return step.backward(batch, lookup(batch))
