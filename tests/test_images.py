"""Every image is opened right, or is one `ImageError`: of any format, damage, EXIF, transparency and depth."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed, settings
from nobody import as_nobody
from odd_images import (
    HEIC,
    ODD_TAGS,
    ORIENTATION,
    check_exif,
    damaged,
    damaged_files,
    encoded,
    exif_block,
    exif_blocks,
    intact_files,
    noise,
    png,
    tiff_of,
    tiff_of_greys,
    tiff_with,
    turned,
    with_exif,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipvisionalign.images import (
    HIDDEN,
    NON_IMAGE_CONTENT,
    NON_IMAGE_SUFFIX,
    SYSTEM_FILE,
    UNDECODED_SUFFIX,
    ExcludedFiles,
    ImageError,
    exclusion_reason,
    image_files,
    is_image_content,
    open_header,
    open_image,
)

UPRIGHT = Image.new("RGB", (24, 16), (0, 0, 255))
UPRIGHT.paste((255, 0, 0), (0, 0, 12, 8))

#: What a camera that is held so stores of an upright image.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: UPRIGHT.transpose(Image.Transpose.ROTATE_180),
    4: UPRIGHT.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: UPRIGHT.transpose(Image.Transpose.TRANSPOSE),
    6: UPRIGHT.transpose(Image.Transpose.ROTATE_90), 7: UPRIGHT.transpose(Image.Transpose.TRANSVERSE),
    8: UPRIGHT.transpose(Image.Transpose.ROTATE_270),
}  # fmt: skip


def is_upright(opened: Image.Image) -> bool:
    """Red in the upper left corner alone."""
    reds = {position: opened.getpixel(position)[0] > 150 for position in ((3, 3), (20, 3), (3, 13), (20, 13))}
    return opened.size == (24, 16) and [position for position, red in reds.items() if red] == [(3, 3)]


# --- EXIF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD_TAGS)
def test_an_image_with_an_odd_tag_stands_upright(odd):
    for orientation, stored in STORED.items():
        entries = [turned(orientation), ODD_TAGS[odd]]
        for kind in ("JPEG", "PNG", "WEBP"):
            for block in (exif_block(entries), exif_block(entries[::-1])):
                assert is_upright(open_image(with_exif(stored, kind, block))), (kind, orientation)
        assert is_upright(open_image(tiff_with(stored, entries))), orientation


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [(1, 1, b"\6\0\0\0"), (2, 2, b"6\0\0\0"), (3, 2, b"\6\0\6\0"), (4, 1, b"\6\0\0\0"), (7, 1, b"\6\0\0\0"), (8, 1, b"\6\0\0\0"),
     (11, 1, struct.pack("<f", 6.0))],
)  # fmt: skip
def test_an_orientation_of_another_type_is_read(kind, count, value):
    block = exif_block([(ORIENTATION, kind, count, value)])
    assert is_upright(open_image(with_exif(STORED[6], "JPEG", block)))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(value):
    assert is_upright(open_image(with_exif(UPRIGHT, "JPEG", exif_block([turned(value)]))))


def test_orientations_of_tiff_xmp_avif_and_of_what_pillow_opened():
    def exif() -> Image.Exif:
        tags = Image.Exif()
        tags[ORIENTATION] = 6
        return tags

    for kind in ("TIFF", "AVIF"):
        assert is_upright(open_image(encoded(STORED[6], kind, exif=exif())))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    forms = (xmp, xmp.replace(b'"6"', b"'6'"), xmp.replace(b'="6"', b' = "6"'), xmp.replace(
        b' tiff:Orientation="6"/', b"><tiff:Orientation> 6</tiff:Orientation></rdf:Description"))  # fmt: skip
    for form in forms:
        for kind in ("JPEG", "WEBP", "AVIF"):
            assert is_upright(open_image(encoded(STORED[6], kind, xmp=form)))
        pnginfo = PngInfo()
        pnginfo.add_itxt("XML:com.adobe.xmp", form.decode(), zip=form == xmp)
        assert is_upright(open_image(encoded(STORED[6], "PNG", pnginfo=pnginfo)))
    for data in (encoded(STORED[6], "JPEG", xmp=xmp), encoded(STORED[6], "TIFF", exif=exif())):
        # What is turned is not turned again.
        assert is_upright(open_image(open_image(Image.open(io.BytesIO(data)))))


@seed(16)
@settings(max_examples=150, deadline=None, database=None)
@given(exif_blocks())
def test_no_exif_block_costs_an_image(block):
    check_exif(block)


# --- damages ---------------------------------------------------------------------------------------------------------


def test_whatever_a_decoder_raises_is_an_image_error():
    """600 files in two dozen formats; those that nothing happened to are opened."""
    refused = {}
    for name, data in damaged_files(600, seed=16).items():
        try:
            assert open_image(data, 64).mode == "RGB"
        except ImageError as error:
            refused[name] = str(error)
    assert not [f"{name}: {why}" for name, why in refused.items() if "whole" in name or not why]
    assert len(refused) > 100


def test_damages_that_decoders_have_no_words_for():
    """A DDS of no pixel format is a NotImplementedError of Pillow's, an AVIF of scrambled pixels a RuntimeError."""
    files = intact_files()
    dds = files["dds"][:76] + bytes(32) + files["dds"][108:]
    with pytest.raises(ImageError, match="damaged: the decoder ends in NotImplementedError"):
        open_image(dds)
    reasons = []
    for number in range(300):
        scrambled = damaged(files["avif"], "shifted", random.Random(number))
        try:
            open_image(scrambled)
        except ImageError as error:
            reasons.append(str(error))
    assert any("damaged: the decoder ends in RuntimeError" in reason for reason in reasons)


