"""What an index does where files are gone, hidden, unreadable, replaced or named twice: nothing is lost without a word."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from nobody import NOBODY, as_nobody
from PIL import Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.search import broken_files as broken_module
from clipvisionalign.search import collection
from clipvisionalign.search.broken_files import BrokenFiles, classify_fault, read_broken_files
from clipvisionalign.search.diff import exceeds_drop_limit
from clipvisionalign.search.index_report import IndexReport
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.manifest import recorded_folder
from clipvisionalign.search.storage import InvalidIndexError, Storage, list_local_images
from clipvisionalign.search.tables import open_caption_table, open_image_table


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    """An aligner with random weights."""
    folder = tmp_path_factory.mktemp("run")
    Aligner(tiny_model()).save(folder)
    return folder


def draw(path: Path, seed: int) -> Path:
    """An image of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty images, five of them in a folder below."""
    for number in range(20):
        draw(tmp_path / "pictures" / ("sub" if number >= 15 else "") / f"{number:02}.png", number)
    return tmp_path / "pictures"


def paths_of(index: Path) -> list[str]:
    paths = open_image_table(index).search().limit(10_000).to_arrow()["path"].to_pylist()
    assert len(set(paths)) == len(paths), "an image stands there twice"
    return sorted(paths)


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def assert_adds_up(report: IndexReport) -> None:
    counted = report.encoded + report.unchanged + report.moved + report.broken + report.other_names + report.dead_links
    assert report.files == counted + report.not_taken.total


# --- what may be dropped ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_drive_that_is_not_mounted_empties_no_index(run, source, tmp_path, capsys):
    index = tmp_path / "index"
    build_index(run, source, index)
    before = paths_of(index)
    away = source.rename(tmp_path / "away")
    source.mkdir()
    assert main(["index", str(run), str(source), "--out", str(index)]) == 1
    stderr = capsys.readouterr().err
    for part in (str(source), "20 of its 20 rows", "0 images", "--allow-drop"):
        assert part in stderr
    assert paths_of(index) == before
    # Another drive in its place: nothing of it is indexed either.
    for number in range(20):
        draw(source / f"other {number}.png", 100 + number)
    with pytest.raises(InvalidIndexError, match="20 of its 20 rows"):
        build_index(run, source, index)
    assert paths_of(index) == before
    assert main(["index", str(run), str(source), "--out", str(index), "--allow-drop"]) == 0
    assert paths_of(index) == names_below(source)
    # What was moved is not gone, however much it is.
    shutil.rmtree(source)
    away.rename(source)
    build_index(run, source, index, allow_drop=True)
    (source / "new").mkdir()
    for path in [*source.glob("*.png")]:
        path.rename(source / "new" / path.name)
    report = build_index(run, source, index)
    assert (report.moved, report.dropped, report.unchanged) == (15, 0, 5)


def test_an_empty_folder_drops_nothing_however_few_rows_there_are(run, tmp_path):
    path = draw(tmp_path / "pictures" / "0.png", 0)
    build_index(run, path.parent, tmp_path / "index")
    path.unlink()
    with pytest.raises(InvalidIndexError, match="1 of its 1 rows"):
        build_index(run, path.parent, tmp_path / "index")
    draw(path.parent / "1.png", 1)
    assert build_index(run, path.parent, tmp_path / "index").dropped == 1


@pytest.mark.parametrize(
    ("gone", "rows", "refused"), [(0, 0, False), (1, 1, False), (1, 4, False), (2, 4, True), (2, 9, True), (2, 10, False),
                                  (5, 5, True), (5, 6, True), (5, 10, True), (6, 10, True), (5, 25, False),
                                  (20, 100, False), (21, 100, True), (1000, 10_000, False)],
)  # fmt: skip
def test_how_many_rows_may_be_dropped(gone, rows, refused):
    assert exceeds_drop_limit(gone, rows) is refused


def test_files_that_are_damaged_all_at_once_keep_their_rows(run, source, tmp_path):
    """As a cloud's folder leaves them: of no bytes."""
    index = tmp_path / "index"
    build_index(run, source, index)
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InvalidIndexError, match=r"20 of its 20 rows can no longer be decoded.*--allow-drop"):
        build_index(run, source, index)
    assert len(paths_of(index)) == 20
    for number in range(17):
        draw(source / ("sub" if number >= 15 else "") / f"{number:02}.png", number)
    report = build_index(run, source, index)
    assert (report.broken, report.dropped, report.there) == (3, 3, 17)


