"""Data sets of `datasets`: their columns, and folders that `save_to_disk` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import SPLITS, DataError
from clipvisionalign.data.columns import IDENTITY_COLUMNS, SPLIT_COLUMNS, caption_columns, find_column
from clipvisionalign.data.splits import canonical_split
from clipvisionalign.data.streams.samples import Sample, SampleMetadata, invalid_sample


@dataclass(frozen=True)
class SampleColumns:
    """Where a data set of `datasets` has its images and captions.

    Attributes:
        image: Column of images.
        captions: Columns each of which holds captions.
        identity: Column of identities; "" for none.
        split: Column of splits; "" for none.
        source: The data set, for messages, and to find images that are named.
        unused: Columns that nothing is read from.
    """

    image: str
    captions: tuple[str, ...]
    identity: str
    split: str
    source: str
    unused: tuple[str, ...] = ()

    @classmethod
    def detect(cls, features: Any, source: str) -> SampleColumns:
        """Detect columns by their type and name.

        Args:
            features: The data set's features.
            source: The data set, for messages.

        Returns:
            The columns.

        Raises:
            DataError: There is no column of images, or none of captions.
        """
        import datasets

        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        named = [name for name in ("image", "img", "picture") if name in features]
        image = next(iter([*images, *named]), "")
        captions = caption_columns(features)
        if not image or not captions:
            raise DataError(f"{source}: no column of images and captions in {list(features)}")
        identity, split = (find_column(features, names) or "" for names in (IDENTITY_COLUMNS, SPLIT_COLUMNS))
        used = {image, *captions, identity, split}
        return cls(image, captions, identity, split, source, tuple(name for name in features if name not in used))

    @property
    def names(self) -> list[str]:
        """The columns that something is read from."""
        return [name for name in (self.image, *self.captions, self.identity, self.split) if name]

    def notes(self, location: str) -> list[str]:
        """The note on columns that are not read.

        Args:
            location: What has these columns.

        Returns:
            One note, or none.
        """
        return [f"{location}: columns that are not read: {', '.join(self.unused)}"] if self.unused else []

    def without_decoding(self, rows: Any) -> Any:
        """The same rows with images as they are encoded.

        Args:
            rows: A data set of `datasets`.

        Returns:
            A data set whose images are not decoded when a row is read.
        """
        import datasets

        features = rows.features or {}
        return rows.cast_column(self.image, datasets.Image(decode=False)) if features else rows

    def to_sample(self, row: dict[str, Any], name: str) -> Sample:
        """One row as a sample.

        Args:
            row: The cells by column.
            name: Name of the sample, for messages.

        Returns:
            The sample; an invalid one with the reason where image or captions are missing.
        """
        metadata = SampleMetadata(name)
        cells = [row[name] for name in self.captions if row[name] not in (None, "")]
        metadata.add_captions(cells[0] if len(cells) == 1 else cells)
        metadata.read_attributes(row)
        image = row[self.image]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        try:
            if isinstance(image, str) and image:
                # Beside the file that names it, unless it has a path.
                base = Path(self.source)
                image = ((base if base.is_dir() else base.parent) / image).read_bytes()
        except (ValueError, OSError) as error:
            return invalid_sample(name, str(error))
        return metadata.to_sample(image if isinstance(image, bytes) else None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder: of a data set, or of its splits.

    Args:
        folder: The folder.

    Returns:
        Whether it did, by its files.
    """
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def load_saved_dataset(folder: Path) -> dict[str, Any]:
    """The splits of a folder that `datasets.save_to_disk` wrote.

    Several whose names mean one split are concatenated in their order.

    Args:
        folder: The folder.

    Returns:
        Data sets of `datasets` by "train", "dev", "test", or by their own names.

    Raises:
        DataError: The folder is not whole, or such splits have different columns.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a whole folder of save_to_disk: {error}") from None
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {_saved_split_name(loaded): loaded}
    if len(splits) == 1:
        splits = _split_by_rows(*next(iter(splits.items())))
    named: dict[str, list[str]] = {}
    for name in splits:
        named.setdefault(canonical_split(name), []).append(name)
    by_split = {}
    for split, names in named.items():
        try:
            rows = [splits[name] for name in names]
            by_split[split] = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
        except (ValueError, TypeError) as error:
            message = (
                f"{folder}: {' and '.join(names)} are all of '{split}', and their columns do not go together: {error}"
            )
            raise DataError(message) from None
    return by_split


def _saved_split_name(rows: Any) -> str:
    """The split that a data set was taken from, such as "test" of "test[:50%]"; "train" where it has none."""
    return str(rows.split or "train").partition("[")[0]


def _split_by_rows(name: str, rows: Any) -> dict[str, Any]:
    """The splits of a data set that was saved as one: those of its rows, where there are several; a row that
    has none is of `name`. Such a data set is called after the one file that it was made from, often "test"."""
    column = find_column(rows.features, SPLIT_COLUMNS)
    indices: dict[str, list[int]] = {}
    for index, value in enumerate(rows[column] if column else ()):
        row_split = canonical_split(value) if isinstance(value, str) else ""
        indices.setdefault(row_split if row_split in SPLITS else name, []).append(index)
    if len(indices) < 2:
        return {name: rows}
    return {split: rows.select(row_indices) for split, row_indices in indices.items()}