@pytest.mark.parametrize(
    "raised",
    [struct.error("unpack requires 4 bytes"), IndexError("list index out of range"), ZeroDivisionError(), OverflowError(),
     AttributeError("'NoneType' object"), RuntimeError("codec"), EOFError(), AssertionError(), TypeError("int"), KeyError(7),
     RecursionError(), SyntaxError("not a TIFF file"), Image.DecompressionBombError("large"), OSError("truncated")],
)  # fmt: skip
def test_every_exception_becomes_one_that_names_the_file(monkeypatch, tmp_path, raised):
    path = tmp_path / "some name.png"
    noise().save(path)

    def load(self):
        raise raised

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match=r"some name\.png: .*[a-z]") as error:
        open_image(path)
    assert not error.value.passing
    raised = MemoryError()
    with pytest.raises(ImageError, match=r"some name\.png: .*more memory") as error:
        open_image(path)
    # Less of it may be in use another time.
    assert error.value.passing


def test_what_may_pass_is_told_from_what_does_not(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)

    def read(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("clipvisionalign.images.decoding.first_bytes", read)
    with pytest.raises(ImageError, match="Input/output error") as error:
        open_image(path)
    assert error.value.passing
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.kind, again.passing) == (str(error.value), "unreadable image", True)
    with pytest.raises(ImageError) as error:
        open_image(b"no image")
    assert not error.value.passing
    with pytest.raises(ImageError, match=r"x{300}"):
        open_image(tmp_path / ("x" * 300))


def test_an_image_without_a_pixel_is_none():
    bmp = bytearray(encoded(noise(), "BMP"))
    bmp[18:22] = bytes(4)
    for image in (bytes(bmp), Image.new("RGB", (0, 5)), b"P6 0 3 255\n", png((0, 2), 8, 2, b"\0\0")):
        with pytest.raises(ImageError):
            open_image(image)


def test_a_program_that_draws_is_not_run():
    with pytest.raises(ImageError):
        open_image(encoded(noise(), "EPS"))


def test_heic_is_read_whatever_its_ending(tmp_path):
    pytest.importorskip("pi_heif", reason="no pi_heif: pip install 'clipvisionalign[photos]'")
    for name in ("a.heic", "a.jpg", "none"):
        (tmp_path / name).write_bytes(HEIC)
        opened = open_image(tmp_path / name)
        assert opened.size == (32, 16)
        assert opened.getpixel((4, 8))[0] > 150 > opened.getpixel((28, 8))[0]


# --- transparency and depth ------------------------------------------------------------------------------------------