@pytest.fixture
def open_to_all(run, source, tmp_path, monkeypatch) -> Iterator[tuple[Path, Path, Path]]:
    """A run, images and a place for an index that belong to nobody, as does the folder for temporary files."""
    # All that is imported on the way is read while it may be.
    build_index(run, source, tmp_path / "before")
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(run, folder / "run")
    shutil.copytree(source, folder / "pictures")
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    yield folder / "run", folder / "pictures", folder / "index"
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_listed_keeps_its_rows(open_to_all, capsys):
    run, source, index = open_to_all
    with as_nobody():
        build_index(run, source, index)
        (source / "sub").chmod(0)
        assert main(["index", str(run), str(source), "--out", str(index)]) == 1
        stderr = capsys.readouterr().err
        for part in (f"5 of its 20 rows are of files below {source}/sub", "Permission denied", "--allow-drop"):
            assert part in stderr
        assert len(paths_of(index)) == 20
        # A folder without a row is told, and hinders nothing.
        (source / "sub").chmod(0o755)
        (source / "private").mkdir(mode=0)
        lines: list[str] = []
        with log_to(lines.append):
            report = build_index(run, source, index)
        assert report.unlisted == {"private": "Permission denied"}
        assert "cannot be listed: private: Permission denied" in lines
        (source / "sub").chmod(0)
        assert build_index(run, source, index, allow_drop=True).dropped == 5
        assert len(paths_of(index)) == 15
        # The folder itself.
        source.chmod(0)
        with pytest.raises(PermissionError):
            build_index(run, source, index, allow_drop=True)
        for path in (source, source / "sub"):
            path.chmod(0o755)


def test_files_that_may_not_be_looked_at_or_read_keep_their_rows_and_are_tried_again(open_to_all):
    run, source, index = open_to_all
    with as_nobody():
        (source / "03.png").chmod(0)
        report = build_index(run, source, index)
        assert (report.encoded, report.broken, report.there) == (19, 1, 19)
        (entry,) = read_broken_files(index)
        assert (entry["path"], entry["fault"]) == ("03.png", "io")
        assert "Permission denied" in entry["reason"]
        # Size and time stay as they are; only the permission changes.
        (source / "03.png").chmod(0o644)
        report = build_index(run, source, index)
        assert (report.encoded, report.broken, report.there) == (1, 0, 20)
        # A folder whose files have names and nothing else; files that were touched and may not be read.
        (source / "sub").chmod(0o444)
        for name in ("00.png", "01.png"):
            os.utime(source / name)
            (source / name).chmod(0)
        report = build_index(run, source, index)
        assert (report.kept, report.broken, report.dropped, report.there) == (7, 7, 0, 20)
        assert_adds_up(report)
        assert sorted(entry["path"] for entry in read_broken_files(index))[:3] == ["00.png", "01.png", "sub/15.png"]
        (source / "sub").chmod(0o755)
        for name in ("00.png", "01.png"):
            (source / name).chmod(0o644)
        report = build_index(run, source, index)
        assert (report.unchanged, report.broken, report.kept, read_broken_files(index)) == (20, 0, 0, [])


