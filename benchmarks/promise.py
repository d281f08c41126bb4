"""Do promises hold? Conformal cut-offs on photographs, drawn scenes and emoji, beside the best fixed cut-offs.

    python benchmarks/promise.py RUN --flickr8k FLICKR8K [--split dev] [--splits 20] [--json]

RUN was trained on Flickr8k's train split. Three collections of captioned images are encoded by it: Flickr8k's dev
split, drawn scenes, and emoji as Debian's fonts-noto-color-emoji draws them, with their names in Unicode as captions
(left out where the font is not installed). Each is split into a half to calibrate on and a half that is searched, so
many times.

Told of each: what cut-offs of its own keep at 80, 90 and 95 %, and the mean number of images in the answer; the same of
cosines standardised by each query's mean and standard deviation over the calibration's images, and of a fixed number of
hits, chosen on the searched half itself so that it keeps as much as the promise does (the cut-off is a fixed cosine);
what the cut-offs of Flickr8k keep of the other collections. Then of 200 queries of the searched half whose image is
taken out, and of queries that have nothing to do with the collection, how many have an empty answer or are taken to fit
nothing better than chance, and how many queries whose image is there share that fate.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.calibrate import calibrate_captions
from clipvisionalign.search.calibration import LEVELS, conformal_threshold
from clipvisionalign.search.null_queries import WORD_SHARE, chance_level, null_texts, short_null_texts

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI, REMOVED = 600, 200
#: Queries that no photograph of Flickr8k's kind fits.
FOREIGN = (
    "asdf qwer zxcv", "lorem ipsum dolor sit amet", "quarterly revenue spreadsheet", "a microscope image of bacteria",
    "chest x-ray of a patient", "python source code with syntax highlighting",
    "an aerial view of a nuclear power plant",
    "the periodic table of elements", "invoice number 4711", "a screenshot of a phone menu",
    "satellite image of a hurricane", "diagram of a transistor circuit", "the surface of the moon",
    "a cathedral interior with stained glass", "terms and conditions apply", "chemical structure of caffeine",
    "a map of germany", "medieval manuscript page", "a chart of share prices", "a penguin colony in antarctica",
    "an astronaut in space", "sheet music for violin", "a barcode", "the coastline of norway from orbit",
)  # fmt: skip
#: Words for what no photograph of Flickr8k's kind shows, and words that name nothing.
FOREIGN_WORDS = (
    "spreadsheet", "barcode", "invoice", "telescope", "microscope", "volcano", "penguin", "submarine", "piano",
    "calendar", "violin", "microwave", "satellite", "hologram", "bacteria", "manuscript", "transistor", "astronaut",
    "caffeine", "hurricane",
)  # fmt: skip
STOP_WORDS = frozenset((  # noqa: SIM905
    "and are another around for from front his her its into near next off one other out over that the their there they "
    "this three through two while who with"
).split())  # fmt: skip


class Collection:
    """Captioned images as vectors.

    Args:
        images: (N, D) unit length.
        captions: (M, D) unit length.
        owners: (M,) the number of each caption's image.
    """

    def __init__(self, images: np.ndarray, captions: np.ndarray, owners: np.ndarray) -> None:
        self.owners, self.images, self.captions = owners, images, captions
        self.cosines = captions @ images.T
        self.own = self.cosines[np.arange(len(captions)), owners]

    def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the images to calibrate on, and of those that are searched."""
        order = rng.permutation(len(self.images))
        return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def encode(aligner: Any, data: CaptionedImages) -> Collection:
    """A data set by a model."""
    images = aligner.encode_images(data.images).numpy()
    return Collection(images, aligner.encode_captions(data.captions).numpy(), data.caption_image)


