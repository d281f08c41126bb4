"""Patches beside an index: what is stored, what re-ranking gives by them, and that they keep up with the images."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.patches import (
    PATCH_TABLE,
    PatchSettings,
    open_patch_reader,
    open_patch_writer,
    pack_patches,
    pool_patches,
    unpack_patches,
)
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import try_open_table
from clipvisionalign.search.tables import open_image_table, read_columns
from clipvisionalign.search.terms import parse_term

QUERIES = ("a red circle", "a blue star and a green ring", "nothing")

#: Every file that is opened while `opened_files` is active. An audit hook cannot be taken out again.
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths that this process opens."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture
def folder(tmp_path: Path, scenes_folder: Path) -> Path:
    """Twenty images."""
    target = tmp_path / "images"
    target.mkdir()
    for path in sorted((scenes_folder / "images").glob("*.png"))[:20]:
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def reranked(tmp_path_factory, scenes_folder, tiny_runs) -> dict[str, tuple[Path, Path]]:
    """By design, an index with patches, and one without."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((scenes_folder / "images").glob("*.png"))[:30]:
        shutil.copy(path, folder)
    indexes = {}
    for design in ("late", "cross"):
        indexes[design] = tuple(folder.with_name(f"{design}-{name}") for name in ("kept", "none"))
        build_index(tiny_runs[design], folder, indexes[design][0], patches=0)
        build_index(tiny_runs[design], folder, indexes[design][1])
    return indexes


def keys(index: Path, name: str) -> dict[int, str]:
    table = open_image_table(index) if name == "images" else try_open_table(Storage(index), PATCH_TABLE)
    rows = read_columns(table, ("id", "hash"))
    assert len({row["id"] for row in rows}) == len(rows), "an image stands twice"
    return {row["id"]: row["hash"] for row in rows}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1e-4, 1.0, 300.0]))
def test_a_number_is_off_by_half_a_code_at_most(count: int, width: int, seed: int, size: float):
    patches = size * np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    packed = pack_patches(patches)
    assert len(packed) == count * (width + 2)
    # Half a code, and what the scale was rounded up by: 2 ** -10 of it, or the step of the smallest halves.
    largest = np.abs(patches).max(axis=1, keepdims=True)
    allowed = (largest / 127 * (1 + 2**-9) + 2**-23) * 0.5001
    assert (np.abs(unpack_patches(packed, width) - patches) <= allowed).all()