def test_a_permission_that_is_taken_away_half_way(open_to_all):
    run, source, index = open_to_all
    with as_nobody():
        build_index(run, source, index)
        for number in range(3):
            draw(source / "sub" / f"new {number}.png", 50 + number)
            os.utime(source / "sub" / f"{15 + number}.png")

        def take_away(line: str) -> None:
            if "files that may be images" in line:
                (source / "sub").chmod(0)

        with log_to(take_away):
            report = build_index(run, source, index)
        assert (report.there, report.dropped, report.broken, report.kept) == (20, 0, 6, 3)
        assert_adds_up(report)
        assert {entry["fault"] for entry in read_broken_files(index)} == {"io"}
        (source / "sub").chmod(0o755)
        report = build_index(run, source, index)
        assert (report.there, report.encoded, report.broken) == (23, 3, 0)
        assert paths_of(index) == names_below(source)


def test_a_link_to_a_drive_that_is_not_there_keeps_the_rows_behind_it(run, source, tmp_path):
    index = tmp_path / "index"
    drive = (source / "sub").rename(tmp_path / "drive")
    (source / "sub").symlink_to(drive)
    build_index(run, source, index)
    away = drive.rename(tmp_path / "away")
    with pytest.raises(
        InvalidIndexError, match=r"5 of its 20 rows are of files below .*/sub, .*a link that leads nowhere"
    ):
        build_index(run, source, index)
    away.rename(drive)
    assert build_index(run, source, index).unchanged == 20


def test_a_data_set_whose_images_are_gone_drops_few_and_not_all(run, source, tmp_path):
    index, table = tmp_path / "index", tmp_path / "table.csv"
    (source / "sub" / "15.png").rename(source / "15.png")
    table.write_text("image,caption\n" + "".join(f"pictures/{name},a {name}\n" for name in names_below(source)))
    build_index(run, table, index, captions=True)
    away = (source / "sub").rename(tmp_path / "away")
    report = build_index(run, table, index, captions=True)
    assert (report.dropped, report.broken, report.there, report.captions) == (4, 4, 16, 16)
    assert_adds_up(report)
    assert {entry["reason"] for entry in read_broken_files(index)} == {
        f"sub/{n}.png: no such image file" for n in range(16, 20)
    }
    source.rename(tmp_path / "gone")
    with pytest.raises(InvalidIndexError, match="16 of its 16 rows"):
        build_index(run, table, index, captions=True)
    (tmp_path / "gone").rename(source)
    away.rename(source / "sub")
    report = build_index(run, table, index, captions=True)
    assert (report.there, report.captions, report.encoded, report.broken) == (20, 20, 4, 0)


def test_an_index_of_a_data_set_counts_and_splits_as_check_does(run, source, tmp_path, capsys):
    """Rows of images that are missing or damaged are left out by both; groups stand in the same splits."""
    names = names_below(source)
    rows = [f"pictures/{name},a {name} {turn},p{index // 2}" for index, name in enumerate(names) for turn in range(2)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image,caption,scene", *rows, "pictures/00.png,,p0", ",none,p1"]))
    (source / names[0]).unlink()
    (source / names[3]).write_bytes((source / names[3]).read_bytes()[:60])
    (source / names[5]).write_bytes(b"")
    main(["check", str(table), "--group", "scene", "--json"])
    checked = json.loads(capsys.readouterr().out)
    arguments = ["index", str(run), str(table), "--out", str(tmp_path / "index"), "--captions", "--json"]
    assert main([*arguments, "--group", "scene"]) == 0
    indexed = json.loads(capsys.readouterr().out)["data_set"]
    assert {"rows": checked["rows"]["in_files"], "read": checked["rows"]["read"]} | {
        "left_out": checked["rows"]["left_out"]
    } == indexed
    assert indexed["read"] + indexed["left_out"] == indexed["rows"] == 42
    kept = open_image_table(tmp_path / "index").search().limit(100).to_arrow().to_pylist()
    data = read_captioned_images(table, group="scene")
    assert {row["path"]: row["split"] for row in kept} == {
        row.name.removeprefix("pictures/"): row.split for row in data if row.name[9:] in {row["path"] for row in kept}
    }
    assert main([*arguments, "--group", "colour"]) == 1
    assert "no column 'colour' to group by" in capsys.readouterr().err
    assert main(["index", str(run), str(source), "--out", str(tmp_path / "other"), "--group", "scene"]) == 1
    assert "--group names a column of a data set" in capsys.readouterr().err


# --- the folder of a data set's images -------------------------------------------------------------------------------


def flickr(folder: Path) -> None:
    lines = [f"{path.name},a {path.stem}" for path in sorted((folder / "images").rglob("*.png"))]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines]))