def test_a_colour_key_is_laid_on_white():
    row = [
        (8, 2, b"\0" + bytes([10, 20, 30, 40, 50, 60]), struct.pack(">3H", 10, 20, 30), (40, 50, 60)),
        (16, 2, b"\0" + struct.pack(">6H", 2570, 5140, 7710, 10280, 12850, 15420), struct.pack(">3H", 2570, 5140, 7710), (40, 50, 60)),
        (8, 0, b"\0" + bytes([10, 77]), struct.pack(">H", 10), (77, 77, 77)),
        (4, 0, b"\0" + bytes([0x25]), struct.pack(">H", 2), (85, 85, 85)),
        (2, 0, b"\0" + bytes([0b01100000]), struct.pack(">H", 1), (170, 170, 170)),
        (1, 0, b"\0" + bytes([0b01000000]), struct.pack(">H", 0), (255, 255, 255)),
        (16, 0, b"\0" + struct.pack(">2H", 0, 40000), struct.pack(">H", 0), (155, 155, 155)),
    ]  # fmt: skip
    for bit_depth, colour, pixels, key, other in row:
        opened = open_image(png((2, 1), bit_depth, colour, pixels, tRNS=key))
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), other], (bit_depth, colour)
        plain = open_image(png((2, 1), bit_depth, colour, pixels))
        assert plain.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_what_is_transparent_is_laid_on_white(mode):
    clear = Image.new("LA", (4, 4), (0, 0)) if mode in ("LA", "La") else Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if mode == "PA":
        clear = Image.new("P", (4, 4)).convert("PA")
        clear.putalpha(0)
    assert open_image(clear.convert(mode)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_greys_are_scaled_by_the_bits_that_they_fill(bits):
    """A ramp from black to white in so many bits is that ramp in eight, in whatever container it comes."""
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16).reshape(1, 64).repeat(2, 0)
    expected = np.linspace(0, 255, 64)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)
    files = {"png": png((64, 2), 16, 0, rows), "tiff of 16": tiff_of_greys(ramp, 16), "J2K": encoded(Image.fromarray(ramp), "JPEG2000"),
             "pgm": b"P5 64 2 %d\n" % (2**bits - 1) + ramp.astype(">u2").tobytes()}  # fmt: skip
    if bits == 12:
        files["tiff of 12"] = tiff_of_greys(ramp, 12)
    for name, data in files.items():
        assert np.abs(np.asarray(open_image(data))[0, :, 0] - expected).max() <= 1.5, name


@pytest.mark.parametrize(("least", "white"), [(0, 32767), (-32768, 32767), (0, 4095)])
@pytest.mark.parametrize("packed", [False, True])
def test_greys_with_a_sign_reach_white(least, white, packed):
    ramp = np.linspace(least, white, 64).round().astype(np.int16).reshape(1, 64).repeat(2, 0)
    greys = np.asarray(open_image(tiff_of(ramp, 1, packed)))[0, :, 0]
    assert np.abs(greys - np.linspace(0, 255, 64)).max() <= 1.5


