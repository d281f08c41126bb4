"""The data set of a study: read or drawn, checked, and the part of it that its trials are measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.foils import MinimalPair, make_minimal_pairs, read_minimal_pairs
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.image_fingerprints import ImageFingerprint, near_duplicates
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.scene_dataset import (
    is_scene_dataset,
    random_scenes,
    read_scenes,
    scene_difficulty,
    write_scenes,
)
from clipvisionalign.data.scene_difficulty import captions_per_scene
from clipvisionalign.data.split_file import split_file_path, write_splits_command
from clipvisionalign.data.splits import SPLIT_RULE, connected_groups
from clipvisionalign.files import atomic_write, remove
from clipvisionalign.images import open_image
from clipvisionalign.retrieval.audit import MIN_SAMPLE, audited_images
from clipvisionalign.study.config import Plan, data_source
from clipvisionalign.study.folder import SCENES_FOLDER
from clipvisionalign.study.validation import PlanError
from clipvisionalign.training.halves import positives_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyContext:
    """What a study's trials are measured on, and how.

    Attributes:
        plan: The plan.
        study: The study's folder.
        data: The whole data set.
        eval_data: The split that is measured.
        pairs: Sets of minimal pairs, by name.
        overlap: Images in two splits; None where there is one split.
        read_only: Whether nothing is measured: what was measured before is taken.
    """

    plan: Plan
    study: Path
    data: CaptionedImages
    eval_data: CaptionedImages
    pairs: dict[str, list[MinimalPair]]
    overlap: list[str] | None
    read_only: bool = False


def split_overlap(data: CaptionedImages) -> list[str] | None:
    """Images in two splits.

    Args:
        data: The data set.

    Returns:
        Their names; None where there is one split, which cannot overlap with itself.
    """
    messages = [problem.message for problem in data.problems if "two splits" in problem.kind]
    return messages if len(data.split_sizes()) > 1 else None


def check_possible(context: StudyContext) -> None:
    """Check that a trial could have a result.

    Args:
        context: What the trials are measured on.

    Raises:
        DataError: None could, whatever is trained: an audit would fail all of them.
    """
    plan, eval_data, overlap = context.plan, context.eval_data, context.overlap
    prefix = f"{context.data.source}: no cell could have a result"
    if overlap:
        examples_text = "; ".join(overlap[:3]) + (" ..." if len(overlap) > 3 else "")
        raise DataError(
            f"{prefix}, as every audit would fail: {len(overlap):,} images or identities stand in two splits: "
            f"{examples_text}; "
            f"{_way_apart(context.data, plan)}"
        )
    for name, source in (("train", context.data), ("dev", _dev_of(plan, context.data))):
        if (count := source.split_sizes().get(name, 0)) < 2:
            raise DataError(f"{source.source}: no cell could be trained: its {name} split has {count} images"
                            f"{source.splits_hint()}")  # fmt: skip
    positives = positives_of(eval_data)
    try:
        audited_images(positives, max(plan.measure.audit_images, MIN_SAMPLE), np.random.default_rng(0))
    except ValueError as error:
        raise DataError(f"{prefix}: {error} (split '{plan.split}', measure: audit_images)") from None


def _way_apart(data: CaptionedImages, plan: Plan) -> str:
    """How images that are (nearly) the same come to stand in one split."""
    group = f" --group {plan.group}" if plan.group else ""
    share_out = f"{write_splits_command(data.source)[:-1]}{group}' shares all images out, such ones together"
    if not data.official_splits:
        return share_out
    if data.split_rule == SPLIT_RULE:
        return f"{split_file_path(data.source)} has them so: remove it, and {share_out}"
    way = "leave each out of one of its splits, or name the column that keeps them together (group)"
    return f"'clipvisionalign check {data.source}' lists them: {way}"


def _dev_of(plan: Plan, data: CaptionedImages) -> CaptionedImages:
    """The data set of whose dev split epochs are chosen. Raises PlanError where it cannot be read."""
    elsewhere = plan.settings.get("dev_data")
    if not elsewhere:
        return data
    try:
        return read_captioned_images(elsewhere, plan.layout).with_identity(plan.identity)
    except (ValueError, OSError) as error:
        raise PlanError((("settings", "dev_data"), str(error))) from None


@contextmanager
def remove_scenes_if_refused(study: Path) -> Iterator[None]:
    """What the body drew is not left where the body raises an error.

    Args:
        study: The study's folder.

    Yields:
        Nothing.
    """
    existed = (study / SCENES_FOLDER).exists()
    try:
        yield
    except Exception:
        if not existed:
            remove(study / SCENES_FOLDER)
        raise


def open_study_data(plan: Plan, study: Path, scenes_folder: Path) -> CaptionedImages:
    """Open the checked data set, whole.

    Args:
        plan: The plan.
        study: The study's folder.
        scenes_folder: Where scenes are, or are drawn, once.

    Returns:
        The data set.

    Raises:
        DataError: It cannot be used.
        FileExistsError: Other scenes are drawn than the plan's.
    """
    source = Path(plan.data) if plan.data else scenes_folder
    if not plan.data:
        data_source(plan, study)
        if is_scene_dataset(scenes_folder):
            _refuse_other_scenes(plan, study, scenes_folder)
        elif scenes_folder.exists():
            raise FileExistsError(f"{scenes_folder}: is there already and no drawn scenes; give another --out")
        else:
            _draw_scenes(scenes_folder, plan)
            logger.info(
                f"{scenes_folder}: {plan.scenes:,} scenes drawn, "
                f"{count_noun(captions_per_scene(plan.drawing.plain, plan.drawing.difficulty), 'caption')} each"
            )
    data = read_captioned_images(source, plan.layout, plan.group).with_identity(plan.identity)
    if plan.split not in data.split_sizes():
        raise DataError(f"{source}: the split '{plan.split}' is empty; it has {', '.join(data.split_sizes())}")
    clean_data, report = check(data, full=True, show_progress=True)
    fingerprints = zip(clean_data.rows, report.fingerprints, strict=True)
    groups = _near_duplicate_groups([(row.name, each) for row, each in fingerprints if row.split == plan.split])
    return with_captions(replace(clean_data, near_duplicates=groups), plan.captions)


def _near_duplicate_groups(images: Sequence[tuple[str, ImageFingerprint]]) -> tuple[tuple[str, ...], ...]:
    """Groups of two images and more, by their names, in which each is equal or nearly equal to another one."""
    pairs = near_duplicates([fingerprint for _, fingerprint in images], show_progress=True)
    groups: dict[int, list[str]] = {}
    for (name, _), group in zip(images, connected_groups([[]] * len(images), pairs), strict=True):
        groups.setdefault(group, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _draw_scenes(folder: Path, plan: Plan) -> None:
    """A plot that was interrupted is drawn again."""
    drawing = plan.drawing
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder, sync=False) as aside:
        write_scenes(
            aside, plan.scenes, drawing.seed, drawing.pixels, drawing.plain, drawing.splits or None, drawing.difficulty
        )


def _refuse_other_scenes(plan: Plan, study: Path, scenes_folder: Path) -> None:
    """Raises FileExistsError where the scenes that are drawn are not those of the plan."""
    existing, drawing = read_scenes(scenes_folder), plan.drawing
    expected = {
        name: scene
        for name, _, scene in random_scenes(
            plan.scenes, drawing.seed, drawing.plain, drawing.splits or None, drawing.difficulty.groups
        )
    }
    if existing == expected and (recorded := scene_difficulty(scenes_folder)) != drawing.difficulty:
        asked = asdict(drawing.difficulty)
        differing = ", ".join(f"{name} {value}" for name, value in asdict(recorded).items() if value != asked[name])
        raise FileExistsError(
            f"{scenes_folder}: the captions of the scenes there are of another difficulty ({differing}); give another "
            "--out, or the plan that they were drawn by"
        )
    first_name = next(iter(existing), "")
    pixels = open_image(scenes_folder / first_name).width if (scenes_folder / first_name).is_file() else drawing.pixels
    if existing != expected or pixels != drawing.pixels:
        existing_text = (
            f"{len(existing):,} of {pixels} pixels"
            if existing == expected or len(existing) != len(expected)
            else "others"
        )
        raise FileExistsError(
            f"{scenes_folder}: {plan.scenes:,} scenes of {drawing.pixels} pixels are asked for (seed {drawing.seed}"
            f"{', plain' if drawing.plain else ''}), and {existing_text} are drawn there; give another --out, "
            "or the plan that they "
            "were drawn by"
        )


def minimal_pairs_of(plan: Plan, eval_data: CaptionedImages) -> dict[str, list[MinimalPair]]:
    """The sets of minimal pairs, by name.

    Args:
        plan: The plan.
        eval_data: The split that is measured.

    Returns:
        The pairs of each set.
    """
    measurements, pairs = plan.measure, {}
    if measurements.composition:
        own_pairs = make_minimal_pairs(eval_data, measurements.composition)
        if own_pairs:
            pairs["this data"] = own_pairs
    if measurements.minimal_pairs:
        pairs[Path(measurements.minimal_pairs).stem] = read_minimal_pairs(
            measurements.minimal_pairs, measurements.minimal_pair_images
        )
    return pairs