def other_spelling(folder: Path) -> None:
    """A table of another system: slashes, case, and a folder that is not here."""
    lines = [f"C:\\SET\\Images\\{path.name},a {path.stem}" for path in sorted((folder / "images").rglob("*.png"))]
    (folder / "list.csv").write_text("\n".join(["image,caption", *lines]))


def texts(folder: Path) -> None:
    for path in (folder / "images").rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a {path.stem}")


@pytest.mark.parametrize(
    ("layout", "below", "gone", "older"),
    [
        (flickr, "", "00", False),
        (other_spelling, "", "11", False),
        (texts, "other", "00 01", False),
        (texts, "other", "00 01", True),
    ],
    ids=["flickr8k", "table", "texts", "texts of an older index"],
)
def test_the_folder_of_an_index_is_the_same_whichever_images_are_there(
    run, tmp_path, monkeypatch, layout, below, gone, older
):
    folder, index = tmp_path / "data", tmp_path / "index"
    paths = [
        draw(folder / "images" / (below if (number < 2) != older else "") / f"{number:02}.png", number)
        for number in range(12)
    ]
    layout(folder)
    source = folder / "list.csv" if layout is other_spelling else folder
    with monkeypatch.context() as patch:
        if older:
            patch.setattr(collection, "UNLISTED_LAYOUTS", ())
        build_index(run, source, index, captions=True)
    before = (recorded_folder(Storage(index)), paths_of(index))
    assert before[0] == str(folder if layout is texts and not older else folder / "images")
    lost = [path for path in paths if path.stem in gone.split()]
    for path in lost:
        path.rename(tmp_path / path.name)
    report = build_index(run, source, index, captions=True)
    assert (report.encoded, report.moved, report.dropped, report.there) == (0, 0, len(lost), 12 - len(lost))
    assert_adds_up(report)
    if layout is not texts:
        missing = {row.image for row in read_captioned_images(source) if not Path(row.image).exists()}
        assert missing == set(lost)
        assert [entry["path"] for entry in read_broken_files(index)] == [path.name for path in lost]
    for path in lost:
        (tmp_path / path.name).rename(path)
    assert build_index(run, source, index, captions=True).encoded == len(lost)
    assert (recorded_folder(Storage(index)), paths_of(index)) == before


def test_a_folder_of_images_that_is_filled_later_is_of_the_same_index(run, tmp_path):
    """A new index of class folders is of all splits, though one alone is there; one of before keeps its folder."""
    for number in range(4):
        draw(tmp_path / "set" / "train" / "ab"[number % 2] / f"{number}.png", number)
    build_index(run, tmp_path / "set", tmp_path / "index", captions=True, layout="classes")
    draw(tmp_path / "set" / "val" / "a" / "9.png", 9)
    assert build_index(run, tmp_path / "set", tmp_path / "index", captions=True, layout="classes").encoded == 1
    assert paths_of(tmp_path / "index")[-1] == "val/a/9.png"


def test_an_index_of_a_folder_is_none_of_a_list_of_some_of_its_images(run, tmp_path):
    folder, index = tmp_path / "data", tmp_path / "index"
    for number in range(6):
        draw(folder / ("images" if number < 4 else "") / f"{number}.png", number)
    lines = ["image,caption", *(f"images/{number}.png,a {number}" for number in range(4))]
    (folder / "list.csv").write_text("\n".join(lines))
    build_index(run, folder, index)
    before = paths_of(index)
    for captions in (True, False):
        with pytest.raises(InvalidIndexError, match=r"an index of .*data; give another --out"):
            build_index(run, folder / "list.csv", index, captions=captions)
    assert paths_of(index) == before
    # The other way round the way out is named.
    build_index(run, folder / "list.csv", tmp_path / "list", captions=True)
    with pytest.raises(InvalidIndexError, match=r"an index of .*images; give that folder, its data set"):
        build_index(run, folder, tmp_path / "list")


