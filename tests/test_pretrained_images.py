"""Image files as a pretrained dual encoder takes them: as its own library does with the upright RGB image."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pretrained_models import FAMILIES, make_pretrained
from test_pretrained import Library

from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.embed import embed_files
from clipvisionalign.search.storage import ImageFile, Storage


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Gradients, edges, and noise that is finer than a model's pixels."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.stack([127 + 60 * np.sin(x / (width / k) + y / (height / (k + 1))) for k in (9, 14, 23)], axis=-1)
    pixels += np.kron(generator.normal(0, 30, (height // 4 + 1, width // 4 + 1, 3)), np.ones((4, 4, 1)))[
        :height, :width
    ]
    for _ in range(12):
        top, left = generator.integers(0, height - height // 4), generator.integers(0, width - width // 4)
        pixels[top : top + height // 6, left : left + width // 8] = generator.integers(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, tuple[bytes, Image.Image]]:
    """Files, and the upright RGB image that each stands for, by Pillow's own conversions."""
    large, small = photograph(3000, 2000), photograph(300, 220, seed=1)
    jpeg, cmyk = saved(large, "JPEG", quality=90), saved(small.convert("CMYK"), "JPEG", quality=95)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    upright = Image.open(io.BytesIO(saved(small, "JPEG"))).transpose(Image.Transpose.ROTATE_270)
    transparent = small.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 300).astype(np.uint8), (220, 1))))
    on_white = Image.alpha_composite(Image.new("RGBA", small.size, "white"), transparent).convert("RGB")
    grey = np.asarray(small.convert("L"))
    # 257 times a byte is the same share of 16 bits.
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    return {
        "a large JPEG": (jpeg, Image.open(io.BytesIO(jpeg)).convert("RGB")),
        "CMYK": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "EXIF": (saved(small, "JPEG", exif=rotated), upright.convert("RGB")),
        "alpha": (saved(transparent, "PNG"), on_white),
        "16 bits": (saved(deep, "PNG"), Image.fromarray(grey).convert("RGB")),
    }


@pytest.fixture(scope="module")
def image_files():
    """The files, made once."""
    return files()


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_each_kind_as_the_library_prepares_them(family, image_files, tmp_path):
    folder = make_pretrained(family, tmp_path / family)
    aligner, library = load_aligner(folder), Library(folder, family)
    vectors = aligner.encode_images([content for content, _ in image_files.values()])
    expected = library.images([image for _, image in image_files.values()])
    transform = aligner.image_tower.image_transform
    content, image = image_files["a large JPEG"]
    # It is decoded at its full size: its pixels are not nearly the same, but the same.
    assert torch.equal(transform.image_loader()(content), transform.transform()(image))
    cosines = dict(zip(image_files, (vectors * expected).sum(dim=1).tolist(), strict=True))
    assert min(cosines.values()) >= 0.9999, cosines


def test_an_index_decodes_as_the_model_does(image_files, tmp_path):
    """A large JPEG is not decoded at the size of a thumbnail."""
    content, _ = image_files["a large JPEG"]
    aligner = load_aligner(make_pretrained("clip", tmp_path / "clip"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(content)
    storage = Storage(str(tmp_path / "images"))
    (rows,) = embed_files(aligner, storage, [(ImageFile(b"a.jpg", len(content), 0), "")])
    np.testing.assert_allclose(rows[0]["vector"], aligner.encode_images([content])[0].numpy(), atol=1e-6)
