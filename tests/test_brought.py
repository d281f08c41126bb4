"""What folders, moved images, long queries and odd dates do to an index: nothing hangs, is lost or cut without a word."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from PIL import ExifTags, Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.cli.output import print_hits
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.hashes import hash_file
from clipvisionalign.images import NOT_REGULAR, ExcludedFiles, camera_metadata, image_files
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.manifest import is_gone, read_whole_manifest
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import InvalidIndexError, content_hash
from clipvisionalign.search.terms import parse_term


@pytest.fixture
def images(scenes_folder, tmp_path) -> Path:
    """Twelve drawn scenes, in a folder of the test's own."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(sorted(scenes_folder.rglob("*.png"))[:12]):
        shutil.copy2(path, folder / f"{number:02}.png")
    return folder


@pytest.mark.timeout(120)
def test_pipes_and_sockets_are_counted_and_never_opened(images, tiny_runs, tmp_path, monkeypatch):
    for name in ("live.jpg", "live"):
        os.mkfifo(images / name)
    # A socket's path may have 107 bytes.
    monkeypatch.chdir(images)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    (images / "link.png").symlink_to("live.jpg")
    report = build_index(tiny_runs["self"], images, tmp_path / "index")
    assert report.encoded == 12
    counts = report.to_dict()["not_taken"][NOT_REGULAR]
    assert counts == {".png": 2, ".jpg": 1, "no ending": 1}
    excluded = ExcludedFiles()
    assert len(image_files(images, excluded)) == 12
    assert excluded.to_dict()[NOT_REGULAR] == counts
    # A file that has become a pipe is gone, and is not waited for.
    (images / "03.png").unlink()
    os.mkfifo(images / "03.png")
    report = build_index(tiny_runs["self"], images, tmp_path / "index")
    assert (report.encoded, Searcher(tmp_path / "index").table.count_rows()) == (0, 11)
    with pytest.raises(OSError, match="no regular file"):
        content_hash(images / "03.png")
    assert hash_file(images / "03.png") == "missing"


@pytest.mark.parametrize("shards", [None, 2])
def test_images_that_were_moved_are_searched_where_they_are_and_not_encoded_again(
    images, tiny_runs, tmp_path, shards, capsys, caplog
):
    index, moved = tmp_path / "index", tmp_path / "new home"
    build_index(tiny_runs["self"], images, index, shards=shards)
    query = [parse_term("a red circle")]
    before = Searcher(index).search(query, 12)
    # While the folder is there, the index is no other folder's.
    other = tmp_path / "other"
    shutil.copytree(images, other)
    with pytest.raises(InvalidIndexError, match=r"an index of .*images; give another --out"):
        build_index(tiny_runs["self"], other, index)
    images.rename(moved)
    assert main(["search", str(index), "a red circle"]) == 0
    assert f"index NEW_FOLDER --out {index}" in capsys.readouterr().err
    # A folder with other images is no new place of these.
    strange = tmp_path / "strange"
    strange.mkdir()
    Image.new("RGB", (40, 40), "red").save(strange / "a.png")
    with pytest.raises(InvalidIndexError, match="--allow-drop"):
        build_index(tiny_runs["self"], strange, index)
    assert read_whole_manifest(index).folder == str(images)
    (moved / "00.png").rename(moved / "first.png")
    caplog.clear()
    report = build_index(tiny_runs["self"], moved, index)
    assert (report.encoded, report.moved, report.unchanged) == (0, 1, 11)
    assert read_whole_manifest(index).folder == str(moved)
    after = Searcher(index)
    assert [hit.score for hit in after.search(query, 12)] == [hit.score for hit in before]
    assert all((moved / hit.path).is_file() for hit in after.search(query, 12))
    capsys.readouterr()
    assert main(["search", str(index), "a red circle", "--paths"]) == 0
    captured = capsys.readouterr()
    assert all(Path(line).is_file() for line in captured.out.splitlines())
    assert "NEW_FOLDER" not in captured.err
    assert build_index(tiny_runs["self"], moved, index).unchanged == 12


