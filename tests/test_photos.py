"""Whatever phones, cameras and programs write is found, upright and in its colours, or named with what is wrong."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
from odd_images import encoded
from photo_files import (
    CORNERS,
    STORED_BY_ORIENTATION,
    UNSIGNED,
    corners,
    dng,
    heic,
    photo_kinds,
    transcoded_jxl,
    wrong_corners,
)
from PIL import Image

pytest.importorskip("pi_heif", reason="no pi_heif: pip install 'clipvisionalign[photos]'")
pytest.importorskip("pillow_heif", reason="no pillow_heif: pip install 'clipvisionalign[test]'")
pytest.importorskip("pillow_jxl", reason="no pillow_jxl: pip install 'clipvisionalign[photos]'")
pytest.importorskip("rawpy", reason="no rawpy: pip install 'clipvisionalign[photos]'")

from clipvisionalign.images import (
    ExcludedFiles,
    ImageError,
    decode_image,
    image_files,
    is_image_content,
    open_header,
    open_image,
)
from clipvisionalign.images import decoding as decoding_module
from clipvisionalign.images.heif import with_thumbnail_as_primary
from clipvisionalign.images.jxl import read_size

COUNT = 500


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> dict[str, tuple[bytes, tuple[tuple[int, ...], ...]]]:
    """A file of every kind."""
    return photo_kinds(tmp_path_factory.mktemp("encoders"))


def name_of(number: int, ending: str) -> str:
    """Its own ending, none, and one of another format, in turn."""
    signed = ending.rpartition(".")[2] not in UNSIGNED
    shown = (f".{ending}", "", ".jpg", f".{ending}".upper())[number // 80 % 4 if signed else 0]
    return f"{number:03}{shown}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory, kinds) -> tuple[Path, dict[str, tuple[tuple[int, ...], ...]]]:
    """500 files, no two of the same bytes, with the colours of the corners by name."""
    folder = tmp_path_factory.mktemp("photos")
    expected = {}
    for number in range(COUNT):
        ending, (data, colours) = list(kinds.items())[number % len(kinds)]
        name = name_of(number, ending)
        # Two bytes make each another file: behind its end, or of a PCX, whose palette is there, in its unused head.
        own = number.to_bytes(2, "big")
        (folder / name).write_bytes(data[:100] + own + data[102:] if ending == "pcx" else data + own)
        expected[name] = colours
    return folder, expected


def test_every_photograph_is_found_upright_in_its_colours(photos, kinds):
    folder, expected = photos
    excluded = ExcludedFiles()
    listed = image_files(folder, excluded)
    assert {path.name for path in listed} == set(expected)
    assert (len(listed), excluded.total) == (COUNT, 0)
    faults = {}
    for path in listed:
        for size in (0, 40):
            if wrong := wrong_corners(open_image(path, size), expected[path.name]):
                faults[path.name, size] = wrong
    assert not faults
    assert len({ending.rpartition(".")[2] for ending in kinds}) >= 25


def test_a_photograph_that_is_cut_off_is_named(kinds, tmp_path):
    """Half of a file is no image, whatever thumbnail or preview is whole in it."""
    opened, errors = set(), []
    for ending, (data, _) in kinds.items():
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(data[: len(data) // 2])
        assert path in image_files(tmp_path)
        for size in (0, 20):
            try:
                open_image(path, size)
                opened.add(ending)
            except ImageError as error:
                errors.append((path, error))
    # Its pixels are the last thing of it, and Pillow takes those that are missing for black.
    assert opened <= {"gif", "anim.gif"}
    assert all(str(path) in str(error) for path, error in errors)
    assert {error.kind for _, error in errors} <= {"truncated image", "unreadable image"}
    assert not any(error.passing for _, error in errors)


def test_the_size_is_that_of_the_whole_upright_image(kinds):
    for ending, (data, _) in kinds.items():
        full = open_image(data).size
        decoded = decode_image(data, 8)
        if ending.endswith("dng"):
            # The preview stands for what the sensor has in twice the pixels.
            full = (2 * full[0], 2 * full[1])
        assert (decoded.width, decoded.height) == full, ending


# --- HEIC ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phone_heic() -> bytes:
    """Turned, with a thumbnail of a third of its size."""
    return heic(corners((384, 288)), 6, thumbnails=(128,))


@pytest.mark.parametrize("orientation", STORED_BY_ORIENTATION)
def test_a_heic_is_turned_once(orientation):
    """By irot and imir; the orientation in its EXIF is the same one."""
    data = heic(corners((48, 32)), orientation)
    assert not wrong_corners(open_image(data))
    assert open_image(data).size == (48, 32)


def test_the_thumbnail_of_a_heic_is_taken_where_it_is_large_enough(phone_heic):
    """96 pixels on the shorter side are one and a half times 64."""
    small = decode_image(phone_heic, 64, 128)
    assert (small.image.size, small.width, small.height) == ((128, 96), 384, 288)
    assert not wrong_corners(small.image)
    for size, longer, embedded in ((65, 0, True), (0, 0, True), (64, 129, True), (64, 0, False)):
        whole = decode_image(phone_heic, size, longer, embedded)
        assert whole.image.size == (384, 288), (size, longer, embedded)
        assert not wrong_corners(whole.image)


def test_a_thumbnail_that_differs_from_the_image_is_not_taken(phone_heic):
    """One that is turned otherwise, one of another shape, one of an image that is cut off."""
    assert with_thumbnail_as_primary(phone_heic, 90, 100)
    assert not with_thumbnail_as_primary(phone_heic[:-1], 90, 100)
    # The image's own entry of the associations comes first: its last property turns it, its first does not.
    entry = phone_heic.index(b"ipma") + 4 + 4 + 4 + 2
    otherwise_turned = bytearray(phone_heic)
    otherwise_turned[entry + phone_heic[entry]] = phone_heic[entry + 1]
    assert not with_thumbnail_as_primary(bytes(otherwise_turned), 90, 100)
    size = phone_heic.index(b"ispe") + 8
    other_shape = phone_heic[:size] + struct.pack(">II", 288, 288) + phone_heic[size + 8 :]
    assert not with_thumbnail_as_primary(other_shape, 90, 100)


def test_no_damage_to_a_heic_raises_anything_else(phone_heic):
    for at in range(0, phone_heic.index(b"mdat"), 3):
        damaged = bytearray(phone_heic)
        damaged[at] ^= 0xFF
        with_thumbnail_as_primary(bytes(damaged), 90, 100)


# --- JPEG XL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (256, 8), (257, 9), (300, 200), (400, 300), (1600, 9), (520, 520)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_without_its_decoder(size, container):
    data = encoded(Image.new("RGB", size), "JXL", use_container=container, effort=1)
    assert read_size(io.BytesIO(data)) == size
    assert is_image_content(data[:4096])


def test_the_size_of_a_jpeg_that_jpeg_xl_holds_is_read(tmp_path):
    assert read_size(io.BytesIO(transcoded_jxl(corners((48, 32)), 6, tmp_path))) == (32, 48)


def test_an_enormous_jpeg_xl_is_not_decoded(monkeypatch):
    """Its decoder would decode every pixel to open it."""
    monkeypatch.setattr(decoding_module, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("decoded"))
    data = encoded(Image.new("RGB", (40, 26)), "JXL")
    with pytest.raises(ImageError, match="40 x 26 pixels are more than the 1,000"):
        open_header(data)


# --- raw files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", STORED_BY_ORIENTATION)
@pytest.mark.parametrize("preview", [(120, 80), (12, 8)])
def test_a_raw_file_is_upright_by_its_preview_or_without_a_large_one(orientation, preview):
    """120 pixels of the preview, 96 of half of the sensor's 192."""
    decoded = decode_image(dng(corners(), orientation, preview), 60)
    assert decoded.image.size == ((120, 80) if preview[0] == 120 else (96, 64))
    assert (decoded.width, decoded.height) == (192, 128)
    # Without the camera's own tables LibRaw's colours are near those of the scene.
    assert not wrong_corners(decoded.image, tolerance=48 if preview[0] == 120 else 130)