def test_images_that_are_there_and_in_no_row_are_named_as_they_are_dropped(run, tmp_path):
    folder, index = tmp_path / "data", tmp_path / "index"
    paths = [draw(folder / "images" / f"{number:02}.png", number) for number in range(12)]
    flickr(folder)
    draw(folder / "images" / "unlisted.png", 50)
    build_index(run, folder, index, captions=True)
    build_index(run, folder / "images", index)
    paths[3].unlink()
    lines: list[str] = []
    with log_to(lines.append):
        report = build_index(run, folder, index, captions=True)
    assert report.dropped == 2
    (line,) = (line for line in lines if "has no row" in line)
    assert line == (
        "note: 1 image is there of which the data set has no row, such as unlisted.png: no longer indexed, nor what was "
        "stored of it"
    )


# --- what is tried again ---------------------------------------------------------------------------------------------


def test_a_file_is_tried_again_when_the_reason_may_have_gone(run, source, tmp_path, monkeypatch):
    from clipvisionalign.search import indexer as module

    tried: list[str] = []
    encoded = module.embed_files

    def watched(aligner, storage, pending, *more):
        tried.extend(file.name for file, _ in pending)
        return encoded(aligner, storage, pending, *more)

    monkeypatch.setattr(module, "embed_files", watched)
    index = tmp_path / "index"
    (source / "text.jpg").write_text("no picture")
    build_index(run, source, index)
    tried.clear()
    build_index(run, source, index)
    assert tried == []
    # Another decoder.
    monkeypatch.setattr(broken_module, "decoder_versions", lambda: "pillow 99.0, pi-heif 99.0")
    build_index(run, source, index)
    assert tried == ["text.jpg"]
    build_index(run, source, index)
    assert tried == ["text.jpg"]
    # A package that is missing may come at any time; and a list that an older version wrote says nothing of the reason.
    for change in ({"fault": "package"}, {"fault": "io"}, {"fault": None, "decoders": None}):
        (entry,) = read_broken_files(index)
        known = {name: value for name, value in (entry | change).items() if value is not None}
        (index / "broken.jsonl").write_text(json.dumps(known) + "\n")
        tried.clear()
        build_index(run, source, index)
        assert tried == ["text.jpg"]


def test_what_was_at_fault_is_known_by_the_errors():
    def raised(first: Exception, then: Exception) -> Exception:
        try:
            try:
                raise first
            except Exception:
                raise then from None
        except Exception as error:
            return error

    unreadable = ValueError("x.jpg: cannot be read")
    assert classify_fault(raised(PermissionError(13, "denied"), unreadable)) == "io"
    assert classify_fault(raised(OSError(5, "Input/output error"), unreadable)) == "io"
    assert classify_fault(OSError("image file is truncated")) == "content"
    assert classify_fault(raised(OSError(22, "Invalid argument"), unreadable)) == "content"
    assert classify_fault(raised(ModuleNotFoundError("no pi_heif"), unreadable)) == "package"
    assert classify_fault(SyntaxError("broken PNG file")) == "content"


def test_files_that_are_called_alike_as_text_are_listed_apart():
    listed = BrokenFiles()
    for raw in (b"a\xff.jpg", b"a\\xff.jpg"):
        listed.add(raw, "no picture", "content", 1, 1)
    text = "".join(json.dumps(entry) + "\n" for entry in listed.entries.values())
    assert set(BrokenFiles(text)) == {b"a\xff.jpg", b"a\\xff.jpg"}