def test_a_dark_image_of_a_known_range_stays_dark():
    dark = np.full((2, 2), 40, dtype=np.uint16)
    assert open_image(tiff_of_greys(dark * 10, 12)).getpixel((0, 0))[0] == pytest.approx(400 / 4095 * 255, abs=1)
    assert open_image(b"P5 2 2 65535\n" + dark.astype(">u2").tobytes()).getpixel((0, 0))[0] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([-1.0, 0.0, 1.0], [0, 128, 255]), ([0.0, 127.5, 255.0], [0, 128, 255]),
     ([0.0, 5e5, 1e6], [0, 128, 255]), ([np.nan, 0.5, np.inf], [0, 128, 255]), ([-np.inf, 0.5, 1.0], [0, 128, 255]),
     ([-3e38, 0.0, 3e38], [0, 128, 255]), ([0.0, 0.0, 0.0], [0, 0, 0])],
)  # fmt: skip
def test_floating_greys_of_any_range(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    for opened in (open_image(image), open_image(encoded(image, "TIFF"))):
        assert np.abs(np.asarray(opened)[0, :, 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0, 1023.0, 65535.0])
@pytest.mark.parametrize(("under", "over"), [(0.0, 0.0), (0.0, 0.02), (0.01, 0.0), (0.03, 0.03)])
def test_a_float_that_overshoots_its_range_is_cut(top, under, over):
    """As resampling with a kernel that has negative parts leaves it."""
    values = np.linspace(-under * top, top + over * top, 200, dtype=np.float32)
    greys = np.asarray(open_image(encoded(Image.fromarray(values[None]), "TIFF")))[0, :, 0]
    assert np.abs(greys - np.clip(values / top, 0, 1) * 255).max() <= 1


@pytest.mark.parametrize("black_is_most", [False, True])
@pytest.mark.parametrize("kind", ["u1", "<u2", "<u4", "<i2", "<i4", "<f4"])
@pytest.mark.parametrize("packed", [False, True])
def test_greys_of_tiff_are_a_ramp_whatever_their_type(kind, black_is_most, packed):
    number = np.dtype(kind)
    bottom, top = (0.0, 1.0) if number.kind == "f" else (np.iinfo(number).min, np.iinfo(number).max)
    ramp = np.linspace(bottom, top, 64).astype(number)
    values = np.flip(ramp) if black_is_most else ramp
    data = tiff_of(values[None], photometric=0 if black_is_most else 1, packed=packed)
    if black_is_most and (kind == "<u4" or number.kind == "i"):
        # Pillow knows no such file.
        with pytest.raises(ImageError):
            open_image(data)
        return
    assert np.abs(np.asarray(open_image(data))[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1.5


# --- which files of a folder are images ------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_an_image_is_known_by_its_content(tmp_path):
    """Every format under its own ending, under none and under one that says nothing; and what is none."""
    files = intact_files()
    good = {f"own/{number}.{ending}": data for number, (ending, data) in enumerate(files.items())}
    # These have no magic number: without an ending they could be anything.
    good |= {
        f"none/{number}": data for number, (ending, data) in enumerate(files.items()) if ending not in ("tga", "im")
    }
    good |= {
        f"odd/{number}.jpg_large": data
        for number, (ending, data) in enumerate(files.items())
        if ending not in ("tga", "im")
    }
    good |= {
        f"more/a.{ending}": files["jpg"] for ending in ("JPG", "jfif", "jpe", "pjpeg", "PNG", "bak", "1", "fit", "tmp")
    }
    bad = {
        "cut/one": files["jpg"][:200],
        "cut/two.x": files["png"][:50],
        "cut/three.jpg": b"",
        "cut/four.jxl": b"\xff\x0a12",
    }
    others = {
        "a.txt": NON_IMAGE_SUFFIX, "a.json": NON_IMAGE_SUFFIX, "a.csv": NON_IMAGE_SUFFIX, "a.tar": NON_IMAGE_SUFFIX, "a.npy": NON_IMAGE_SUFFIX, "a.mp4": NON_IMAGE_SUFFIX,
        "a.kra": UNDECODED_SUFFIX, "a.svg": UNDECODED_SUFFIX, "a.eps": UNDECODED_SUFFIX, "a.pdf": UNDECODED_SUFFIX,
        "._a.jpg": HIDDEN, ".hidden.png": HIDDEN, ".thumbnails/a.jpg": HIDDEN, ".DS_Store": HIDDEN,
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": SYSTEM_FILE, "__MACOSX/a.jpg": SYSTEM_FILE, "Thumbs.db": SYSTEM_FILE,
        "x/#recycle/a.jpg": SYSTEM_FILE, "README": NON_IMAGE_CONTENT, "a.dat": NON_IMAGE_CONTENT, "b.fit": NON_IMAGE_CONTENT, "c.pcd": NON_IMAGE_CONTENT,
        "numbers.bin": NON_IMAGE_CONTENT, "empty": NON_IMAGE_CONTENT, "source.xyz": NON_IMAGE_CONTENT,
    }  # fmt: skip
    contents = {
        "README": b"BM is the name of this folder\n", "a.dat": b"P5 of five\n", "b.fit": b"\x0e\x10\xd9\x07.FIT", "empty": b"",
        "c.pcd": b"# .PCD v0.7\nFIELDS x y z\n", "numbers.bin": struct.pack("<100f", *range(100)), "source.xyz": b"#define X 1\n",
    }  # fmt: skip
    write(tmp_path, good | bad | {name: contents.get(name, files["jpg"]) for name in others})
    not_taken = ExcludedFiles()
    listed = {path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path, not_taken)}
    assert listed == set(good | bad)
    assert len(listed) + not_taken.total == len(good | bad | others)
    for name, reason in others.items():
        assert exclusion_reason(name, lambda name=name: contents.get(name, files["jpg"])) == reason, name
    for name in good:
        assert open_image(tmp_path / name).mode == "RGB"
    for name in bad:
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    reasons = list(others.values())
    assert {reason: sum(endings.values()) for reason, endings in not_taken.to_dict().items()} == {
        reason: reasons.count(reason) for reason in set(reasons)
    }
    assert json.dumps(not_taken.to_dict())
    assert any(line.startswith("6 no image by its ending: 1 .") for line in not_taken.lines())


def test_bytes_that_are_no_image_are_none():
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 4, 8, 15, 16, 100, 4096):
        for _ in range(20):
            data = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
            assert not is_image_content(data) or open_header(data)
    for text in ("", "B", "BM", "P", "P6", "RIFF", "GIF", "II*", "#define", "/* comment */"):
        assert not is_image_content(text.encode())


def test_a_file_that_cannot_be_looked_into_is_not_dropped(tmp_path):
    def head():
        raise PermissionError(13, "Permission denied")

    assert exclusion_reason("folder/unknown", head) == ""
    assert exclusion_reason("folder/a.txt", head) == NON_IMAGE_SUFFIX
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in image_files(tmp_path)] == ["gone.jpg"]