def read_emoji(folder: Path) -> CaptionedImages:
    """Emoji with their names, drawn on white."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(EMOJI_FONT), 109)
    rows = []
    for code in [*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F6D3), *range(0x1F900, 0x1FA00)]:
        name = unicodedata.name(chr(code), "").lower()
        image = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(image).text((12, 20), chr(code), font=font, embedded_color=True)
        if not name or image.getcolors(1) or "fitzpatrick" in name or len(rows) == EMOJI:
            continue
        image.save(folder / f"{code:x}.png")
        rows.append(CaptionedImage(f"{code:x}.png", folder / f"{code:x}.png", (name,), "test"))
    return CaptionedImages(rows)


def measure(collection: Collection, splits: int, other: Collection | None = None) -> list[dict[str, Any]]:
    """What is kept at each level, and the length of answers.

    Args:
        collection: What is searched, a half at a time.
        splits: Number of random halves.
        other: What is calibrated on; None for the other half.
    """
    rows: dict[float, list[dict[str, float]]] = {level: [] for level in LEVELS}
    for seed in range(splits):
        first, second = collection.halves(np.random.default_rng(seed))
        searched = np.isin(collection.owners, second)
        gallery, own = collection.cosines[np.ix_(searched, second)], collection.own[searched]
        rank = (gallery > own[:, None]).sum(axis=1) + 1
        source, chosen = (collection, first) if other is None else (other, np.arange(len(other.images)))
        calibrated = np.isin(source.owners, chosen)
        units = source.owners[calibrated]
        center, spread = _location(source, chosen, calibrated)
        own_center, own_spread = _location_of(collection.captions[searched] @ source.images[chosen].T)
        for level in LEVELS:
            cut = conformal_threshold(source.own[calibrated], units, level)
            standardised_cut = conformal_threshold((source.own[calibrated] - center) / spread, units, level)
            kept = float((own >= cut).mean())
            lengths = (gallery >= cut).sum(axis=1)
            fixed_rank = float(np.sort(rank)[max(0, int(np.ceil(kept * len(rank))) - 1)])
            rows[level].append({
                "kept": kept, "length": float(lengths.mean()), "empty": float((lengths == 0).mean()),
                "fixed_number": min(fixed_rank, len(second)),
                "standardised_kept": float(((own - own_center) / own_spread >= standardised_cut).mean()),
                "standardised_length": float(
                    (gallery >= (own_center + standardised_cut * own_spread)[:, None]).sum(axis=1).mean()
                ),
            })  # fmt: skip
    return [
        {"level": level, "searched": len(second)} | {name: float(np.mean([each[name] for each in rows[level]]))
                                                    for name in rows[level][0]}
        | {"kept_std": float(np.std([each["kept"] for each in rows[level]]))}
        for level in LEVELS
    ]  # fmt: skip


def _location(source: Collection, chosen: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of captions' cosines with images other than their own."""
    cosines, own = source.cosines[np.ix_(captions, chosen)], source.own[captions]
    others = cosines.shape[1] - 1
    mean = (cosines.sum(axis=1) - own) / others
    variance = (((cosines - mean[:, None]) ** 2).sum(axis=1) - (own - mean) ** 2) / others
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _location_of(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cosines.mean(axis=1), cosines.std(axis=1)


def measure_nothing(
    collection: Collection, splits: int, encode_texts: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, Any]:
    """How many queries are answered with nothing: their image gone, foreign to the collection, or their image there."""
    foreign, null = encode_texts(FOREIGN), encode_texts(null_texts())
    curve: dict[str, list[list[float]]] = {}
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        first, second = collection.halves(rng)
        chosen, searched = np.isin(collection.owners, first), np.flatnonzero(np.isin(collection.owners, second))
        owners = np.searchsorted(first, collection.owners[chosen])
        calibration = calibrate_captions(collection.images[first], collection.captions[chosen], owners)
        queries = rng.choice(searched, min(REMOVED, len(searched)), replace=False)
        gallery = collection.cosines[np.ix_(queries, second)]
        best = gallery.max(axis=1)
        gallery = gallery.copy()
        gallery[np.arange(len(queries)), np.searchsorted(second, collection.owners[queries])] = -np.inf
        foreign_best = (foreign @ collection.images[second].T).max(axis=1)
        cuts = {f"empty at {100 * level:g} %": calibration.threshold(level) for level in (0.5, 0.6, 0.7, *LEVELS)}
        cuts["worse than 99 % of captions"] = calibration.chance_level(len(second))
        cuts["no better than meaningless words"] = chance_level(
            (null @ collection.images[second].T).max(axis=1).tolist()
        )
        for name, cut in cuts.items():
            counts = [float((each < cut).mean()) for each in (gallery.max(axis=1), foreign_best, best)]
            curve.setdefault(name, []).append(counts)
    return {
        name: dict(zip(("image_gone", "foreign", "image_there"), np.mean(values, axis=0).tolist(), strict=True))
        for name, values in curve.items()
    }


def measure_words(
    collection: Collection, captions: Sequence[str], encode_texts: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, Any]:
    """How many single words are said to fit nothing: of captions of the collection, and foreign ones.

    Of the collection is a word that most captions of at least two images have.
    """
    uses: Counter[tuple[str, int]] = Counter()
    for caption, owner in zip(captions, collection.owners.tolist(), strict=True):
        uses.update({(word, owner) for word in re.findall(r"[a-z]{3,}", caption.lower())})
    sizes = np.bincount(collection.owners)
    images = Counter(word for (word, owner), count in uses.items() if 2 * count > sizes[owner])
    words = [word for word, count in sorted(images.items()) if count > 1 and word not in STOP_WORDS]
    groups = {
        "present": words, "foreign": FOREIGN_WORDS, "mixed": null_texts(), "word": short_null_texts(1),
    }  # fmt: skip
    best = {name: (encode_texts(texts) @ collection.images.T).max(axis=1) for name, texts in groups.items()}
    levels = {
        "texts of one to six": chance_level(best["mixed"].tolist()),
        "single ones, nine of ten": chance_level(best["word"].tolist()),
        "single ones, three of four": chance_level(best["word"].tolist(), WORD_SHARE),
    }
    rows = {
        name: {group: float((best[group] <= level).mean()) for group in ("present", "foreign")}
        for name, level in levels.items()
    }
    return {"present": len(words), "foreign": len(FOREIGN_WORDS), "images": len(collection.images), "rows": rows}


def print_results(results: dict[str, Any]) -> None:
    """The tables, as docs/results.md has them."""
    for name, rows in results["kept"].items():
        print(f"\n{name}: {rows[0]['searched']:,} images searched")
        print("level   kept (sd)      images   standardised: kept, images   fixed number   empty")
        for row in rows:
            kept, spread, standardised = (100 * row[key] for key in ("kept", "kept_std", "standardised_kept"))
            cells = f"{kept:5.1f} ({spread:.1f}) {row['length']:10.1f} {standardised:14.1f}"
            cells += f" {row['standardised_length']:13.1f} {row['fixed_number']:14.1f} {100 * row['empty']:6.1f} %"
            print(f"{100 * row['level']:3.0f} %  {cells}")
    print("\nanswered with nothing, %                image gone   foreign   image there")
    for name, row in results["nothing"].items():
        cells = " ".join(f"{100 * row[key]:11.1f}" for key in ("image_gone", "foreign", "image_there"))
        print(f"{name:36s} {cells}")
    print_words(results["words"])


def print_words(result: dict[str, Any]) -> None:
    """How many single words are said to fit nothing."""
    present, foreign, images = (result[name] for name in ("present", "foreign", "images"))
    print(f"\nof {present} words of captions and {foreign} foreign ones, {images:,} images")
    print("said to fit nothing, no better than      present   foreign")
    for name, row in result["rows"].items():
        print(f"{name:36s} {100 * row['present']:10.1f} % {100 * row['foreign']:8.1f} %")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--flickr8k", required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    aligner = load_aligner(args.run)
    aligner.show_progress = True
    data = read_captioned_images(args.flickr8k).split(args.split)
    photographs = encode(aligner, data)
    collections = {"Flickr8k": photographs}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train": 2, "dev": 2, "test": args.scenes}
        scenes = write_scenes(Path(folder) / "scenes", sum(sizes.values()), seed=5, splits=sizes)
        collections["drawn scenes"] = encode(aligner, read_captioned_images(scenes).split("test"))
        if EMOJI_FONT.is_file():
            collections["emoji"] = encode(aligner, read_emoji(Path(folder)))
    results: dict[str, Any] = {"kept": {}}
    for name, collection in collections.items():
        results["kept"][f"{name}, calibrated on its other half"] = measure(collection, args.splits)
        if name != "Flickr8k":
            results["kept"][f"{name}, by the calibration of Flickr8k"] = measure(collection, args.splits, photographs)

    def encode_texts(texts: Sequence[str]) -> np.ndarray:
        return aligner.encode_captions(list(texts)).numpy()

    results["nothing"] = measure_nothing(photographs, args.splits, encode_texts)
    results["words"] = measure_words(photographs, data.captions, encode_texts)
    print(json.dumps(results, indent=2)) if args.json else print_results(results)


if __name__ == "__main__":
    main()