def test_a_file_that_was_replaced_is_known_by_its_content_when_that_is_asked(run, source, tmp_path):
    index = tmp_path / "index"
    one, two = (tmp_path / f"{name}.bmp" for name in "ab")
    for path, colour in ((one, "red"), (two, "blue")):
        Image.new("RGB", (16, 16), colour).save(path)
        os.utime(path, ns=(10**18, 10**18))
    shutil.copy2(one, source / "x.bmp")
    (source / "text.bmp").write_text("no picture")
    build_index(run, source, index)
    before = open_image_table(index).search().where("path = 'x.bmp'").limit(1).to_list()[0]
    shutil.copy2(two, source / "x.bmp")
    assert build_index(run, source, index).unchanged == 21
    report = build_index(run, source, index, verify=True)
    assert (report.encoded, report.unchanged, report.broken) == (1, 20, 1)
    after = open_image_table(index).search().where("path = 'x.bmp'").limit(1).to_list()[0]
    assert after["hash"] != before["hash"]
    assert after["vector"] != before["vector"]
    assert build_index(run, source, index, verify=True).encoded == 0


def test_a_clock_that_was_set_back_or_is_wrong(run, source, tmp_path):
    index = tmp_path / "index"
    # Before 1970, before 1677, beyond 2262: 64 bits of nanoseconds end there, file systems do not.
    wrong = {"00.png": -(10**18), "01.png": 10**19, "02.png": -(10**19), "03.png": 4 * 10**18}
    for name, when in wrong.items():
        os.utime(source / name, ns=(when, when))
    assert build_index(run, source, index).encoded == 20
    assert build_index(run, source, index).unchanged == 20
    # Written anew while the clock went behind what it was: changed, though it is older.
    draw(source / "03.png", 77)
    os.utime(source / "03.png", ns=(10**18, 10**18))
    os.utime(source / "04.png", ns=(10**18, 10**18))
    report = build_index(run, source, index)
    assert (report.encoded, report.unchanged, report.dropped, report.there) == (1, 19, 0, 20)
    assert build_index(run, source, index).unchanged == 20


# --- a disk that is full ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a size that can be changed; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size: str) -> Path:
        how = "remount," if os.path.ismount(disk) else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(disk)], capture_output=True
        )
        if done.returncode:
            pytest.skip("no small disk: no right to mount one")
        return disk

    yield sized
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_index_as_it_was(run, source, small_disk, capsys):
    disk = small_disk("20m")
    index = disk / "index"
    assert main(["index", str(run), str(source), "--out", str(index)]) == 0
    for number in range(40):
        draw(source / f"new {number}.png", 200 + number)
    os.utime(source / "00.png")
    (source / "01.png").unlink()
    before = paths_of(index)
    for left in (0, 8192, 32768):
        with (disk / "fill").open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(4096)) == 4096:
                    pass
            file.truncate(file.tell() - left)
        assert main(["index", str(run), str(source), "--out", str(index)]) == 1
        stderr = capsys.readouterr().err
        assert f"{index}: cannot be written" in stderr
        assert "No space left on device" in stderr
        # Nothing that is there was dropped, and the index can be read.
        assert set(paths_of(index)) >= set(before) - {"01.png"}
        # An index that was never begun is begun when there is room.
        assert main(["index", str(run), str(source), "--out", str(disk / "other")]) == 1
    (disk / "fill").unlink()
    for name in ("index", "other"):
        assert main(["index", str(run), str(source), "--out", str(disk / name)]) == 0
        assert paths_of(disk / name) == names_below(source)


