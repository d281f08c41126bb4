"""Writing a data set as WebDataset shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.streams.files import SHARD_INDEX_FILE
from clipvisionalign.files import atomic_write


def write_shards(
    data: CaptionedImages, out: str | Path, per_shard: int = 1000, show_progress: bool = False
) -> dict[str, list[Path]]:
    """Write a data set as WebDataset shards, OUT/SPLIT-000000.tar and so on, with their index shards.json.

    Training images are shuffled, always in the same way.

    Args:
        data: The data set.
        out: The folder, which is made if it is not there.
        per_shard: Samples in a shard.
        show_progress: Whether a live line is shown on standard error.

    Returns:
        The files by split.

    Raises:
        ValueError: `per_shard` is below 1.
        FileExistsError: The folder holds shards already.
        DataError: The data set has no image.
        OSError: An image cannot be read, or a shard cannot be written.
    """
    import webdataset

    from clipvisionalign.progress import progress

    folder = Path(out)
    if per_shard < 1:
        raise ValueError(f"--per-shard should be at least 1, not {per_shard}")
    if list(folder.glob("*.tar")):
        raise FileExistsError(f"{folder}: holds shards already; give another folder")
    if not len(data):
        raise DataError(f"{data.source}: no image is left to be written")
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    written: dict[str, list[Path]] = {}
    for split, count in sorted(data.split_sizes().items()):
        rows = data.split(split).rows
        if split == "train":
            # Shards are dealt out whole: neighbours in a file should not be neighbours in the data.
            rows = [rows[i] for i in np.random.default_rng(0).permutation(count)]
        starts = range(0, count, per_shard)
        for number, start in enumerate(progress(starts, f"writing shards: {split}", count, show_progress, per_shard)):
            path = folder / f"{split}-{number:06d}.tar"
            shard_rows = rows[start : start + per_shard]
            with webdataset.TarWriter(str(path), encoder=False) as tar:
                for index, row in enumerate(shard_rows, start):
                    image = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
                    record = {"captions": list(row.captions), "name": row.name, "identity": row.identity}
                    kind = "png" if image.startswith(b"\x89PNG") else "jpg"
                    tar.write({"__key__": f"{index:09d}", kind: image, "json": json.dumps(record).encode()})
            sizes[path.name] = len(shard_rows)
            written.setdefault(split, []).append(path)
    with atomic_write(folder / SHARD_INDEX_FILE) as aside:
        aside.write_text(json.dumps(sizes, indent=1) + "\n")
    return written
