"""Groups of duplicates in an index, as the command line, the service and Python have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clipvisionalign.search.duplicates.quality import ImageFile

#: How images of a group are alike: the same bytes; the same photograph, recompressed, resized or cropped a little; the
#: same scene or subject, by their vectors alone.
DuplicateKind = Literal["bytes", "nearly", "scene"]
KINDS: tuple[DuplicateKind, ...] = ("bytes", "nearly", "scene")


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are alike.

    Attributes:
        kind: How.
        images: Two and more, the one to keep first.
        cosines: Of each image's vector with that of the first.
        reason: Why the first is kept.
    """

    kind: DuplicateKind
    images: Sequence[ImageFile]
    cosines: Sequence[float]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The group as `--json` prints it.

        Returns:
            "kind", "keep" (the number of an image), "reason", and "images", each with "id", "path", "hash", "size",
            "width", "height", "taken" (None if unknown), "cosine", "keep", and "chosen" (to be kept, by a person).
        """
        return {
            "kind": self.kind,
            "keep": self.images[0].id,
            "reason": self.reason,
            "images": [
                {
                    "id": image.id, "path": image.path, "hash": image.hash, "size": image.size, "width": image.width,
                    "height": image.height, "taken": image.taken or None, "cosine": round(cosine, 4),
                    "keep": not position or image.chosen, "chosen": image.chosen,
                }
                for position, (image, cosine) in enumerate(zip(self.images, self.cosines, strict=True))
            ],
        }  # fmt: skip


@dataclass
class DuplicateReport:
    """Groups of an index, and what was compared.

    Attributes:
        groups: By kind, the largest first.
        images: Number of images in the index.
        pairs: Numbers of pairs: "candidates" by vectors; of them "nearly", "mirrored" (one is the other's mirror
            image), "different", "not_verified", and "decided" (no duplicates by a person's decision); "between_groups",
            nearly the same but in two groups, since no group chains through unlike images.
        not_verified: Path and reason of each image that could not be read, or has changed since it was indexed.
        full: Number of images with as many alike as are considered: they may have more.
        decoded: Number of images that were decoded for it.
        seconds: By step.
        threshold: Cosine from which images were compared by their pixels.
    """

    groups: list[DuplicateGroup]
    images: int
    pairs: dict[str, int]
    not_verified: list[tuple[str, str]]
    full: int = 0
    decoded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    threshold: float = 0.0

    def of_kind(self, kind: str) -> list[DuplicateGroup]:
        """The groups of one kind.

        Args:
            kind: "bytes", "nearly" or "scene".

        Returns:
            The groups.
        """
        return [group for group in self.groups if group.kind == kind]

    def not_kept(self) -> list[ImageFile]:
        """Images that need not be kept: those of the kinds "bytes" and "nearly" but the best of each group.

        An image that a person has chosen to keep is never among them.

        Returns:
            Each once, in order of their paths.
        """
        others = {
            image.id: image
            for group in self.groups
            if group.kind != "scene"
            for image in group.images[1:]
            if not image.chosen
        }
        return sorted(others.values(), key=lambda image: image.path)

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it.

        Returns:
            "format", "images", "groups", "pairs", "threshold", "not_verified", "full", "decoded" and "seconds".
        """
        return {
            "format": 1,
            "images": self.images,
            "groups": [group.to_dict() for group in self.groups],
            "pairs": self.pairs,
            "threshold": self.threshold,
            "not_verified": [{"path": path, "reason": reason} for path, reason in self.not_verified],
            "full": self.full,
            "decoded": self.decoded,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