def test_a_raw_file_is_one_by_its_content():
    with open_header(dng(corners())) as opened:
        assert opened.format == "RAW"
        assert opened.getexif()[271] == "Test"
    with open_header(encoded(corners(), "TIFF")) as opened:
        assert opened.format == "TIFF"


# --- without a decoder -----------------------------------------------------------------------------------------------

MISSING = {"1.heic": "HEIC", "jxl": "JPEG XL", "1.dng": "camera raw", "1.avif": "AVIF"}


@pytest.fixture
def no_decoders(monkeypatch) -> None:
    monkeypatch.setattr(decoding_module, "is_decodable", lambda name: False)


def test_a_missing_decoder_is_named_with_the_line_that_installs_it(no_decoders, kinds, tmp_path):
    for ending, name in MISSING.items():
        path = tmp_path / f"photo.{ending}.jpg"
        path.write_bytes(kinds[ending][0])
        with pytest.raises(
            ImageError, match=r'photo.*: an? .* image, which needs pip install "clipvisionalign\[photos\]"'
        ) as error:
            open_header(path)
        assert (error.value.missing_decoder, error.value.passing) == (name, True)
        assert path in image_files(tmp_path)
    assert not ImageError("unreadable image", "x").missing_decoder


def test_an_index_counts_what_it_cannot_decode_by_format(monkeypatch, kinds, tmp_path, tiny_model, capsys):
    """All files add up; what is installed later is decoded by the next update."""
    pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
    from clipvisionalign.cli import main
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.search.tables import open_image_table

    Aligner(tiny_model()).save(tmp_path / "run")
    source = tmp_path / "source"
    source.mkdir()
    chosen = [*MISSING, "6.heic", "6.jpg", "png", "6.transcoded.jxl"]
    for ending in chosen:
        (source / f"whole.{ending}").write_bytes(kinds[ending][0])
        (source / f"cut.{ending}").write_bytes(kinds[ending][0][:60])
    (source / "drawing.svg").write_text("<svg/>")
    monkeypatch.setattr(decoding_module, "is_decodable", lambda name: False)
    command = ["index", str(tmp_path / "run"), str(source), "--out", str(tmp_path / "index")]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # A raw file that is cut within its head is no raw file any more.
    assert report["missing_decoders"] == {"HEIC": 4, "JPEG XL": 4, "AVIF": 2, "camera raw": 1}
    assert (report["files"], report["encoded"], report["broken"]) == (17, 2, 14)
    assert report["not_taken"] == {"of a kind that is not decoded": {".svg": 1}}
    assert main(command) == 0
    assert "4 HEIC files not decoded" in (message := capsys.readouterr().out)
    assert 'pip install "clipvisionalign[photos]"' in message
    monkeypatch.undo()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["there"], report["broken"], report["missing_decoders"]) == (8, 8, {})
    rows = open_image_table(tmp_path / "index").search().limit(100).to_arrow().to_pylist()
    sizes = {row["path"]: (row["width"], row["height"]) for row in rows}
    assert sizes == {f"whole.{ending}": (192, 128) if "dng" in ending else (96, 64) for ending in chosen}
    assert all(not wrong_corners(Image.open(io.BytesIO(row["thumbnail"])), CORNERS, 80) for row in rows)


def test_check_counts_missing_decoders_by_format(no_decoders, kinds, tmp_path, capsys):
    from clipvisionalign.cli import main

    for number, ending in enumerate([*MISSING, "png"] * 2):
        path = tmp_path / f"{number}.{ending.rpartition('.')[2]}"
        path.write_bytes(kinds[ending][0] + bytes([number]))
        path.with_suffix(".txt").write_text(f"caption {number}\n")
    main(["check", str(tmp_path)])
    message = capsys.readouterr().out
    for name in MISSING.values():
        assert f"{name} decoder not installed" in message
    assert 'pip install "clipvisionalign[photos]"' in message