# --- one file, many names --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_file_under_many_names_is_one_row_with_all_captions(run, tmp_path):
    data, index = tmp_path / "data", tmp_path / "index"
    for number in range(3):
        draw(data / f"p{number}.png", number)
    (data / "sub").mkdir()
    (data / "link.png").symlink_to("p0.png")
    os.link(data / "p0.png", data / "hard.png")
    shutil.copy(data / "p1.png", data / "copy.png")
    names = [
        "p0.png",
        "./p0.png",
        "sub/../p0.png",
        "link.png",
        "hard.png",
        str(data / "p0.png"),
        "p1.png",
        "copy.png",
        "p2.png",
    ]
    rows = [f"{name},text {number},train" for number, name in enumerate(names)] + [",no image,train", "p1.png,,train"]
    (data / "table.csv").write_text("\n".join(["image,caption,split", *rows]))

    def captions() -> dict[str, set[str]]:
        texts_by_path: dict[str, set[str]] = {}
        for row in open_caption_table(index).search().limit(100).to_list():
            texts_by_path.setdefault(row["path"], set()).add(row["text"])
        return texts_by_path

    expected = {
        "p0.png": {f"text {n}" for n in range(6)},
        "p1.png": {"text 6"},
        "copy.png": {"text 7"},
        "p2.png": {"text 8"},
    }
    for turn in range(3):
        report = build_index(run, data / "table.csv", index, captions=True)
        assert (report.there, report.encoded) == (4, 0 if turn else 4)
        assert report.data_set == {"rows": 11, "read": 9, "left_out": 2}
        assert_adds_up(report)
        assert captions() == expected
        os.utime(data / "p0.png")
    # An index that an older version left with three rows of one file.
    table = open_image_table(index)
    row = table.search().where("path = 'p0.png'").limit(1).to_arrow()
    import pyarrow as arrow

    for number in (100, 101):
        table.add(row.set_column(row.schema.get_field_index("id"), "id", arrow.array([number], arrow.int64())))
    draw(data / "p0.png", 99)
    report = build_index(run, data / "table.csv", index, captions=True)
    assert (report.there, report.encoded, report.dropped) == (4, 1, 0)
    assert len(paths_of(index)) == 4
    # The folder itself: the same four files.
    report = build_index(run, data, tmp_path / "of folder")
    assert (report.there, report.other_names, report.not_taken.total) == (4, 2, 1)


def test_one_file_in_two_splits_is_no_data_set(run, tmp_path):
    draw(tmp_path / "a.png", 1)
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "table.csv").write_text("image,caption,split\na.png,one,train\nb.png,two,test\n")
    with pytest.raises(DataError, match=r"line 3, .*line 2"):
        build_index(run, tmp_path / "table.csv", tmp_path / "index", captions=True)


def test_captions_go_with_their_image(run, source, tmp_path):
    """Also where the folder is indexed without its captions afterwards."""
    index = tmp_path / "index"
    (source / "table.csv").write_text("image,caption\n" + "".join(f"{name},a {name}\n" for name in names_below(source)))
    build_index(run, source / "table.csv", index, captions=True)
    (source / "00.png").unlink()
    (source / "01.png").rename(source / "moved.png")
    report = build_index(run, source, index)
    assert (report.dropped, report.moved, report.captions) == (1, 1, 19)
    rows = open_caption_table(index).search().limit(100).to_list()
    text_by_path = {row["path"]: row["text"] for row in rows}
    assert text_by_path == {name: f"a {'01.png' if name == 'moved.png' else name}" for name in names_below(source)}


