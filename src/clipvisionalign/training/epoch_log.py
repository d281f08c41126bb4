"""Records and output of steps and epochs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.progress import progress_step
from clipvisionalign.retrieval.metrics import MetricEstimate
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.diagnostics import EpochMetrics, diagnose_forgetting, find_failures, unreported
from clipvisionalign.training.metrics_logger import MetricsLogger
from clipvisionalign.training.optimizer import trained_rates
from clipvisionalign.training.profiling import Timings
from clipvisionalign.training.state import TrainProgress
from clipvisionalign.training.validation import DevMetrics

logger = logging.getLogger(__name__)


def record_epoch(
    progress: TrainProgress,
    dev: DevMetrics,
    shape: tuple[int, int],
    records: MetricsLogger,
    timings: Timings,
    seconds: float,
) -> None:
    """Record the figures of an epoch in metrics.jsonl and in the history.

    Args:
        progress: The progress of the run, whose sums of the epoch are read and whose history grows.
        dev: The figures on dev.
        shape: Images and captions of a step.
        records: Writes metrics.jsonl.
        timings: The seconds by kind of work, which are reset.
        seconds: Seconds since the run started.
    """
    loss, fusion, accuracy = (value / max(progress.seen, 1) for value in progress.sums)
    distance = {"train_distillation": progress.distillation / max(progress.seen, 1)} if progress.distillation else {}
    time = {kind: round(taken, 2) for kind, taken in timings.pop().items()}
    progress.history.append([loss, accuracy, dev.metrics.rsum.value, *shape, dev.loss, dev.accuracy])
    records.write(
        progress.step, epoch=progress.epoch, train_loss=loss, train_fusion_loss=fusion, train_accuracy=accuracy,
        **distance, **dev.to_dict(), seconds=seconds, time=time,
    )  # fmt: skip


def epoch_line(
    epoch: int, epochs: int, progress: TrainProgress, dev: DevMetrics, seconds: float, ema_model: Aligner
) -> str:
    """The line of an epoch: losses, dev recall with chance, temperature and time.

    Args:
        epoch: Number of the epoch; 0 for a model as it is, of which there are no losses of training.
        epochs: Number of all epochs.
        progress: The progress of the run.
        dev: The figures on dev.
        seconds: Seconds since the run started.
        ema_model: The model that was measured.

    Returns:
        The line.
    """
    loss, fusion, accuracy = (value / max(progress.seen, 1) for value in progress.sums)
    pair = f", fusion {fusion:.3f}" if ema_model.fusion is not None else ""
    distance = progress.distillation / max(progress.seen, 1)
    pair += f", distance from the start {distance:.3f}" if distance else ""
    trained = f"epoch {epoch}/{epochs}: loss {loss:.3f}{pair}, accuracy {accuracy:.3f}" if epoch else "as it is"
    temperature = 1 / ema_model.scale().item()
    return f"{trained} | {_dev_figures(dev)} | temperature {temperature:.3f} | {seconds:.0f} s"


def record_start(dev: DevMetrics, rsum: MetricEstimate, records: MetricsLogger) -> None:
    """Record the dev figures of the model that a run starts from, as those of epoch 0, in metrics.jsonl.

    Args:
        dev: The figures on dev.
        rsum: Their rsum, with its interval.
        records: Writes metrics.jsonl.
    """
    figures = dev.to_dict()
    figures["dev"]["rsum"] = {"value": rsum.value, "low": rsum.low, "high": rsum.high}
    records.write(0, epoch=0, **figures)


def start_line(dev: DevMetrics, rsum: MetricEstimate) -> str:
    """The line of the dev figures before the first step.

    Args:
        dev: The figures on dev.
        rsum: Their rsum, with its interval.

    Returns:
        The line.
    """
    known = rsum.low is not None and rsum.high is not None
    interval = f"interval of rsum [{rsum.low:.1f}, {rsum.high:.1f}]" if known else "too few images for an interval"
    return f"before the first step: {_dev_figures(dev)}; {interval}"


def _dev_figures(dev: DevMetrics) -> str:
    """Loss, accuracy and recall on dev, with chance."""
    ways, chance = ("image_to_text", "text_to_image"), dev.metrics.chance
    recalls, by_chance = [], []
    for k in (1, 5):
        both = [getattr(dev.metrics, way)[f"recall_at_{k}"].value for way in ways]
        recalls.append(f"R@{k} {' / '.join(f'{100 * value:.1f}' for value in both)}")
        by_chance.append(" / ".join(f"{100 * chance[way][f'recall_at_{k}']:.1f}" for way in ways))
    return (
        f"dev loss {dev.loss:.3f}, accuracy {dev.accuracy:.3f}, {', '.join(recalls)} (image to text / text to image), "
        f"rsum {dev.metrics.rsum.value:.1f} (chance: {', '.join(by_chance)}, {chance['rsum']:.1f})"
    )


def log_findings(progress: TrainProgress, dev: DevMetrics, config: RunConfig, start: list[float | None]) -> None:
    """Log the diagnosis of an epoch, as warnings: each failure once, and again where it has become twice as bad.

    Args:
        progress: The progress of the run, whose history has the epoch; what is logged is added to `reported`.
        dev: The figures on dev.
        config: The settings of the run.
        start: Dev rsum that the learning rates should not destroy, and its interval: value, low and high, those None
            without one; empty for none.
    """
    history = [EpochMetrics(*figures) for figures in progress.history]
    findings = find_failures(history, dev.image_vectors, dev.caption_vectors, config.best_by)
    chance, rates = dev.metrics.chance["rsum"], trained_rates(config)
    findings += diagnose_forgetting(history[-1].rsum, start, rates, chance)
    for finding in unreported(findings, progress.reported):
        logger.warning(finding.message)


@contextmanager
def progress_line(steps: int, done: int, shown: bool) -> Iterator[Callable[[int, np.ndarray, float, float], None]]:
    """Show the progress of the training in a block, with loss, accuracy, dev rsum so far and images per second.

    Args:
        steps: Number of all steps.
        done: Steps before this session.
        shown: Whether it is shown.

    Yields:
        A function of the step's number, its loss, fusion loss and accuracy (3,), images per second, and best dev rsum
        (below
        0 for none).
    """
    with progress_step("training, step", steps, shown) as line:
        line.set_initial(done)

        def show(step: int, values: np.ndarray, speed: float, best: float) -> None:
            recall = f", dev rsum {best:.1f}" if best >= 0 else ""
            line.update(step, f"loss {values[0]:.3f}, accuracy {values[2]:.3f}{recall}, {speed:.1f} images/s")

        yield show