def test_a_link_finds_what_is_stored_in_a_hidden_folder(tmp_path):
    """As git-annex and DVC store files."""
    search = pytest.importorskip(
        "clipvisionalign.search.storage", reason="no filelock: pip install 'clipvisionalign[search]'"
    )
    write(
        tmp_path,
        {
            ".store/0a/file": encoded(noise(), "PNG"),
            ".store/0b/file": encoded(noise(seed=1), "PNG"),
            "a/notes.txt": b"",
        },
    )
    (tmp_path / "a" / "one.png").symlink_to("../.store/0a/file")
    (tmp_path / "two").symlink_to(".store/0b", target_is_directory=True)
    not_taken = ExcludedFiles()
    raw_paths = [file.raw for file in search.list_local_images(tmp_path, not_taken)]
    assert raw_paths == [b"a/one.png", b"two/file"]
    assert not_taken.to_dict() == {NON_IMAGE_SUFFIX: {".txt": 1}}


def test_folders_are_listed_through_links_once_and_by_their_own_names(tmp_path):
    """Whatever links lead where: in a circle, out of the folder, to a folder that has a name of its own below it."""
    rng = random.Random(0)
    for turn in range(20):
        folder, away = tmp_path / f"{turn}" / "here", tmp_path / f"{turn}" / "away"
        folders = [root / name for root in (folder, away) for name in ("a", "b", "b/c", ".d")]
        for number, each in enumerate(folders):
            each.mkdir(parents=True, exist_ok=True)
            (each / f"{number}.png").write_bytes(b"x")
        for number in range(5):
            (rng.choice(folders[:4]) / f"{rng.choice('0z')}{number}").symlink_to(rng.choice([*folders, folder]))
        listed = image_files(folder)
        assert sorted(path.resolve() for path in listed) == sorted(reached(folder))
        assert {folders[number] / f"{number}.png" for number in range(3)} <= set(listed)
        assert listed == sorted(listed)


def reached(folder: Path) -> set[Path]:
    """The files of a folder and of those that it leads to by any name that is not hidden, by their own names."""
    waiting, visited, files = [folder], set(), set()
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_file():
                files.add(path.resolve())
            elif not path.name.startswith(".") and path.resolve() not in visited:
                visited.add(path.resolve())
                waiting.append(path.resolve())
    return files


def test_a_folder_that_cannot_be_listed_is_told():
    folder = Path(tempfile.mkdtemp())
    write(folder, {"a.png": b"x", "sub/b.png": b"x", "lost+found/c.png": b"x"})
    for name in ("", "sub", "lost+found"):
        os.chmod(folder / name, 0o755 if not name else 0)
    try:
        with as_nobody():
            not_taken = ExcludedFiles()
            assert image_files(folder, not_taken) == [folder / "a.png"]
            assert not_taken.lines() == ["1 folders that cannot be listed, such as sub: Permission denied"]
            with pytest.raises(
                OSError, match=r"sub: this folder cannot be listed: Permission denied; make it readable"
            ):
                image_files(folder)
        (folder / "sub").chmod(0o755)
        with as_nobody():
            assert image_files(folder) == [folder / "a.png", folder / "sub" / "b.png"]
    finally:
        shutil.rmtree(folder)
