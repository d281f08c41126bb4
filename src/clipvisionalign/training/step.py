"""One training step: from a batch to gradients, for one process or many, whole or in chunks.

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
from torch import Tensor, nn

from clipvisionalign.batch import Batch
from clipvisionalign.models.aligner import PAIR_PARTS
from clipvisionalign.models.heads import CaptionStates, ImageStates
from clipvisionalign.models.late_interaction import LateTokens, late_scores
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.forward import Known, Knows, States, Towers
from clipvisionalign.training.fusion_loss import _tokens, dual_logits, fusion_loss, pair_loss
from clipvisionalign.training.losses import Gallery, softmax_terms
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.profiling import Timings
from clipvisionalign.training.replay import _random_state, _replayed


@dataclass
class StepFigures:
    """What a step showed, over all processes. accuracy: share of captions whose image came first among all. images: 0
    for a step that was none, since a process had no image, or all together had one; it has no gradients. skipped: what
    this process left out, in words; left_out: how many images all of them did."""

    loss: float
    pair_loss: float
    accuracy: float
    images: int
    skipped: list[str]
    names: list[str]
    left_out: int = 0


class Step:
    """Takes a batch to the gradients of all parameters. fusion_weight: of the loss of what scores pairs."""

    def __init__(
        self,
        towers: Towers,
        processes: Processes,
        negatives: int = 4,
        fusion_weight: float = 1.0,
        timings: Timings | None = None,
    ) -> None:
        self.towers, self.processes = towers, processes
        self.aligner, self.loss_of = towers.aligner, towers.loss_of
        self.negatives, self.fusion_weight = negatives, fusion_weight
        self.timings = timings or Timings()
        #: Gradients that arise in the loss itself: no wrapper of the towers sees them.
        parameters = dict(towers.named_parameters())
        self.apart = [name for name in parameters if name.removeprefix("aligner.").startswith(PAIR_PARTS)]
        self.apart_parameters = [parameters[name] for name in self.apart if parameters[name].requires_grad]
        self.parameters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
        self.model = processes.prepare(towers, self.apart)

    def whole(self, batch: Batch, known: Known) -> StepFigures:
        """A batch in one piece."""
        batch = self._grouped(batch)
        with self.timings("picture tower"):
            # Two calls where nothing has to be synchronised, so that each tower's time can be told.
            alone = not self.processes.many
            states = self.model(batch, known, captions=not alone)
        with self.timings("text tower"):
            if alone:
                states = states._replace(captions=self.model(batch, known, images=False).captions)
        leaves = states.detached()
        figures = self._loss([batch], [leaves])
        pairs = list(zip(states.tensors(), leaves.tensors(), strict=True))
        first = 0 if not alone or states.images is None else len([t for t in states.images if t is not None])
        with self.timings("picture tower"):
            self._back(pairs[:first])
        with self.timings("text tower" if alone else "both towers back"):
            self._back(pairs[first:], averaged=not alone)
        self.processes.sum_gradients(self.apart_parameters)
        return figures

    def cached(self, batches: Iterator[Batch], chunks: int, known: Knows) -> StepFigures:
        """A batch in `chunks` chunks, which `batches` gives twice; as many on every process.

        A chunk without images, all of them unreadable, is passed over; where a process has nothing else the step is
        none.
        """
        processes = self.processes
        taken, states, random_states = [], [], []
        empty: list[bool] = []
        skipped: list[str] = []

        def first_pass() -> int:
            for _ in range(chunks):
                batch, sizes = self._next(batches)
                empty.append(min(sizes) == 0)
                if empty[-1]:
                    alone = f"{len(batch)} images, in a chunk that another process had none of"
                    skipped.extend(batch.skipped + [alone] * len(batch))
                    continue
                batch = self._grouped(batch)
                random_states.append(_random_state(batch))
                with torch.no_grad(), self.timings("towers, first pass"):
                    states.append(self.towers(batch, known(batch)).detached())
                # Pixels come once more; what the loss needs is kept.
                taken.append(batch.without_pixels())
            return sum(map(len, taken))

        def second_pass() -> None:
            kept = zip(states, random_states, strict=True)
            for passed_over in empty:
                batch, _ = self._next(batches)
                if passed_over:
                    continue
                leaves, random_state = next(kept)
                batch = self._grouped(batch)
                # The first chunk's leaves have the gradients of the scale, which is one for all chunks.
                with _replayed(random_state, batch), self.timings("towers, second pass"):
                    again = self.towers(batch, known(batch))
                    self._back(list(zip(again.tensors(), leaves.tensors(), strict=True)), averaged=processes.shard)

        # A sharded model's layers wait for each other within the pass: a process that fails there ends with its own
        # words, and is not to wait for the others with them.
        sizes = processes.objects(first_pass()) if processes.shard else processes.everyone(first_pass)
        if min(sizes) == 0 or sum(sizes) < 2:
            # Each is dropped as it comes: all of them with their pixels may be too many.
            processes.each(lambda: deque((next(batches) for _ in range(chunks)), maxlen=0))
            return self.none([*taken], skipped)
        figures = self._loss(taken, states, skipped)
        with processes.unsynchronised(self.model):
            if processes.shard:
                second_pass()
            else:
                processes.each(second_pass)
        # What is sharded is reduced with every chunk: nobody holds the whole of it to be summed at the end.
        processes.sum_gradients(self.apart_parameters if processes.shard else self.parameters)
        return figures

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch, list[int]]:
        """The next chunk, and how many images every process has in it, as far as that has to be known: what is sharded
        is called on all processes, or on none."""
        read: list[Batch] = []

        def one_more() -> int:
            read.append(next(batches))
            return len(read[0])

        sizes = self.processes.everyone(one_more) if self.processes.shard else [one_more()]
        return read[0], sizes

    def none(self, batches: Sequence[Batch], passed_over: Sequence[str] = ()) -> StepFigures:
        """A step that cannot be taken, since some process has no image or all together have one; every process calls
        this. batches: what this process has none the less."""
        skipped = [reason for batch in batches for reason in batch.skipped] + list(passed_over)
        images = sum(map(len, batches))
        if images:
            skipped.append(f"{images} images, whose step was none: too little else in it could be read")
        count = sum(self.processes.objects(len(skipped) - bool(images) + images))
        return StepFigures(0.0, 0.0, 0.0, 0, skipped, [], count)

    def _grouped(self, batch: Batch) -> Batch:
        """As a sharded model has to see it: every process calls it as often as every other."""
        return batch.in_one_group(self.aligner.text_tower.pad) if self.processes.shard else batch

    def _back(self, pairs: list[tuple[Tensor, Tensor]], averaged: bool = False) -> None:
        """From the gradients of the leaves on through the towers. averaged: by a wrapper, over all processes, where the
        sum is wanted; it also waits for every gradient, those that are zero too."""
        found = []
        for state, leaf in pairs:
            if state.requires_grad and averaged:
                found.append((state, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * self.processes.count))
            elif state.requires_grad and leaf.grad is not None:
                found.append((state, leaf.grad))
        if found:
            torch.autograd.backward([state for state, _ in found], [gradient for _, gradient in found])

    def _loss(self, batches: Sequence[Batch], states: Sequence[States], passed_over: Sequence[str] = ()) -> StepFigures:
        """The loss over all chunks of all processes; leaves gradients in the states' own leaves. passed_over: what of
        this process's part is not in the batches, in words."""
        with self.timings("loss"):
            processes, first = self.processes, states[0]
            images = torch.cat([s.images.vectors.detach() for s in states if s.images is not None])
            captions = torch.cat([g.vectors.detach() for s in states for g in s.captions])
            identity = torch.cat([batch.identity for batch in batches])
            caption_identity = torch.cat([batch.caption_identity[batch.order] for batch in batches])
            gathered = [processes.gather(t) for t in (images, captions, identity, caption_identity)]
            (images, own_images), (captions, own_captions) = gathered[:2]
            images.requires_grad_()
            captions.requires_grad_()
            caption_text, true_texts = _texts(batches, processes)
            gallery = Gallery(
                images, captions, gathered[2][0], gathered[3][0], own_images, own_captions, processes.count,
                caption_text, true_texts,
            )  # fmt: skip
            loss = torch.zeros((), device=images.device)
            for piece in self.loss_of.pieces(gallery, first.scale, first.bias):
                piece.backward()
                loss += piece.detach()
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in (images, captions)]
            if processes.many:
                # What other processes' pieces found for the vectors of this one.
                gradients = [processes.total(gradient) for gradient in gradients]
            self._hand_back(states, gradients[0][own_images], gradients[1][own_captions])
            pair_loss = self._pair_loss(gallery, states)
            with torch.no_grad():
                right = first_is_partner(gallery)
            skipped = [reason for batch in batches for reason in batch.skipped] + list(passed_over)
            counts = right.new_tensor([float(len(identity)), float(len(skipped))])
            sums = torch.cat([torch.stack([loss, pair_loss, right]), counts])
            loss_sum, pair_sum, right_sum, count, left_out = processes.total(sums).tolist()
        names = [name for batch in batches for name in batch.names][:5]
        accuracy = right_sum / len(captions)
        return StepFigures(loss_sum, pair_sum, accuracy, round(count), skipped, names, round(left_out))

    @staticmethod
    def _hand_back(states: Sequence[States], images: Tensor, captions: Tensor) -> None:
        """Give every chunk's vectors their part of the gradients."""
        row = column = 0
        for state in states:
            assert state.images is not None
            count = len(state.images.vectors)
            state.images.vectors.grad = images[row : row + count]
            row += count
            for group in state.captions:
                group.vectors.grad = captions[column : column + len(group.vectors)]
                column += len(group.vectors)

    def _pair_loss(self, gallery: Gallery, states: Sequence[States]) -> Tensor:
        """This process's part of the loss of late interaction and fusion; its gradients are taken here.

        The late interaction is asked for this process's rows against the columns of all. The fusion draws its negatives
        among this process's own pairs.
        """
        aligner, processes = self.aligner, self.processes
        if aligner.late is None:
            return torch.zeros((), device=states[0].scale.device)
        images = ImageStates(*(torch.cat(part) for part in zip(*(s.images for s in states if s.images), strict=True)))
        captions = [group for state in states for group in state.captions]
        partners = gallery.partners(gallery.own_images, gallery.own_captions)
        text_format = self.towers.formats[1]
        with torch.autocast(images.vectors.device.type, text_format, enabled=text_format != torch.float32):
            if not processes.many:
                loss = pair_loss(aligner, images, captions, partners, self.negatives)
                (self.fusion_weight * loss).backward()
                return loss.detach()
            patches, late_loss, late = self._late_loss_of_all(gallery, images, captions)
            if aligner.fusion is None:
                return late_loss
            logits = late + dual_logits(aligner, images, captions)
            # Sums over processes become means: each has pairs of its own.
            fused = fusion_loss(aligner, images, patches, captions, logits, partners, self.negatives) / processes.count
        (self.fusion_weight * fused).backward()
        return late_loss + fused.detach()

    def _late_loss_of_all(
        self, gallery: Gallery, images: ImageStates, captions: list[CaptionStates]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The late interaction among the images and captions of all processes.

        Returns this process's patches, its part of the loss, whose gradients are taken here, and the logits of its own
        pairs. Tokens and patches of all are gathered, not their scores: rows here, columns of all.
        """
        late, processes = self.aligner.late, self.processes
        assert late is not None
        assert images.patches is not None
        patches = late.patches(images.patches)
        parts = [late.tokens(*_tokens(group)) for group in captions]
        width = max(processes.objects(max(part.weights.shape[1] for part in parts)))
        vectors = torch.cat([nn.functional.pad(p.vectors, (0, 0, 0, width - p.vectors.shape[1])) for p in parts])
        weights = torch.cat([nn.functional.pad(p.weights, (0, width - p.weights.shape[1])) for p in parts])
        own = (patches, vectors, weights)
        everyone = [processes.gather(tensor.detach())[0].requires_grad_() for tensor in own]
        tokens = LateTokens(everyone[1], everyone[2], everyone[2] > 0)
        rows, columns = gallery.own_images, gallery.own_captions
        logits = late.scale() * late_scores(everyone[0][rows], tokens)
        by_image = softmax_terms(logits, gallery.partners(images=rows), 0.0).sum() / len(gallery.images)
        others = late.scale() * late_scores(everyone[0], tokens.rows(columns)).T
        by_caption = softmax_terms(others, gallery.partners(captions=columns).T, 0.0).sum() / len(gallery.captions)
        loss = (by_image + by_caption) / 2
        (self.fusion_weight * loss).backward()
        gradients = [processes.total(tensor.grad) for tensor in everyone if tensor.grad is not None]
        torch.autograd.backward(own, [gradients[0][rows], gradients[1][columns], gradients[2][columns]])
        return patches.detach(), loss.detach(), logits.detach()[:, columns]


@torch.no_grad()
def first_is_partner(gallery: Gallery) -> Tensor:
    """How many of a gallery's own captions have a partner for the first of all images."""
    own = torch.arange(len(gallery.captions), device=gallery.captions.device)[gallery.own_captions]
    right = torch.zeros((), device=own.device)
    for rows in own.split(max(1, (1 << 23) // len(gallery.images))):
        first = (gallery.captions[rows] @ gallery.images.T).argmax(dim=1)
        right += gallery.are_partners(first, rows).sum()
    return right


def _texts(batches: Sequence[Batch], processes: Processes) -> tuple[Tensor | None, Tensor | None]:
    """What the captions of all chunks and processes say (M,), and what is true of their images (K, 2); see `Batch`."""
    texts = [batch.caption_text[batch.order] for batch in batches if batch.caption_text is not None]
    true = [batch.true_texts for batch in batches if batch.true_texts is not None]
    if not texts or not true:
        return None, None
    return processes.gather(torch.cat(texts))[0], processes.gather(torch.cat(true))[0].unique(dim=0)


def take_step(
    step: Step, stream: Iterator[Batch], config: RunConfig, knows: Callable[[Batch], Known], chunks: int
) -> StepFigures:
    """The gradients of the next batch, and what it showed; its `images` are 0 where it could not be taken.

    chunks: in how many the stream gives the batch, twice; 0 where it comes whole, and is cut here if it has to be.
    """
    processes, device = step.processes, step.processes.device
    if chunks:
        return step.cached((batch.to(device) for batch in stream), chunks, knows)
    read: list[Batch] = []

    def one_more() -> int:
        read.append(next(stream).to(device))
        return len(read[0])

    # Every process takes part in a step, or none.
    sizes, batch = processes.everyone(one_more), read[0]
    if min(sizes) == 0 or sum(sizes) < 2:
        return step.none([batch])
    if config.chunk:
        # As many on every process: a sharded model is called together.
        count = min(-(-max(sizes) // config.chunk), min(sizes))
        parts = [part.to(device) for part in batch.chunks(count, step.aligner.text_tower.pad)]
        return step.cached(iter([*parts, *parts]), len(parts), knows)
    return step.whole(batch, knows(batch))
