"""What cameras write: read of every format, never a reason to fail, and columns of an index that filters find."""

from __future__ import annotations

import io
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipvisionalign.images import CameraMetadata, camera_metadata, open_header
from clipvisionalign.search import camera_columns
from clipvisionalign.search.camera_columns import CAMERA_FILE
from clipvisionalign.search.embed import _decode_block, unpack_camera_metadata
from clipvisionalign.search.facets import FacetCounts, facets
from clipvisionalign.search.filters import FilterError
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.places import nearest_towns
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.tables import open_image_table, read_image_table
from clipvisionalign.search.terms import parse_term

#: Tags of EXIF, its sub-directories and the GPS.
MAKE, MODEL, ORIENTATION, DETAILS, POSITION, TAKEN, DIGITISED, LENS = (
    0x010F, 0x0110, 0x0112, 0x8769, 0x8825, 0x9003, 0x9004, 0xA434
)  # fmt: skip
MUNICH, TOKYO, FIJI = (48.137, 11.575), (35.68, 139.76), (-17.8, 177.4)


def exif_of(
    taken: Any = None, camera: tuple[Any, Any] = (None, None), position: tuple[float, float] | None = None,
    orientation: int = 1, extra: dict[int, dict[int, Any]] | None = None,
) -> bytes:  # fmt: skip
    """A block of EXIF as a camera writes it. extra: tags by directory, 0 for the first."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for tag, value in zip((MAKE, MODEL), camera, strict=True):
        if value is not None:
            exif[tag] = value
    details, gps = exif.get_ifd(DETAILS), exif.get_ifd(POSITION)
    if taken is not None:
        details[TAKEN] = taken
    if position is not None:
        gps |= {
            1: "NS"[position[0] < 0],
            2: sexagesimal(position[0]),
            3: "EW"[position[1] < 0],
            4: sexagesimal(position[1]),
        }
        exif.get_ifd(POSITION).update(gps)
    for directory, tags in (extra or {}).items():
        (exif if directory == 0 else exif.get_ifd(directory)).update(tags)
    return exif.tobytes()


def sexagesimal(degrees: float) -> tuple[float, float, float]:
    minutes = abs(degrees) % 1 * 60
    return float(int(abs(degrees))), float(int(minutes)), round(minutes % 1 * 60, 3)


def encoded(image_format: str, exif: bytes, colour: str = "red", **options: Any) -> bytes:
    out = io.BytesIO()
    if image_format == "MPO":
        options |= {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "white")]}
    Image.new("RGB", (64, 48), colour).save(out, image_format, exif=exif, **options)
    return out.getvalue()


def read(data: bytes) -> CameraMetadata:
    with open_header(data) as opened:
        return camera_metadata(opened)


@pytest.fixture(scope="module")
def heif():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF", "HEIF"])
def test_every_format_gives_what_a_camera_wrote(image_format, heif):
    data = encoded(
        image_format, exif_of("2023:05:01 12:30:05", ("Apple", "iPhone 15\0"), TOKYO, 6, {DETAILS: {LENS: " 6.9mm "}})
    )
    metadata = read(data)
    assert (metadata.taken, metadata.camera, metadata.lens) == (
        datetime(2023, 5, 1, 12, 30, 5),
        "Apple iPhone 15",
        "6.9mm",
    )
    assert (metadata.latitude, metadata.longitude) == pytest.approx(TOKYO, abs=1e-5)
    assert not metadata.is_damaged


def test_without_exif_there_is_nothing_and_nothing_damaged():
    assert read(encoded("PNG", b"")) == CameraMetadata()


@pytest.mark.parametrize(
    ("written", "taken", "is_damaged"),
    [
        ("2023:05:01 12:30:05", datetime(2023, 5, 1, 12, 30, 5), False), ("2023-05-01T12:30", datetime(2023, 5, 1, 12, 30), False),
        ("2023:05:01 12:30:05.75+02:00", datetime(2023, 5, 1, 12, 30, 5), False), ("    :  :     :  :  ", None, False),
        ("0000:00:00 00:00:00", None, True), ("2023:13:01 00:00:00", None, True), ("2023:02:30 00:00:00", None, True),
        ("yesterday", None, True), ("2023:05:01 25:00:00", None, True),
    ],
)  # fmt: skip
def test_a_date_is_the_time_of_the_cameras_clock_or_none(written, taken, is_damaged):
    metadata = read(encoded("JPEG", exif_of(written)))
    assert (metadata.taken, metadata.is_damaged) == (taken, is_damaged)


@pytest.mark.parametrize(
    ("tags", "expected", "is_damaged"),
    [
        ({1: "S", 2: (33.0, 51.0, 0.0), 3: "E", 4: (151.0, 12.0, 36.0)}, (-33.85, 151.21), False),
        ({1: "N", 2: (91.0, 0.0, 0.0), 3: "E", 4: (11.0, 0.0, 0.0)}, (None, None), True),
        ({1: "N", 2: (48.0, 61.0, 0.0), 3: "E", 4: (11.0, 0.0, 0.0)}, (None, None), True),
        ({1: "N", 2: (48.0, 8.0, 0.0), 3: "E", 4: (181.0, 0.0, 0.0)}, (None, None), True),
        ({2: (48.0, 8.0, 0.0), 4: (11.0, 0.0, 0.0)}, (None, None), True), ({1: "N", 2: (48.0, 8.0, 0.0)}, (None, None), True),
        ({1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)}, (None, None), False), ({1: "N"}, (None, None), False),
    ],
)  # fmt: skip
def test_a_position_is_whole_and_on_the_earth_or_none(tags, expected, is_damaged):
    metadata = read(encoded("JPEG", exif_of("2023:05:01 12:30:05", extra={POSITION: tags})))
    assert (metadata.latitude, metadata.longitude) == (pytest.approx(expected) if expected[0] else expected)
    assert metadata.is_damaged == is_damaged
    # The rest is read all the same.
    assert metadata.taken == datetime(2023, 5, 1, 12, 30, 5)


def test_zero_denominators_are_no_position():
    """Rationals of 0/0, which no number stands for, as some cameras write them without a position."""
    data = encoded("JPEG", exif_of(position=MUNICH))
    whole = read(data)
    assert whole.latitude == pytest.approx(MUNICH[0], abs=1e-5)
    rational = (48).to_bytes(4, "big") + (1).to_bytes(4, "big")
    order = "big" if rational in data else "little"
    old = (48).to_bytes(4, order) + (1).to_bytes(4, order)
    assert old in data
    damaged = read(data.replace(old, (48).to_bytes(4, order) + bytes(4)))
    assert (damaged.latitude, damaged.longitude, damaged.is_damaged) == (None, None, True)


def test_xmp_is_read_where_exif_has_nothing():
    packet = b"""<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Make="Canon" tiff:Model='EOS R6'
        exif:GPSLatitude="33,51.5S" exif:GPSLongitude="151,12,36E"><photoshop:DateCreated>2020-02-03T04:05:06</photoshop:DateCreated>
        </rdf:Description></x:xmpmeta>"""
    metadata = read(encoded("WEBP", b"", xmp=packet))
    assert (metadata.camera, metadata.taken) == ("Canon EOS R6", datetime(2020, 2, 3, 4, 5, 6))
    assert (metadata.latitude, metadata.longitude) == (pytest.approx(-33.858333), pytest.approx(151.21))


@settings(max_examples=80, deadline=None, database=None)
@given(st.data())
def test_damaged_bytes_of_exif_never_raise(data):
    block = bytearray(exif_of("2023:05:01 12:30:05", ("Apple", "iPhone"), MUNICH))
    for _ in range(data.draw(st.integers(1, 6))):
        block[data.draw(st.integers(6, len(block) - 1))] = data.draw(st.integers(0, 255))
    metadata = read(encoded("JPEG", bytes(block[: data.draw(st.integers(8, len(block)))])))
    assert metadata.taken is None or isinstance(metadata.taken, datetime)
    assert metadata.latitude is None or -90 <= metadata.latitude <= 90
    assert metadata.longitude is None or -180 <= metadata.longitude <= 180
    assert (metadata.camera or "").isprintable()


# --- an index --------------------------------------------------------------------------------------------------------

#: Twelve as phones write them: name, format, date, camera, position, orientation.
PHONE_IMAGES = [
    ("IMG_0001.HEIC", "HEIF", "2023:05:01 12:30:05", ("Apple", "iPhone 15"), MUNICH, 6),
    ("IMG_0002.HEIC", "HEIF", "2023:05:31 23:59:59", ("Apple", "iPhone 15"), (48.2, 11.7), 1),
    ("IMG_0003.heic", "HEIF", "2023:06:01 00:00:00", ("Apple", "iPhone 12"), TOKYO, 8),
    ("IMG_0004.heic", "HEIF", None, ("Apple", "iPhone 12"), None, 3),
    ("a.avif", "AVIF", "2024:01:01 00:00:00", ("Google", "Pixel 8"), FIJI, 6),
    ("b.avif", "AVIF", "2022:12:31 23:59:59", ("Google", "Pixel 8"), (-18.0, -179.5), 1),
    ("c.avif", "AVIF", "0000:00:00 00:00:00", ("Google", "Pixel 8"), None, 5),
    ("d.avif", "AVIF", None, (None, None), None, 1),
    ("p1.mpo", "MPO", "2023:05:01 08:00:00", ("SONY", "XQ-1"), MUNICH, 6),
    ("p2.mpo", "MPO", "2021:07:04 10:00:00", ("NIKON CORPORATION", "NIKON D850"), TOKYO, 2),
    ("p3.jpg", "MPO", "2021:07:05 10:00:00", ("NIKON CORPORATION", "NIKON D850"), None, 1),
    ("p4.jpg", "MPO", None, (None, None), MUNICH, 4),
]  # fmt: skip
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink", "grey", "cyan"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_folder, tiny_model) -> Path:
    """An aligner of one step: what it finds does not matter here."""
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(
        data=str(scenes_folder), out=str(folder / "run"), model=tiny_model("self"), epochs=1, train_images=16, batch=16, augment="none",
        precision="float32", cache=str(folder / "cache"),
    )  # fmt: skip
    train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def phone_images(tmp_path_factory, heif) -> Path:
    folder = tmp_path_factory.mktemp("phone")
    for (name, image_format, taken, camera, position, orientation), colour in zip(PHONE_IMAGES, COLOURS, strict=True):
        (folder / name).write_bytes(encoded(image_format, exif_of(taken, camera, position, orientation), colour))
    return folder


@pytest.fixture
def source(tmp_path, phone_images) -> Path:
    return Path(shutil.copytree(phone_images, tmp_path / "images"))


def names_where(index: Path, run: Path, where: str) -> set[str]:
    return {hit.path for hit in Searcher(index, run).search([parse_term("red")], count=100, where=where)}


def columns_of(index: Path) -> dict[str, dict[str, Any]]:
    rows = open_image_table(index).search().limit(1000).to_arrow().to_pylist()
    return {row["path"]: {name: row.get(name) for name in camera_columns.CAMERA_COLUMNS} for row in rows}


def test_what_phones_write_is_filtered_by(run, phone_images, tmp_path):
    index = tmp_path / "index"
    report = build_index(run, phone_images, index)
    assert (report.there, report.encoded, report.broken) == (12, 12, 0)
    assert report.camera == {"values": 10, "none": 1, "damaged": 1}
    expected = {
        "taken = 2023-05": {"IMG_0001.HEIC", "IMG_0002.HEIC", "p1.mpo"}, "taken >= 2024": {"a.avif"},
        "taken = 2023 and not camera like 'Apple*'": {"p1.mpo"}, 'taken < "2021-07-05 10:00"': {"p2.mpo"},
        "near(48.1, 11.6, 20km)": {"IMG_0001.HEIC", "IMG_0002.HEIC", "p1.mpo", "p4.jpg"},
        "near(-17.9, 179.9, 300km)": {"a.avif", "b.avif"}, "near(35.7, 139.7, 10mi)": {"IMG_0003.heic", "p2.mpo"},
        "camera in ('NIKON D850', 'Google Pixel 8')": {"a.avif", "b.avif", "c.avif", "p2.mpo", "p3.jpg"},
        "taken is null": {"IMG_0004.heic", "c.avif", "d.avif", "p4.jpg"},
        "camera is null and latitude is null": {"d.avif"},
    }  # fmt: skip
    assert {where: names_where(index, run, where) for where in expected} == expected
    (hit,) = Searcher(index, run).search([parse_term("red")], where="taken >= 2024")
    assert hit.to_dict()["metadata"]["taken"] == "2024-01-01T00:00:00"
    assert json.dumps(hit.to_dict())


def test_images_without_such_metadata_leave_no_columns(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded("PNG", b""))
    report = build_index(run, tmp_path / "images", tmp_path / "index")
    assert report.camera == {"none": 1}
    assert not Searcher(tmp_path / "index", run).metadata
    with pytest.raises(FilterError, match="no column 'taken'"):
        names_where(tmp_path / "index", run, "taken = 2023")


def as_before(index: Path) -> None:
    """The index as it was without such columns."""
    table = open_image_table(index)
    table.drop_columns([name for name in camera_columns.CAMERA_COLUMNS if name in table.schema.names])
    (index / CAMERA_FILE).unlink()


def test_an_index_of_before_is_filled_without_encoding(run, source, tmp_path):
    index = tmp_path / "index"
    build_index(run, source, index)
    filled = columns_of(index)
    as_before(index)
    # Beside it, files that are new, changed, moved and gone.
    (source / "new.jpg").write_bytes(encoded("JPEG", exif_of("2025:01:02 03:04:05"), "navy"))
    (source / "a.avif").write_bytes(encoded("AVIF", exif_of("2025:02:03 04:05:06"), "olive"))
    (source / "p1.mpo").rename(source / "moved.mpo")
    (source / "p2.mpo").unlink()
    report = build_index(run, source, index)
    assert (report.encoded, report.unchanged, report.moved, report.dropped) == (2, 9, 1, 1)
    assert report.camera == {"values": 10, "none": 1, "damaged": 1, "filled": 10}
    expected = {name: values for name, values in filled.items() if name not in ("p1.mpo", "p2.mpo", "a.avif")}
    expected["moved.mpo"] = filled["p1.mpo"]
    rows = columns_of(index)
    new = dict.fromkeys(camera_columns.CAMERA_COLUMNS) | {"taken": datetime(2025, 1, 2, 3, 4, 5)}
    assert rows == expected | {"new.jpg": new, "a.avif": new | {"taken": datetime(2025, 2, 3, 4, 5, 6)}}
    assert build_index(run, source, index).camera == {}


def test_a_users_column_of_the_same_name_counts_and_ours_returns_without_it(run, source, tmp_path):
    index, table = tmp_path / "index", tmp_path / "table.csv"
    table.write_text("path,camera,taken,stars\nIMG_0001.HEIC,mine,2001,5\nd.avif,yours,1999,4\n")
    build_index(run, source, index, metadata=table)
    searcher = Searcher(index, run)
    assert {name: searcher.metadata[name] for name in ("camera", "taken", "stars", "latitude")} == {
        "camera": "text", "taken": "integer", "stars": "integer", "latitude": "number",
    }  # fmt: skip
    assert names_where(index, run, "camera = 'mine' or camera like 'Apple*'") == {"IMG_0001.HEIC"}
    assert names_where(index, run, "near(48.1, 11.6, 20km) and taken = 2001") == {"IMG_0001.HEIC"}
    # Without a table its columns stay; with another one, what cameras wrote is there again, and nothing is encoded.
    assert build_index(run, source, index).camera == {}
    assert names_where(index, run, "camera = 'mine'") == {"IMG_0001.HEIC"}
    table.write_text("path,stars\nIMG_0001.HEIC,3\n")
    report = build_index(run, source, index, metadata=table)
    assert (report.encoded, report.camera["filled"]) == (0, 12)
    assert names_where(index, run, "camera like 'Apple*' and stars is null") == {
        "IMG_0002.HEIC",
        "IMG_0003.heic",
        "IMG_0004.heic",
    }
    assert names_where(index, run, "taken = 2023-05 and stars = 3") == {"IMG_0001.HEIC"}
    # And the other way round: a table takes a column that the index had filled.
    table.write_text("path,latitude\nIMG_0001.HEIC,north\n")
    build_index(run, source, index, metadata=table)
    assert names_where(index, run, "latitude is not null") == {"IMG_0001.HEIC"}
    assert names_where(index, run, "taken = 2023-05") == {"IMG_0001.HEIC", "IMG_0002.HEIC", "p1.mpo"}


def test_an_unreadable_file_of_an_index_of_before_is_counted(run, source, tmp_path):
    index = tmp_path / "index"
    build_index(run, source, index)
    as_before(index)
    times, whole = (source / "p1.mpo").stat(), Path(shutil.copy2(source / "p1.mpo", tmp_path / "whole.mpo"))
    (source / "p1.mpo").write_bytes(bytes(times.st_size))
    os.utime(source / "p1.mpo", ns=(times.st_atime_ns, times.st_mtime_ns))
    report = build_index(run, source, index)
    assert (report.camera["filled"], report.camera["unreadable"]) == (11, 1)
    assert columns_of(index)["p1.mpo"]["taken"] is None
    # It is tried again, until it can be read.
    shutil.copy2(whole, source / "p1.mpo")
    assert build_index(run, source, index).camera["filled"] == 12
    assert columns_of(index)["p1.mpo"]["taken"] == datetime(2023, 5, 1, 8)
    assert build_index(run, source, index).camera == {}


def test_a_cluster_passes_what_cameras_wrote(source):
    """Blocks of rows of one type, whether their images have metadata or not."""
    import pyarrow as arrow

    from clipvisionalign.images import ImageTransform

    blocks = [
        _decode_block(
            arrow.Table.from_pylist([{"raw": name, "size": 1, "mtime_ns": 1, "hash": ""}]),
            str(source),
            ImageTransform(32),
        )
        for name in (b"a.avif", b"d.avif")
    ]
    assert blocks[0].schema == blocks[1].schema
    both = [unpack_camera_metadata(block.to_pylist()[0]["camera_metadata"]) for block in blocks]
    assert (both[0].taken, both[0].camera, both[1]) == (datetime(2024, 1, 1), "Google Pixel 8", CameraMetadata())


# --- places and facets -----------------------------------------------------------------------------------------------


def test_the_nearest_town_is_named_and_none_far_away():
    pytest.importorskip("reverse_geocode")
    towns = nearest_towns([MUNICH, TOKYO, (-30.0, -120.0), (89.9, 0.0)])
    assert towns[0] == "Munich, Germany"
    assert str(towns[1]).endswith(", Japan")
    assert towns[2:] == [None, None]


def test_the_nearest_town_is_that_of_fewest_kilometres():
    """Not of fewest degrees: those of longitude are short in the north, and 180 E is 180 W."""
    import reverse_geocode

    gazetteer = reverse_geocode.GeocodeData()._locations
    latitudes, longitudes = (np.radians([town[axis] for town in gazetteer]) for axis in ("latitude", "longitude"))
    positions = [(-16.8, -179.99), (-16.8, 179.99), (60.0, 11.0), (68.4, 17.4), (-54.9, -68.0), (65.0, 25.0)]
    for (latitude, longitude), name in zip(positions, nearest_towns(positions), strict=True):
        here = np.radians([latitude, longitude])
        cosine = np.sin(here[0]) * np.sin(latitudes)
        cosine += np.cos(here[0]) * np.cos(latitudes) * np.cos(longitudes - here[1])
        nearest = gazetteer[int(np.argmax(cosine))]["city"]
        assert str(name).startswith(f"{nearest}, "), (latitude, longitude)
    assert nearest_towns(positions)[0] == nearest_towns(positions)[1]


def test_places_are_named_when_the_gazetteer_is_there(run, source, tmp_path, monkeypatch, caplog):
    index = tmp_path / "index"
    monkeypatch.setattr(camera_columns, "has_gazetteer", lambda: False)
    with caplog.at_level("INFO", "clipvisionalign"):
        build_index(run, source, index)
    assert 'pip install "clipvisionalign[photos]"' in caplog.text
    assert "place" not in Searcher(index, run).metadata
    monkeypatch.setattr(camera_columns, "has_gazetteer", lambda: True)
    monkeypatch.setattr(
        camera_columns, "nearest_towns", lambda positions: ["Munich, Germany" if p[0] > 48 else None for p in positions]
    )
    report = build_index(run, source, index)
    assert report.encoded == 0
    assert names_where(index, run, 'place = "Munich, Germany"') == {
        "IMG_0001.HEIC",
        "IMG_0002.HEIC",
        "p1.mpo",
        "p4.jpg",
    }


def test_facets_count_what_their_filters_find(run, phone_images, tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app

    monkeypatch.setattr(camera_columns, "has_gazetteer", lambda: True)
    monkeypatch.setattr(
        camera_columns, "nearest_towns", lambda positions: ['the "big" one' if p[0] > 40 else "x" for p in positions]
    )
    index = tmp_path / "index"
    build_index(run, phone_images, index)
    counts = facets(read_image_table(index))
    assert [each["value"] for each in counts["months"]] == ["2024-01", "2023-06", "2023-05", "2022-12", "2021-07"]
    assert {each["value"] for each in counts["places"]} == {'the "big" one', "x"}
    for facet in (each for group in counts.values() for each in group):
        assert len(names_where(index, run, facet["where"])) == facet["count"], facet
    table = read_image_table(index)
    kept, reads, read = FacetCounts(table), [], type(table).read
    monkeypatch.setattr(type(table), "read", lambda self, *names: reads.append(names) or read(self, *names))
    assert [kept.read() for _ in range(3)] == [counts] * 3
    assert len(reads) == 1, "read once for each version of the table"
    with TestClient(create_app([Searcher(index, run)])) as client:
        assert client.get("/facets").json() == counts
        assert client.get("/facets", params={"index": 1}).status_code == 422
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.png").write_bytes(encoded("PNG", b""))
    build_index(run, empty, tmp_path / "other")
    assert facets(read_image_table(tmp_path / "other")) == {"months": [], "places": [], "cameras": []}