@pytest.mark.parametrize("pool", [1, 2, 3, 7, 100])
def test_pooled_patches_are_means_of_groups_and_as_many_as_told(pool: int):
    random = np.random.default_rng(pool)
    centres = random.normal(size=(7, 16)) * 10
    patches = (centres[random.integers(7, size=49)] + 0.01 * random.normal(size=(49, 16))).astype(np.float32)
    pooled = pool_patches(patches, pool)
    assert len(pooled) == -(-49 // pool)
    nearest = np.linalg.norm(patches[:, None] - pooled[None], axis=2).min(axis=1)
    if pool <= 7:
        assert nearest.max() < 0.1, "similar patches stand in one group"
    if pool == 1:
        assert np.array_equal(pooled, patches)
    if pool == 100:
        assert np.allclose(pooled[0], patches.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("design", ["late", "cross"])
def test_re_ranking_by_patches_opens_no_image_and_orders_as_the_images_do(reranked, design):
    with_patches, without = (Searcher(index) for index in reranked[design])
    images = str(with_patches.manifest.folder)
    for query in QUERIES:
        with opened_files() as opened:
            hits = with_patches.search([parse_term(query)], count=30, rerank=20)
        assert [path for path in opened if path.startswith(images)] == []
        with opened_files() as opened:
            expected = without.search([parse_term(query)], count=30, rerank=20)
        assert len([path for path in opened if path.startswith(images)]) >= 20, "the images are read without patches"
        scores = {hit.path: hit.pair_score for hit in expected}
        assert [hit.path for hit in hits[20:]] == [hit.path for hit in expected[20:]]
        # With patches of the design late the words are encoded by onnxruntime.
        assert np.allclose([hit.score for hit in hits[20:]], [hit.score for hit in expected[20:]], rtol=0, atol=1e-4)
        assert {hit.path for hit in hits[:20]} == {hit.path for hit in expected[:20]}
        # Eight bits: a code is 1/127 of a patch's largest number, and off by half of that.
        spread = max(scores[hit.path] for hit in expected[:20]) - min(scores[hit.path] for hit in expected[:20])
        differences = [abs(hit.pair_score - scores[hit.path]) for hit in hits[:20]]
        scales, width = without.aligner.late_scales, without.aligner.config.late.width
        bound = 0.05 * max(spread, 1.0) if scales is None else scales[1] * width**0.5 / 254 * 1.05
        assert max(differences) < bound
        assert max(differences) > 0, "nothing was rounded: the images were read"
        order = [scores[hit.path] for hit in hits[:20]]
        assert all(order[i] >= order[i + 1] - 2 * max(differences) for i in range(19))


def test_an_image_whose_file_is_gone_is_re_ranked_by_its_patches(tiny_runs, folder, tmp_path):
    build_index(tiny_runs["late"], folder, tmp_path / "index", patches=2)
    searcher = Searcher(tmp_path / "index")
    before = searcher.search([parse_term("a red circle")], count=20, rerank=20)
    shutil.rmtree(folder)
    assert searcher.search([parse_term("a red circle")], count=20, rerank=20) == before


def test_patches_keep_up_with_the_images(tiny_runs, folder, tmp_path, capsys):
    index = tmp_path / "index"
    assert build_index(tiny_runs["late"], folder, index).patches == {}
    paths = sorted(folder.iterdir())
    unreadable = paths[0]
    content = unreadable.read_bytes()
    status = os.stat(unreadable)
    # Cut short, with the size and the time that the index knows: only who opens it sees that.
    unreadable.write_bytes(content[:50] + b"\0" * (len(content) - 50))
    os.utime(unreadable, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = build_index(tiny_runs["late"], folder, index, patches=3)
    assert (report.encoded, report.unchanged) == (0, 20)
    assert report.patches == {"stored": 19, "added": 19, "unreadable": 1}
    assert keys(index, "patches").items() < keys(index, "images").items()
    # The image without patches is among those that are re-ranked; it is not opened as an image now.
    unreadable.write_bytes(content)
    os.utime(unreadable, ns=(status.st_atime_ns, status.st_mtime_ns))
    mixed = Searcher(index).search([parse_term("a red circle")], count=20, rerank=20)
    assert all(hit.pair_score is not None for hit in mixed)
    # New, changed, moved and deleted files, without the flag.
    Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "new.png")
    Image.new("RGB", (40, 40), (30, 30, 200)).save(paths[1])
    paths[2].rename(folder / "moved.png")
    paths[3].unlink()
    report = build_index(tiny_runs["late"], folder, index)
    assert (report.encoded, report.moved, report.dropped, report.there) == (2, 1, 1, 20)
    assert report.patches == {"stored": 20, "added": 1, "unreadable": 0}
    assert keys(index, "patches") == keys(index, "images")
    assert main(["index", str(tiny_runs["late"]), str(folder), "--out", str(index), "--patches", "3"]) == 0
    assert "patches: 20 images with theirs; --rerank opens no image that has them" in capsys.readouterr().out
    again = Searcher(index).search([parse_term("a red circle")], count=20, rerank=20)
    # That of the image that had none is of its stored patches now; the others are the same ones.
    unchanged = {hit.path: hit.pair_score for hit in mixed if hit.path != paths[1].name}
    compared = [(hit.pair_score, unchanged[hit.path]) for hit in again if hit.path in unchanged]
    assert len(compared) >= 16
    assert all(score == pytest.approx(before, abs=0.05) for score, before in compared)


def test_what_an_interrupted_update_left_never_stands_for_another_image(tiny_runs, folder, tmp_path):
    index = tmp_path / "index"
    build_index(tiny_runs["late"], folder, index, patches=0)
    numbers = keys(index, "images")
    reader = open_patch_reader(Storage(index))
    assert reader is not None
    right = reader.read(numbers)
    # Rows of images that were never written, under the numbers that the next ones will have.
    wrong = pack_patches(np.ones((4, reader.settings.width), dtype=np.float32))
    writer = open_patch_writer(Storage(index), None)
    assert writer is not None
    writer.write([(max(numbers) + 1 + each, "of another image", wrong) for each in range(3)])
    assert open_patch_reader(Storage(index)).read({max(numbers) + 1: "of this one"}) == {}
    Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "new.png")
    report = build_index(tiny_runs["late"], folder, index)
    assert report.patches == {"stored": 21, "added": 0, "unreadable": 0}
    assert keys(index, "patches") == keys(index, "images")
    after = open_patch_reader(Storage(index)).read(keys(index, "images"))
    assert all(np.array_equal(after[number], patches) for number, patches in right.items())


def test_other_settings_and_designs_without_pairs_are_refused(tiny_runs, folder, tmp_path):
    with pytest.raises(ValueError, match="the design self has nothing to re-rank with; late and cross have"):
        build_index(tiny_runs["self"], folder, tmp_path / "self", patches=0)
    assert not (tmp_path / "self").exists()
    with pytest.raises(ValueError, match="--patches should be at least 1, not -2"):
        build_index(tiny_runs["late"], folder, tmp_path / "late", patches=-2)
    assert not (tmp_path / "late").exists()
    build_index(tiny_runs["late"], folder, tmp_path / "late", patches=2)
    with pytest.raises(InvalidIndexError, match=r"keeps patches by --patches 2, not 4: leave the number out"):
        build_index(tiny_runs["late"], folder, tmp_path / "late", patches=4)
    assert build_index(tiny_runs["late"], folder, tmp_path / "late", patches=0).patches["stored"] == 20
    (tmp_path / "late" / "patches.json").write_text("{")
    with pytest.raises(InvalidIndexError, match=r"patches\.json: cannot be read"):
        Searcher(tmp_path / "late").search([parse_term("a red circle")], rerank=2)


def test_damaged_patches_are_named():
    with pytest.raises(ValueError, match="7 bytes are no patches of 4 numbers"):
        unpack_patches(b"1234567", 4)
    assert PatchSettings("late", 4) == PatchSettings("late", 4, 1, 1)
