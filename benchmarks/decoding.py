"""Images a second at 12 megapixels: what `index` decodes beside the loader of rclip, JPEG and HEIC, in turns.

    python benchmarks/decoding.py FOLDER [--photographs 2] [--vectors 40] [--turns 5] [--json]

- Photographs: the first of FOLDER, enlarged to 4,032 x 3,024, with the grain of a sensor. JPEG of quality 90; HEIC of
  quality 60, with an embedded thumbnail of 512 x 384, and the same without one.
- rclip's loader and preprocessing, by the same public libraries: Pillow opens the file (HEIC through pi-heif), RGB, the
  whole image resized by bicubic, the middle cropped, float32, normalised; not turned upright. Ours: upright, at the
  size that is needed, the pixels of the tower, and the index's thumbnail of 256 pixels as a JPEG.
- Cosines: vectors of the embedded image tower, of whole against scaled decoding, over other photographs of FOLDER,
  enlarged to 1,008 x 756; of a JPEG at 2,016 x 1,512. libheif, which writes the thumbnails here, takes single
  pixels for them; one that is filtered first, as cameras do, is compared as a file of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timing import ratio, spread, summary, take_turns

SIZE = (4032, 3024)
#: Pixels on a side that rclip's model takes, and its normalisation.
RIVAL_SIZE = 256
RIVAL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
RIVAL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def rival_pixels(path: Path) -> np.ndarray:
    """The steps of rclip's loader and preprocessing."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = RIVAL_SIZE / min(image.size)
    width, height = (int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - RIVAL_SIZE) // 2, (height - RIVAL_SIZE) // 2
    image = image.crop((left, top, left + RIVAL_SIZE, top + RIVAL_SIZE))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return ((pixels - RIVAL_MEAN) / RIVAL_STD).transpose(2, 0, 1)


def our_pixels(path: Path, transform: Any) -> Any:
    """What `index` decodes of a file: pixels of the tower, and a thumbnail."""
    from clipvisionalign.images import decode_image

    image = decode_image(path, 224, 256).image
    pixels = transform(image)
    image.thumbnail((256, 256))
    image.save(io.BytesIO(), "JPEG", quality=80)
    return pixels


def enlarged(path: Path, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A photograph in more pixels, with grain."""
    image = Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    grain = np.random.default_rng(seed).normal(0, 2, (size[1], size[0], 1)).astype(np.int16)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def jpeg_file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def heic_file(image: Image.Image, thumbnail: int = 512) -> bytes:
    import pillow_heif

    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=60, enc_params={"preset": "ultrafast"}, thumbnails=[thumbnail])
    return out.getvalue()


def speeds(paths: list[Path], turns: int) -> dict[str, Any]:
    """Times of both over the same files, in turns."""
    import pi_heif

    from clipvisionalign.images import ImageTransform
    from clipvisionalign.progress import progress

    pi_heif.register_heif_opener()
    transform = ImageTransform().transform()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = [enlarged(path, SIZE, number) for number, path in enumerate(paths)]
        heics = [heic_file(image) for image in progress(images, "encoding HEIC", len(images))]
        kinds = {
            "JPEG": [jpeg_file(image) for image in images],
            "HEIC, thumbnail": heics,
            # A reference of an unknown kind: the thumbnail is none of this image any more.
            "HEIC, none": [data.replace(b"thmb", b"none", 1) for data in heics],
        }
        for kind, contents in kinds.items():
            files = [Path(folder) / f"{number}{kind}" for number in range(len(contents))]
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            seconds = take_turns({
                "ours": lambda files=files: [our_pixels(path, transform) for path in files],
                "rclip": lambda files=files: [rival_pixels(path) for path in files],
            }, turns)  # fmt: skip
            results[kind] = {
                name: {"images_per_second": round(1000 * len(files) / summary(taken)["median"], 2)}
                for name, taken in seconds.items()
            } | {"ratio": ratio(seconds["rclip"], seconds["ours"])}
    return results


def cosines(paths: list[Path]) -> dict[str, dict[str, float]]:
    """Cosines of the tower's vectors: whole against scaled decoding."""
    import torch

    from clipvisionalign.images import decode_image, open_image
    from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
    from clipvisionalign.progress import progress

    tower = ImageTower(ImageTowerConfig()).eval()
    transform = tower.image_transform.transform()

    def vector(image: Image.Image) -> Any:
        with torch.inference_mode():
            return torch.nn.functional.normalize(tower(transform(image)[None]).pooled.float(), dim=-1)[0]

    results: dict[str, list[float]] = {"JPEG": [], "HEIC, filtered thumbnail": [], "HEIC, thumbnail of libheif": []}
    for number, path in enumerate(progress(paths, "comparing vectors", len(paths))):
        photograph = jpeg_file(enlarged(path, (2016, 1512), number))
        image = enlarged(path, (1008, 756), number)
        data = heic_file(image)
        filtered = heic_file(image.resize((512, 384), Image.Resampling.LANCZOS), 128)
        whole = vector(open_image(data))
        for kind, left, right in (
            ("JPEG", vector(open_image(photograph)), decode_image(photograph, 224, 256).image),
            ("HEIC, filtered thumbnail", whole, open_image(filtered)),
            ("HEIC, thumbnail of libheif", whole, decode_image(data, 224, 256).image),
        ):
            results[kind].append(float(left @ vector(right)))
    return {kind: {"mean": float(np.mean(values)), "least": min(values), "images": len(values)}
            for kind, values in results.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="photographs")
    parser.add_argument("--photographs", type=int, default=2, help="how many are timed")
    parser.add_argument("--vectors", type=int, default=40, help="how many vectors are compared; 0 for none")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from clipvisionalign.images import image_files

    paths = image_files(Path(args.folder))
    results: dict[str, Any] = {"speed": speeds(paths[: args.photographs], args.turns)}
    if args.vectors:
        results["cosine"] = cosines(paths[args.photographs :][: args.vectors])
    if args.json:
        print(json.dumps(results))
        return
    for kind, figures in results["speed"].items():
        each = ", ".join(f"{name} {figures[name]['images_per_second']:.2f}" for name in ("ours", "rclip"))
        print(f"{kind}: images a second: {each}; ratio {spread(figures['ratio'], 2)}")
    for kind, figures in results.get("cosine", {}).items():
        print(f"{kind}: cosine of whole and scaled decoding: mean {figures['mean']:.4f}, "
              f"least {figures['least']:.4f} of {figures['images']} images")  # fmt: skip


if __name__ == "__main__":
    main()
