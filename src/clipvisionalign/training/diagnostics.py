"""Training diagnostics: common failures, detected from loss and dev figures, with the usual remedies.

The four ways in which people report it: every vector alike ("the same image for every query", openai/CLIP#99), a loss
that stays where guessing would put it, a dev figure that falls while the training figure rises (openai/CLIP#323), and
learning rates that destroy what a pretrained model had learned (openai/CLIP#150).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: A learning rate at which a pretrained dual encoder usually keeps what it has learned.
USUAL_RATE = 1e-5

#: Mean cosine of different images above which all vectors count as alike.
COLLAPSE_COSINE = 0.95


@dataclass(frozen=True)
class EpochMetrics:
    """The figures of an epoch that diagnostics read.

    Attributes:
        loss: Mean training loss.
        accuracy: Share of training captions whose image came first in its step.
        rsum: Dev rsum, 0 to 600.
        step_images: B, images in a step.
        step_captions: M, captions in a step.
        dev_loss: The training's own loss on dev; NaN in runs from before it was measured.
        dev_accuracy: The training's own accuracy on dev; NaN likewise.
    """

    loss: float
    accuracy: float
    rsum: float
    step_images: int
    step_captions: int
    dev_loss: float = math.nan
    dev_accuracy: float = math.nan

    @property
    def chance_loss(self) -> float:
        """The contrastive loss of equal scores: each pair among the negatives of its row and column."""
        images, captions = max(self.step_images, 2), max(self.step_captions, 2)
        return (math.log(images) + math.log(1 + captions - captions / images)) / 2


class Finding(NamedTuple):
    """A failure that the figures of an epoch show.

    Attributes:
        kind: Which failure, one word.
        severity: How bad it is, above 0: a larger number is worse, twice as large twice as bad.
        message: The sentence for the user, with remedies.
    """

    kind: str
    severity: float
    message: str


def mean_cosine(vectors: np.ndarray) -> float:
    """Mean cosine of all pairs of different vectors.

    Args:
        vectors: (N, D) unit length.

    Returns:
        -1 to 1; 0 for fewer than two vectors.

    >>> round(mean_cosine(np.eye(3)), 6), round(mean_cosine(np.ones((2, 1))), 6)
    (0.0, 1.0)
    """
    count = len(vectors)
    if count < 2:
        return 0.0
    total = float(np.square(vectors.sum(axis=0, dtype=np.float64)).sum())
    return (total - count) / (count * (count - 1))


def diagnose(
    history: list[EpochMetrics], image_vectors: np.ndarray, caption_vectors: np.ndarray, best_by: str = "rsum"
) -> list[str]:
    """Common failures of a training that its figures show.

    Args:
        history: The epochs so far, at least one.
        image_vectors: (N, D) of the dev gallery, unit length.
        caption_vectors: (M, D) of the dev gallery, unit length.
        best_by: What epochs are chosen by, "rsum" or "loss" of dev.

    Returns:
        A sentence with remedies for each failure; empty for none.
    """
    return [finding.message for finding in find_failures(history, image_vectors, caption_vectors, best_by)]


def find_failures(
    history: list[EpochMetrics], image_vectors: np.ndarray, caption_vectors: np.ndarray, best_by: str = "rsum"
) -> list[Finding]:
    """The failures that the latest epoch shows, with how bad each is.

    Args:
        history: The epochs so far, at least one.
        image_vectors: (N, D) of the dev gallery, unit length.
        caption_vectors: (M, D) of the dev gallery, unit length.
        best_by: What epochs are chosen by, "rsum" or "loss" of dev.

    Returns:
        One for each failure; empty for none.
    """
    findings = []
    for name, vectors in (("image", image_vectors), ("caption", caption_vectors)):
        cosine = mean_cosine(vectors)
        if cosine > COLLAPSE_COSINE:
            message = (
                f"every {name} vector is nearly alike (mean cosine {cosine:.3f}), so every query finds the same. What "
                "usually helps: a lower learning rate (--text_lr, --head_lr), a longer warm-up (--warmup), a larger "
                "batch (--batch), pretrained towers instead of random ones."
            )
            findings.append(Finding(f"collapse of {name}s", 1 / max(1 - cosine, 1e-6), message))
    latest = history[-1]
    is_falling = len(history) >= 2 and latest.loss < 0.97 * history[-2].loss
    is_guessing = latest.loss > 0.97 * latest.chance_loss and latest.accuracy < 3 / latest.step_images
    if len(history) >= 2 and is_guessing and not is_falling:
        what = "is what guessing gives" if latest.loss < 1.1 * latest.chance_loss else "is above what guessing gives"
        message = (
            f"nothing is learned: the loss, {latest.loss:.2f}, {what} ({latest.chance_loss:.2f}). What usually "
            "helps: look at the pairs with 'clipvisionalign check' (are captions and images of each other?), a "
            "higher --head_lr, pretrained towers, more epochs."
        )
        findings.append(Finding("guessing", latest.loss, message))
    if len(history) >= 3:
        findings += _diagnose_overfitting(history, best_by)
    return findings


def unreported(findings: list[Finding], reported: dict[str, float]) -> list[Finding]:
    """The failures that the user has not been told of, or that have become twice as bad since.

    Args:
        findings: Failures of an epoch.
        reported: The severity at which each kind was last reported; those that are returned are added.

    Returns:
        Some of `findings`.

    >>> reported: dict[str, float] = {}
    >>> [len(unreported([Finding("guessing", loss, "")], reported)) for loss in (5.0, 5.5, 9.0, 10.0)]
    [1, 0, 0, 1]
    """
    news = [each for each in findings if each.severity >= 2 * reported.get(each.kind, 0.0)]
    reported |= {each.kind: each.severity for each in news}
    return news


def diagnose_forgetting(
    rsum: float, start: Sequence[float | None], rates: dict[str, float], chance: float
) -> list[Finding]:
    """Whether the learning rates destroy what the model that a run starts from has learned (openai/CLIP#150).

    Args:
        rsum: Dev rsum after an epoch, percent.
        start: Dev rsum before the first step, and its interval: value, low and high, None without one; empty for a run
            from no model.
        rates: The learning rates of what is trained, by the names of their settings.
        chance: Dev rsum of a random ranking: a start that is not above it has nothing to lose.

    Returns:
        The diagnosis where rsum is below that interval, as severe as rsum has fallen; else empty.
    """
    value, low, high = start or (None, None, None)
    if value is None or low is None or high is None or low <= chance or rsum >= low:
        return []
    given = ", ".join(f"--{name} {rate:g}" for name, rate in rates.items())
    usual = ", ".join(f"--{name} {USUAL_RATE:g}" for name in rates)
    message = (
        f"dev rsum is {rsum:.1f}, and was {value:.1f} [{low:.1f}, {high:.1f}] before the first step: "
        f"these learning rates destroy what the model had learned ({given}). What usually helps: rates from 1e-6 "
        f"to 1e-5 ({usual}), a first stage of the heads alone (--stages heads:1,all:3), adapters (--peft lora), "
        "--distill 1."
    )
    return [Finding("forgetting", value - rsum, message)]


def _diagnose_overfitting(history: list[EpochMetrics], best_by: str) -> list[Finding]:
    """Whether dev has become worse for two epochs, by what the checkpoint is chosen by, while the training loss still
    improves."""
    latest = history[-1]
    if best_by == "loss":
        best = min(range(len(history)), key=lambda epoch: history[epoch].dev_loss)
        worse = latest.dev_loss > 1.01 * history[best].dev_loss
        severity = latest.dev_loss - history[best].dev_loss
        trend = f"dev loss has risen from {history[best].dev_loss:.3f} (epoch {best + 1}) to {latest.dev_loss:.3f}"
    else:
        best = max(range(len(history)), key=lambda epoch: history[epoch].rsum)
        worse = latest.rsum < 0.99 * history[best].rsum
        severity = history[best].rsum - latest.rsum
        trend = f"dev rsum has fallen from {history[best].rsum:.1f} (epoch {best + 1}) to {latest.rsum:.1f}"
    if len(history) - 1 - best < 2 or not worse or latest.accuracy <= history[best].accuracy:
        return []
    message = (
        f"{trend} while the training accuracy rises: it learns the training pairs by heart. The best checkpoint is "
        "kept. What usually helps: fewer epochs, a frozen image tower (--freeze image), --augment flip+crop, more "
        "--weight_decay, a lower --text_lr."
    )
    return [Finding("overfitting", severity, message)]