# --- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_numbers_add_up_whatever_happens_to_the_folder(run, tmp_path):
    """Files come, go, are replaced, moved, copied, linked and damaged: the index holds what is there, or lists it."""
    source, index, rng = tmp_path / "pictures", tmp_path / "index", random.Random(5)
    good: dict[str, int] = {}
    seed = 0
    for _ in range(8):
        for _ in range(rng.randint(4, 9)):
            seed += 1
            name = f"{rng.choice(['', 'a/', 'a/b/', 'ü/'])}{rng.randint(0, 30)}.png"
            known = sorted(good)
            what = rng.choice(["draw", "draw", "draw", "damage", "other", "link", "dead", "touch", "move", "remove"])
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if what in ("draw", "damage"):
                path.unlink(missing_ok=True)
                good.pop(name, None)
                if what == "draw":
                    draw(path, seed)
                    good[name] = seed
                else:
                    path.write_bytes(f"no picture {seed}".encode())
            elif what == "other":
                (source / f"{seed}{rng.choice(['.txt', '', '.PDF'])}").write_text("x")
            elif what == "dead":
                (source / f"dead {seed}.png").symlink_to("nowhere.png")
            elif known and what == "link":
                (source / f"z link {seed}.png").symlink_to(rng.choice(known))
            elif known and what == "touch":
                os.utime(source / rng.choice(known))
            elif known and what == "move" and not path.exists():
                one = rng.choice(known)
                (source / one).rename(path)
                good[name] = good.pop(one)
            elif known and what == "remove":
                one = rng.choice(known)
                (source / one).unlink()
                del good[one]
        report = build_index(run, source, index, allow_drop=True)
        assert_adds_up(report)
        listed = {entry["path"] for entry in read_broken_files(index)}
        listing = list_local_images(source)
        files = {path for path in source.rglob("*") if path.is_symlink() or path.is_file()}
        assert report.files == len(files)
        assert len(listed) == report.broken
        # By number, as a link that comes first has the row of its file.
        inside = {(source / path).stat().st_ino for path in paths_of(index)}
        assert inside == {(source / name).stat().st_ino for name in good}
        assert inside | {(source / path).stat().st_ino for path in listed} == {
            os.stat(os.path.join(os.fsencode(source), file.raw)).st_ino for file in listing
        }


def test_names_of_any_bytes_are_printed_and_matched(run, tmp_path, capfdbinary):
    folder = os.fsencode(tmp_path) + b"/pict\xffures"
    names = [
        b"[red]x[/red].png",
        b"[/bold].png",
        b"esc\x1b[31mape.png",
        b"n\xff\xfe.png",
        b"new\nline.png",
        b"[link=a]b.png",
    ]
    content = draw(tmp_path / "one.png", 1).read_bytes()
    for number, name in enumerate(names):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content + bytes([number]))
    with open(os.path.join(folder, b"bad\x1b[1m\xff.png"), "wb") as file:
        file.write(b"no picture")
    index, folder_text = str(tmp_path / "index"), os.fsdecode(folder)
    assert main(["index", str(run), folder_text, "--out", index]) == 0
    out, stderr = capfdbinary.readouterr()
    assert b"bad\\x1b[1m\\xff.png" in stderr
    assert b"\x1b" not in out + stderr
    assert main(["search", index, "red", "--paths", "--null"]) == 0
    assert set(capfdbinary.readouterr().out.split(b"\0")[:-1]) == {os.path.join(folder, name) for name in names}
    assert main(["search", index, "red"]) == 0
    shown = capfdbinary.readouterr().out
    for name in (
        "[red]x[/red].png",
        "[/bold].png",
        r"esc\x1b[31mape.png",
        r"n\xff\xfe.png",
        r"new\nline.png",
        "[link=a]b.png",
    ):
        assert name.encode() in shown
    assert main(["search", index, "red", "--json"]) == 0
    capfdbinary.readouterr()
    # The database has no name for such a folder.
    assert main(["index", str(run), folder_text, "--out", os.fsdecode(os.fsencode(tmp_path) + b"/i\xff")]) == 1
    assert b"has to be UTF-8" in capfdbinary.readouterr().err


def test_an_index_of_nothing_is_refused(tiny_runs, tmp_path):
    from clipvisionalign.data.captioned import DataError
    from clipvisionalign.search.indexer import build_index

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    for made_before in (False, True):
        if made_before:
            (tmp_path / "index").mkdir()
        with pytest.raises(DataError, match=r"no image to index: 1 .*\.txt"):
            build_index(tiny_runs["self"], tmp_path / "empty", tmp_path / "index")
        # Nothing is written either.
        assert [path for path in tmp_path.rglob("*") if "index" in path.name] == [tmp_path / "index"] * made_before