def test_another_folder_with_the_same_names_is_no_new_place_of_the_images(images, tiny_runs, tmp_path):
    """Another card of the same camera has the same names."""
    index, other = tmp_path / "index", tmp_path / "other"
    build_index(tiny_runs["self"], images, index)
    other.mkdir()
    for number, path in enumerate(sorted(images.iterdir())):
        Image.new("RGB", (64, 64), (20 * number, 0, 99)).save(other / path.name)
    images.rename(tmp_path / "unplugged")
    before = (index / "index.json").read_bytes()
    with pytest.raises(InvalidIndexError, match=r"of its 12 images 0 are in .*--allow-drop to replace them"):
        build_index(tiny_runs["self"], other, index)
    assert (index / "index.json").read_bytes() == before
    # Copies with other times are the same images; one that was changed meanwhile is no obstacle.
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in sorted((tmp_path / "unplugged").iterdir()):
        (copied / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (64, 64), "red").save(copied / "05.png")
    report = build_index(tiny_runs["self"], copied, index)
    assert report.encoded == 1
    assert read_whole_manifest(index).folder == str(copied)
    shutil.rmtree(copied)
    assert build_index(tiny_runs["self"], other, index, allow_drop=True).encoded == 12


def test_a_folder_that_a_link_leads_to_may_be_given_by_either_name(images, tiny_runs, tmp_path):
    index, far = tmp_path / "index", tmp_path / "far"
    build_index(tiny_runs["self"], images, index)
    images.rename(far)
    images.symlink_to(far)
    for given in (images, far, images):
        assert build_index(tiny_runs["self"], given, index).unchanged == 12


def test_a_folder_that_may_not_be_examined_is_not_gone(images, monkeypatch):
    assert is_gone(str(images / "nowhere"))
    assert is_gone(str(images / "00.png" / "x"))
    assert not is_gone(str(images))
    assert not is_gone("s3://bucket/images")

    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refused)
    assert not is_gone(str(images / "nowhere"))


def test_a_query_that_is_longer_than_the_model_reads_is_told_so(images, tiny_runs, tmp_path):
    index = tmp_path / "index"
    build_index(tiny_runs["self"], images, index)
    searcher = Searcher(index)
    limit = searcher.aligner.text_tower.max_tokens
    short, long = " ".join(["red"] * (limit - 2)), " ".join(["red"] * (limit - 1))
    without = Searcher(index)
    without.encoder._text_manifest = None
    for each in (searcher, without):
        notes = {text: each.search_one(SearchQuery([parse_term(text)])).notes for text in (short, long)}
        assert notes[short] == ()
        (note,) = notes[long]
        assert f"longer than the {limit} tokens that the model reads" in note
    (note,) = searcher.search_one(SearchQuery([parse_term("a ring"), parse_term(long, -1.0)])).notes
    assert "is ignored" in note


def test_a_table_leaves_out_columns_without_values_and_keeps_paths_readable(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    empty = dict.fromkeys(("taken", "camera", "lens", "latitude", "longitude", "place"))
    path = "2024/1000268201_693b08cb0e.jpg"
    hits = [
        Hit(1, path, 0.3, 500, 375, 9, {**empty, "rating": 0}),
        Hit(2, "b.jpg", 0.2, 5, 5, 9, {**empty, "rating": None}),
    ]
    print_hits("a dog", [], hits, {})
    table = capsys.readouterr().out
    assert "taken" not in table
    assert "rating" in table
    assert path in table
    hits = [
        Hit(
            1,
            path,
            0.3,
            500,
            375,
            9,
            {**empty, "taken": "2024-05-01T10:00:00", "camera": "Canon EOS 5D", "place": "Oslo"},
        )
    ]
    print_hits("a dog", [], hits, {})
    lines = capsys.readouterr().out.splitlines()
    assert any("2024/1000268201_693b08cb" in line for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("when", "is_kept"),
    [
        (datetime(1, 1, 1), False),
        (datetime(1825, 12, 31), False),
        (datetime(1850, 6, 1), True),
        (datetime.now() + timedelta(hours=20), True),
        (datetime.now() + timedelta(days=3), False),
        (datetime(2099, 1, 1), False),
    ],
)
def test_dates_of_clocks_that_were_never_set_are_none(tmp_path, when, is_kept):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"{when:%Y:%m:%d %H:%M:%S}".zfill(19)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        metadata = camera_metadata(opened)
    assert metadata.taken == (when.replace(microsecond=0) if is_kept else None)
    assert metadata.is_damaged == (not is_kept)


def test_one_image_in_the_place_of_a_folder_is_named_as_that(images, tiny_runs, tmp_path, capsys):
    with pytest.raises(DataError, match=r"00.png: one image; give the folder that it is in, such as .*images"):
        build_index(tiny_runs["self"], images / "00.png", tmp_path / "index")
    assert main(["index", str(tiny_runs["self"]), str(images / "01.png"), "--out", str(tmp_path / "index")]) == 1
    assert "one image" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
    (tmp_path / "captions.csv").write_text("image,caption\nimages/00.png,a ring\n")
    assert build_index(tiny_runs["self"], tmp_path / "captions.csv", tmp_path / "index").encoded == 1
