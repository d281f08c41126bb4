"""Duplicates of an index: the same bytes, nearly the same, one scene; which is kept, and what was decided.

Images are real files: photographs are noise whose amplitude falls with its frequency as that of photographs does,
letters are drawn by Pillow's own font.
"""

from __future__ import annotations

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.images import ImageError
from clipvisionalign.search.duplicate_decisions import read_decisions, read_keepers
from clipvisionalign.search.duplicates import duplicate_report, neighbours
from clipvisionalign.search.duplicates.appearance import Appearance, Thumbnails, compare, thumbnail_of
from clipvisionalign.search.duplicates.complete_link import complete_link_groups
from clipvisionalign.search.duplicates.decisions import add_decisions
from clipvisionalign.search.duplicates.neighbours import nearest_rows, similar_pairs
from clipvisionalign.search.duplicates.quality import ImageFile, choose_best, measure_quality
from clipvisionalign.search.duplicates.verification import read_thumbnails
from clipvisionalign.search.indexer import build_index


def photograph(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """An image with structure of all sizes, as photographs have: noise whose amplitude falls with its frequency."""
    rng = np.random.default_rng(seed)
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.normal(size=(height, width)))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        values = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / width) ** 1.3, s=(height, width))
        channels.append((values - values.mean()) / values.std())
    common = np.stack([0.8 * channels[0] + 0.5 * each for each in channels], axis=-1)
    return Image.fromarray(np.clip(128 + 50 * common, 0, 255).astype(np.uint8))


def drawing(text: str, side: int = 16) -> Image.Image:
    """A letter of few pixels, black on white."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text((side // 4, 0), text, fill="black", font=ImageFont.load_default(side * 0.8))
    return image


def encoded(image: Image.Image, kind: str, **options) -> Image.Image:
    """An image after it was written and read."""
    file = BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


def verdict(first: Image.Image, second: Image.Image) -> Appearance:
    """What a comparison of two images gives, which does not depend on their order."""
    left, right = (
        Thumbnails(thumbnail_of(each)[None], np.array([each.size])) for each in (first, second)
    )  # fmt: skip
    values = {int(compare(*pair)[0]) for pair in ((left, right), (right, left))}
    assert len(values) == 1
    return Appearance(values.pop())


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_photograph_are_nearly_the_same(seed):
    image = photograph(seed)
    width, height = image.size
    copies = {
        "JPEG of low quality": encoded(image, "JPEG", quality=30),
        "WebP": encoded(image, "WEBP", quality=50),
        "half": image.resize((width // 2, height // 2), Image.Resampling.LANCZOS),
        "a third": image.resize((round(width / 3), round(height / 3)), Image.Resampling.BICUBIC),
        "larger": image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC),
        "cropped a little": image.crop((5, 3, width - 9, height - 6)),
        "cropped at one side": image.crop((0, 0, round(0.9 * width), height)),
        "cropped, smaller and recompressed": encoded(
            image.crop((8, 10, width - 10, height - 4)).resize((240, 183)), "JPEG", quality=60
        ),
    }
    wrong = {name for name, copy in copies.items() if verdict(image, copy) != Appearance.NEARLY}
    assert not wrong


@pytest.mark.parametrize("seed", range(4))
def test_what_is_no_copy_of_a_photograph_is_told_apart(seed):
    image = photograph(seed)
    width, height = image.size
    marked = image.copy()
    ImageDraw.Draw(marked).rectangle((width - 24, height - 18, width - 6, height - 6), fill="black")
    moved = image.copy()
    moved.paste(image.crop((0, 0, 60, 60)), (120, 90))
    others = {
        "another": photograph(seed + 100),
        "a corner has something else": marked,
        "an object has moved": moved,
        "a part": image.crop((0, 0, width // 2, height // 2)),
        "stretched": image.resize((width, 2 * height)),
        "other colours": Image.merge("RGB", image.split()[::-1]),
        "on its head": image.transpose(Image.Transpose.ROTATE_180),
    }
    wrong = {name for name, other in others.items() if verdict(image, other) != Appearance.DIFFERENT}
    assert not wrong
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert verdict(image, mirrored) == Appearance.MIRRORED
    assert (
        verdict(image, encoded(mirrored.crop((4, 4, width - 6, height - 2)), "JPEG", quality=60)) == Appearance.MIRRORED
    )


@pytest.mark.parametrize("side", [16, 24, 64, 200])
def test_letters_that_mirror_each_other_are_told_apart(side):
    texts = "bdpq<>oilce"
    letters = [drawing(text, side) for text in texts]
    thumbnails = Thumbnails(
        np.stack([thumbnail_of(each) for each in letters]), np.array([each.size for each in letters])
    )
    first, second = np.divmod(np.arange(len(texts) ** 2), len(texts))
    nearly = compare(thumbnails.select(first), thumbnails.select(second)) == Appearance.NEARLY
    wrong = [texts[a] + texts[b] for a, b in zip(first[nearly], second[nearly], strict=True) if a != b]
    assert not wrong
    assert nearly.sum() == len(texts)


def test_a_drawing_whose_dot_has_moved_is_another():
    def dot(x: int, y: int, side: int = 64) -> Image.Image:
        image = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(image).rectangle((x, y, x + 3, y + 3), fill="red")
        return image

    assert verdict(dot(10, 10), dot(12, 10)) != Appearance.NEARLY
    assert verdict(dot(10, 10), Image.new("RGB", (64, 64), "white")) != Appearance.NEARLY
    assert verdict(dot(10, 10), encoded(dot(10, 10), "JPEG", quality=95)) == Appearance.NEARLY


def test_drawn_scenes_are_all_different(scenes_folder):
    images = [Image.open(path).convert("RGB") for path in sorted((scenes_folder / "images").glob("*.png"))[:60]]
    thumbnails = Thumbnails(np.stack([thumbnail_of(each) for each in images]), np.array([each.size for each in images]))
    first, second = np.triu_indices(len(images), 1)
    assert not (compare(thumbnails.select(first), thumbnails.select(second)) == Appearance.NEARLY).any()


# --- neighbours and groups --------------------------------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_approximate_neighbours_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(3000, 32)))
    vectors[1500:] = unit(vectors[:1500] + 0.05 * rng.normal(size=(1500, 32)))
    exact = similar_pairs(vectors, 0.9, show_progress=False)
    approximate = similar_pairs(vectors, 0.9, exact_up_to=0, show_progress=False)
    everything = {tuple(pair) for pair in np.argwhere(np.triu(vectors @ vectors.T >= 0.9, 1)).tolist()}
    assert {tuple(pair) for pair in exact.pairs.tolist()} == everything
    assert len(everything & {tuple(pair) for pair in approximate.pairs.tolist()}) >= 0.99 * len(everything)
    assert np.allclose(exact.cosines, (vectors[exact.pairs[:, 0]] * vectors[exact.pairs[:, 1]]).sum(axis=1), atol=1e-6)


def planted(seed: int, count: int = 6000, width: int = 64) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Vectors around common centres, of which every eighth has a copy and every eighth an equal one; the pairs."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(count // 40, width)))
    originals = unit(centres[rng.integers(len(centres), size=count)] + unit(rng.normal(size=(count, width))))
    recompressed = unit(originals[: count // 8] + 0.02 * unit(rng.normal(size=(count // 8, width))))
    rows = np.concatenate([originals, recompressed, originals[count // 8 : count // 4]])
    order = rng.permutation(len(rows))
    at = np.argsort(order)
    pairs = np.sort(np.stack([at[count:], at[: count // 4]], axis=1), axis=1)
    return rows[order], [(first, second) for first, second in pairs.tolist()]


def test_every_planted_copy_is_a_candidate():
    vectors, pairs = planted(0)
    candidates = {
        tuple(pair) for pair in similar_pairs(vectors, 0.9, exact_up_to=0, show_progress=False).pairs.tolist()
    }
    assert not set(pairs) - candidates


def test_copies_that_no_search_of_the_graph_reaches_are_candidates(monkeypatch):
    """Both images of a pair are lost: other vectors are where theirs should be."""
    vectors, pairs = planted(1, count=2000)
    lost = np.array(pairs[:5] + pairs[-5:]).ravel()
    original = neighbours.new_graph

    class Forgetful:
        """A graph that loses rows."""

        def __init__(self, width):
            self.graph = original(width)

        def add(self, keys, codes, threads):
            codes = np.where(np.isin(keys, lost)[:, None], -codes, codes)
            self.graph.add(keys, codes, threads=threads)

        def __getattr__(self, name):
            return getattr(self.graph, name)

        def __len__(self):
            return len(self.graph)

    monkeypatch.setattr(neighbours, "new_graph", Forgetful)
    candidates = {
        tuple(pair) for pair in similar_pairs(vectors, 0.9, exact_up_to=0, show_progress=False).pairs.tolist()
    }
    assert not set(pairs) - candidates


def test_more_alike_than_are_considered_are_counted():
    vectors = unit(np.ones((40, 8)) + 0.01 * np.random.default_rng(0).normal(size=(40, 8)))
    assert similar_pairs(vectors, 0.9, show_progress=False).full == 40
    assert nearest_rows(vectors[:3], 16, exact=True, show_progress=False).shape == (3, 3)


@pytest.mark.parametrize("exact_up_to", [0, 10**6])
@pytest.mark.parametrize("noise", [0.4, 0.8])
def test_without_a_cosine_all_alike_and_as_many_less_alike_as_there_are_images_are_candidates(noise, exact_up_to):
    """Few pairs lie below 0.9 and none is left out, or many, of which the most alike stay; none from 0.9 is ever lost."""
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(100, 32)))
    vectors = unit(np.repeat(centres, 6, axis=0) + rng.uniform(0.1, noise, (600, 1)) * unit(rng.normal(size=(600, 32))))
    every = similar_pairs(vectors, neighbours.LOWEST_COSINE, exact_up_to=exact_up_to, show_progress=False)
    chosen = similar_pairs(vectors, exact_up_to=exact_up_to, show_progress=False)
    below = every.cosines[every.cosines < 0.9]
    kept = chosen.cosines[chosen.cosines < 0.9]
    assert (chosen.cosines >= 0.9).sum() == (every.cosines >= 0.9).sum() > 0
    assert len(kept) == min(len(below), len(vectors))
    np.testing.assert_array_equal(np.sort(kept), np.sort(below)[len(below) - len(kept) :])
    assert (len(below) > len(vectors)) == (noise == 0.8)
    assert chosen.cosines.min() >= chosen.threshold >= every.threshold == neighbours.LOWEST_COSINE
    # Those with as many alike as are considered are counted from 0.9 on, as before.
    assert chosen.full == similar_pairs(vectors, 0.9, exact_up_to=exact_up_to, show_progress=False).full


def test_pairs_that_are_equally_alike_are_candidates_together_or_not_at_all():
    """24 points of a circle: 24 pairs at 15 degrees, at 30 and at 45; one pair more leaves those at 45 out as a whole."""
    turn = np.arange(24) * (2 * np.pi / 24)
    circle = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1).astype(np.float32)
    chosen = similar_pairs(circle, show_progress=False)
    assert np.bincount(np.round(np.degrees(np.arccos(chosen.cosines))).astype(int))[[15, 30]].tolist() == [24, 24]
    assert len(chosen.pairs) == 48
    assert np.cos(np.radians(45)) <= chosen.threshold < np.cos(np.radians(30))


def test_groups_do_not_chain_through_unlike_members():
    """On a line, where neighbours are linked: every two members of a group are, and each closest pair is in one."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        positions = rng.uniform(0, 12, size=30)

        def linked(pairs: np.ndarray, at: np.ndarray = positions) -> np.ndarray:
            return np.abs(at[pairs[:, 0]] - at[pairs[:, 1]]) <= 1

        pairs = np.stack(np.triu_indices(30, 1), axis=1)
        pairs = pairs[linked(pairs)]
        closeness = -np.abs(positions[pairs[:, 0]] - positions[pairs[:, 1]])
        groups = complete_link_groups(pairs, closeness, linked)
        members = [member for group in groups for member in group]
        assert len(members) == len(set(members))
        for group in groups:
            assert np.ptp(positions[group]) <= 1
        closest = set(pairs[closeness.argmax()].tolist())
        assert any(closest <= set(group) for group in groups)


def test_the_best_is_the_largest_then_the_sharpest_then_by_format_then_the_oldest():
    image = photograph(0)
    files = {
        "original.png": image, "blurred.png": image.filter(ImageFilter.GaussianBlur(2)), "small.png": image.resize((160, 120)),
    }  # fmt: skip
    content = {name: BytesIO() for name in [*files, "original.jpg"]}
    for name, each in files.items():
        each.save(content[name], "PNG")
    image.save(content["original.jpg"], "JPEG", quality=98)
    measured = {name: measure_quality(file.getvalue()) for name, file in content.items()}

    def best(*names: str, **taken: str) -> tuple[str, str]:
        images = [
            ImageFile(n, name, name, 9, *((160, 120) if "small" in name else image.size), 0, taken.get(f"t{n}", ""))
            for n, name in enumerate(names)
        ]
        position, reason = choose_best(images, lambda some: [measured[each.path] for each in some])
        return names[position], reason.partition(",")[0]

    assert best("small.png", "blurred.png") == ("blurred.png", "largest")
    assert best("blurred.png", "original.png") == ("original.png", "sharpest")
    assert best("blurred.png", "original.jpg") == ("original.jpg", "sharpest")
    assert best("original.jpg", "original.png") == ("original.png", "format")
    assert best("original.png", "original.png", t1="2020-01-01T00:00:00") == ("original.png", "oldest")


@pytest.mark.parametrize("quality", [30, 60, 80])
def test_a_recompressed_copy_is_no_better(quality):
    image = photograph(3)
    original, copy = BytesIO(), BytesIO()
    image.save(original, "JPEG", quality=95)
    Image.open(BytesIO(original.getvalue())).save(copy, "JPEG", quality=quality)
    files = [
        ImageFile(n, f"{n}.jpg", str(n), len(each.getvalue()), 320, 240, 0) for n, each in enumerate((copy, original))
    ]
    sources = [copy, original]
    position, _ = choose_best(files, lambda some: [measure_quality(sources[each.id].getvalue()) for each in some])
    assert position == 1


# --- an index ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tiny_runs, tmp_path_factory) -> Path:
    """A folder with `images` (photographs, copies of all kinds, letters) and their `index`."""
    root = tmp_path_factory.mktemp("duplicates")
    source = root / "images"
    (source / "copies").mkdir(parents=True)
    for seed in range(4):
        photograph(seed).save(source / f"{seed}.png")
    shutil.copy(source / "0.png", source / "copies" / "0 again.png")
    photograph(1).save(source / "copies" / "1.jpg", quality=60)
    photograph(1).resize((160, 120)).save(source / "copies" / "1 small.png")
    photograph(2).crop((6, 4, 312, 236)).save(source / "copies" / "2 cropped.png")
    photograph(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(source / "copies" / "3 mirrored.png")
    for text in "bdpq":
        drawing(text).save(source / f"letter {text}.png")
    build_index(tiny_runs["self"], source, root / "index")
    return root


@pytest.fixture
def folder(built, tmp_path) -> Path:
    shutil.copytree(built / "images", tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def index(built, folder, tmp_path) -> Path:
    shutil.copytree(built / "index", tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(manifest | {"folder": str(folder)}))
    return tmp_path / "index"


#: The cosines of a model that was hardly trained are all high; all pairs are candidates.
ANY = 0.01
BYTES = ("bytes", frozenset({"0.png", "copies/0 again.png"}))
NEARLY = {
    ("nearly", frozenset({"1.png", "copies/1.jpg", "copies/1 small.png"})),
    ("nearly", frozenset({"2.png", "copies/2 cropped.png"})),
}


def groups_of(index: Path, **options) -> set[tuple[str, frozenset[str]]]:
    report = duplicate_report(index, ANY, show_progress=False, **options)
    return {(group.kind, frozenset(image.path for image in group.images)) for group in report.groups}


def test_kinds_are_told_apart_and_the_second_call_decodes_nothing(index):
    first = duplicate_report(index, ANY, show_progress=False)
    assert groups_of(index) == {BYTES, *NEARLY}
    assert first.pairs["mirrored"] >= 1
    assert first.pairs["candidates"] == sum(first.pairs[name] for name in ("nearly", "mirrored", "different"))
    assert first.decoded >= 12
    second = duplicate_report(index, ANY, show_progress=False)
    assert second.decoded == 0
    assert [each.to_dict() for each in second.groups] == [each.to_dict() for each in first.groups]
    kept = {group.images[0].path: group.reason for group in first.groups}
    assert kept["1.png"] in ("sharpest", "format, PNG")
    assert kept["2.png"] == "largest, 320 x 240 pixels"
    assert {image.path for image in first.not_kept()} == {
        "copies/1.jpg", "copies/1 small.png", "copies/2 cropped.png", *(BYTES[1] - set(kept)),
    }  # fmt: skip


def test_scenes_are_listed_only_when_asked_for_and_never_as_copies(index):
    report = duplicate_report(index, ANY, scenes=True, show_progress=False)
    assert [group.kind for group in report.groups] == sorted(
        (group.kind for group in report.groups), key=["bytes", "nearly", "scene"].index
    )
    scenes = [{image.path for image in group.images} for group in report.groups if group.kind == "scene"]
    assert any({"3.png", "copies/3 mirrored.png"} <= scene for scene in scenes)
    assert not any({"1.png", "copies/1.jpg"} <= scene for scene in scenes)
    assert {image.path for image in report.not_kept()} == {
        image.path for image in duplicate_report(index, ANY, show_progress=False).not_kept()
    }


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_what_has_several_frames_or_pages_is_not_compared_by_its_first(kind):
    first, others = photograph(1), [photograph(seed) for seed in (2, 3)]
    out = BytesIO()
    first.save(out, kind, save_all=True, append_images=others)
    with pytest.raises(ImageError, match="holds 3 frames or pages, which are not compared"):
        read_thumbnails(out.getvalue())
    out = BytesIO()
    first.save(out, kind)
    assert read_thumbnails(out.getvalue())[1] == first.size


@pytest.mark.parametrize("compared_before", [False, True])
def test_what_cannot_be_read_now_is_named_and_not_verified(index, folder, compared_before):
    """Also where the pixels were compared before the file was gone: it could be the one that is kept."""
    if compared_before:
        duplicate_report(index, ANY, show_progress=False)
    (folder / "2.png").unlink()
    (folder / "1.png").write_bytes((folder / "3.png").read_bytes())
    os.utime(folder / "0.png")
    report = duplicate_report(index, ANY, show_progress=False)
    assert {path for path, _ in report.not_verified} == {"1.png", "2.png"}
    reasons = dict(report.not_verified)
    assert "cannot be read" in reasons["2.png"]
    assert "changed since it was indexed" in reasons["1.png"]
    assert report.pairs["not_verified"] > 0
    groups = {(group.kind, frozenset(image.path for image in group.images)) for group in report.groups}
    assert groups == {BYTES, ("nearly", frozenset({"copies/1.jpg", "copies/1 small.png"}))}


def test_a_file_of_equal_bytes_that_has_changed_is_in_no_group(index, folder):
    Image.new("RGB", (9, 9)).save(folder / "copies" / "0 again.png")
    report = duplicate_report(index, ANY, show_progress=False)
    assert not report.of_kind("bytes")
    assert "copies/0 again.png" not in {image.path for image in report.not_kept()}
    assert dict(report.not_verified).keys() == {"copies/0 again.png"}


def test_decisions_outlive_moves_dropped_rows_and_another_indexing(index, folder, tiny_runs, capsys):
    both = [str(folder / "2.png"), "copies/2 cropped.png"]
    assert main(["duplicates", str(index), "--not", *both]) == 0
    (decision,) = read_decisions(index)
    assert groups_of(index) == {BYTES, *NEARLY} - {("nearly", frozenset({"2.png", "copies/2 cropped.png"}))}
    (folder / "2.png").rename(folder / "copies" / "moved.png")
    (folder / "copies" / "1.jpg").unlink()
    build_index(tiny_runs["self"], folder, index)
    assert groups_of(index) == {BYTES, ("nearly", frozenset({"1.png", "copies/1 small.png"}))}
    (moved,) = read_decisions(index)
    assert (moved.hashes, moved.decided) == (decision.hashes, decision.decided)
    assert set(moved.paths) == {"copies/moved.png", "copies/2 cropped.png"}
    assert moved.paths.index("copies/moved.png") == decision.paths.index("2.png")
    assert duplicate_report(index, ANY, show_progress=False).pairs["decided"] == 1
    capsys.readouterr()
    assert main(["duplicates", str(index), "--decisions"]) == 0
    line, _ = capsys.readouterr().out.splitlines()
    assert {"copies/moved.png", "copies/2 cropped.png"} == set(line.partition(" (")[0].split(" and "))
    assert main(["duplicates", str(index), "--forget", "copies/moved.png", "copies/2 cropped.png"]) == 0
    assert read_decisions(index) == []
    assert ("nearly", frozenset({"copies/moved.png", "copies/2 cropped.png"})) in groups_of(index)


def test_a_chosen_image_is_kept_of_all_its_groups_also_after_a_move(index, folder, tiny_runs, capsys):
    assert main(["duplicates", str(index), "--keep", "copies/1 small.png", "copies/0 again.png"]) == 0
    report = duplicate_report(index, ANY, show_progress=False)
    kept = {group.images[0].path: group.reason for group in report.groups}
    assert kept["copies/1 small.png"] == kept["copies/0 again.png"] == "chosen by hand"
    assert "copies/2 cropped.png" not in kept
    # Another choice of the same group: the last counts, and none that was chosen is among those not to be kept.
    assert main(["duplicates", str(index), "--keep", "copies/1.jpg"]) == 0
    report = duplicate_report(index, ANY, show_progress=False)
    (group,) = (each for each in report.groups if "1.png" in {image.path for image in each.images})
    assert group.images[0].path == "copies/1.jpg"
    assert {image.path for image in report.not_kept()} & {i.path for i in group.images} == {"1.png"}
    capsys.readouterr()
    assert main(["duplicates", str(index), "--decisions"]) == 0
    assert "3 images to be kept" in capsys.readouterr().out
    assert main(["duplicates", str(index), "--forget", "copies/1.jpg"]) == 0
    (folder / "copies" / "1 small.png").rename(folder / "copies" / "moved.png")
    build_index(tiny_runs["self"], folder, index)
    kept = {group.images[0].path for group in duplicate_report(index, ANY, show_progress=False).groups}
    assert {"copies/moved.png", "copies/0 again.png"} <= kept


def keeper_of_bytes(index: Path) -> tuple[str, str]:
    """Which of the files of the same bytes is kept, and why."""
    (group,) = duplicate_report(index, ANY, show_progress=False).of_kind("bytes")
    return group.images[0].path, group.reason


@pytest.mark.parametrize("chosen", ["0.png", "copies/0 again.png"])
def test_of_equal_files_the_chosen_one_is_kept_wherever_it_is_moved(index, folder, tiny_runs, chosen):
    """Twice, to names that sort first and last; also where the other one takes its former place."""
    other = ({"0.png", "copies/0 again.png"} - {chosen}).pop()
    assert main(["duplicates", str(index), "--keep", chosen]) == 0
    assert keeper_of_bytes(index) == (chosen, "chosen by hand")
    for name in ("zz last.png", "!first.png"):
        (folder / read_keepers(index)[0].path).rename(folder / name)
        build_index(tiny_runs["self"], folder, index)
        assert keeper_of_bytes(index) == (name, "chosen by hand")
        assert other in {image.path for image in duplicate_report(index, ANY, show_progress=False).not_kept()}
    (folder / other).rename(folder / chosen)
    build_index(tiny_runs["self"], folder, index)
    assert keeper_of_bytes(index) == ("!first.png", "chosen by hand")
    assert [keeper.path for keeper in read_keepers(index)] == ["!first.png"]


def test_of_equal_files_the_one_that_was_moved_is_kept_where_the_update_takes_it_for_another(index, folder, tiny_runs):
    """Of two that are gone the database's first counts as moved: the choice follows the file that is there."""
    shutil.copy(folder / "0.png", folder / "zz third.png")
    build_index(tiny_runs["self"], folder, index)
    assert main(["duplicates", str(index), "--keep", "copies/0 again.png"]) == 0
    (folder / "0.png").unlink()
    (folder / "copies" / "0 again.png").rename(folder / "zzz moved.png")
    build_index(tiny_runs["self"], folder, index)
    assert keeper_of_bytes(index) == ("zzz moved.png", "chosen by hand")
    # The chosen file is gone: its bytes are kept all the same.
    (folder / "zzz moved.png").unlink()
    shutil.copy(folder / "zz third.png", folder / "fourth.png")
    build_index(tiny_runs["self"], folder, index)
    assert keeper_of_bytes(index)[1] == "chosen by hand"


def test_files_that_change_places_take_their_decisions_with_them(index, folder, tiny_runs):
    """And a path of a decision is the image that is there now, where something was decided on it."""
    assert main(["duplicates", str(index), "--keep", "0.png", "1.png"]) == 0
    before = {keeper.path: keeper.hash for keeper in read_keepers(index)}
    for old, new in (("0.png", "aside"), ("1.png", "0.png"), ("aside", "1.png")):
        (folder / old).rename(folder / new)
    build_index(tiny_runs["self"], folder, index, verify=True)
    build_index(tiny_runs["self"], folder, index, verify=True)
    assert keeper_of_bytes(index)[1] == "chosen by hand"
    # Files of other contents under the same names are encoded again: each decision stays with its content.
    assert {keeper.hash for keeper in read_keepers(index)} == set(before.values())
    assert main(["duplicates", str(index), "--forget", "1.png"]) == 0
    assert [keeper.hash for keeper in read_keepers(index)] == [before["1.png"]]


def test_decisions_that_cannot_be_read_are_no_reason_to_refuse_an_update(index, folder, tiny_runs, caplog):
    (index / "not_duplicates.json").write_text("{")
    (folder / "2.png").rename(folder / "moved.png")
    with caplog.at_level("INFO"):
        assert build_index(tiny_runs["self"], folder, index).moved == 1
    assert any("paths of decisions on duplicates stay as they are" in line for line in caplog.messages)
    assert (index / "not_duplicates.json").read_text() == "{"


def test_a_decision_on_one_pair_of_three_leaves_the_others(index):
    assert main(["duplicates", str(index), "--not", "copies/1.jpg", "copies/1 small.png"]) == 0
    nearly = [set(paths) for kind, paths in groups_of(index) if kind == "nearly" and "1.png" in paths]
    assert nearly in ([{"1.png", "copies/1.jpg"}], [{"1.png", "copies/1 small.png"}])
    assert duplicate_report(index, ANY, show_progress=False).pairs["between_groups"] == 1


def test_the_commands_output(index, folder, capsys):
    assert main(["duplicates", str(index), "--near", str(ANY), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == 1
    assert {group["kind"] for group in report["groups"]} == {"bytes", "nearly"}
    for group in report["groups"]:
        assert [image["keep"] for image in group["images"]] == [True] + [False] * (len(group["images"]) - 1)
        assert group["keep"] == group["images"][0]["id"]
        assert group["reason"]
    assert main(["duplicates", str(index), "--near", str(ANY)]) == 0
    text = capsys.readouterr().out
    assert "1 group of the same bytes, 2 groups of nearly the same, of 13 images" in text
    assert "4 images" in text
    assert main(["duplicates", str(index), "--near", str(ANY), "--paths", "--null"]) == 0
    paths = [Path(each) for each in capsys.readouterr().out.split("\0")[:-1]]
    assert len(paths) == 4
    assert all(path.is_file() for path in paths)
    kept = {image["path"] for group in report["groups"] for image in group["images"] if image["keep"]}
    assert not kept & {path.relative_to(folder).as_posix() for path in paths}


def test_an_index_that_cannot_be_written_is_read_all_the_same(index, caplog):
    (index / "duplicates").write_text("in the way")
    assert groups_of(index) == {BYTES, *NEARLY}


def test_a_damaged_cache_is_computed_again(index):
    assert groups_of(index) == {BYTES, *NEARLY}
    for file in (index / "duplicates").iterdir():
        file.write_bytes(b"damaged" + file.read_bytes()[:50])
    assert groups_of(index) == {BYTES, *NEARLY}
    assert duplicate_report(index, ANY, show_progress=False).decoded == 0


def test_equal_files_are_no_matter_of_a_decision(index):
    with pytest.raises(ValueError, match="the same bytes"):
        add_decisions(index, [("a", "x.png"), ("a", "y.png")])
    assert not (index / "not_duplicates.json").exists()


@pytest.mark.parametrize(
    "given",
    [
        "--near 0", "--near 1.5", "--near x", "--null", "--paths --scenes", "--not 0.png", "--not 0.png nothing.png",
        "--not 0.png 99999", "--not 0.png copies/0\\ again.png", "--forget 0.png 1.png", "--forget nothing.png",
        "--decisions --paths", "--not 0.png 1.png --forget 0.png", "--json --paths", "--keep nothing.png", "--keep 0.png --paths",
        "--keep 0.png --not 0.png 1.png",
    ],
)  # fmt: skip
def test_a_refused_call_names_what_is_wrong_and_changes_nothing(index, folder, capsys, given):
    import shlex

    before = {path: path.read_bytes() for root in (index, folder) for path in root.rglob("*") if path.is_file()}
    try:
        status = main(["duplicates", str(index), *shlex.split(given)])
    except SystemExit as left:
        status = left.code
    assert status in (1, 2)
    assert "error: " in capsys.readouterr().err
    now = {path: path.read_bytes() for root in (index, folder) for path in root.rglob("*") if path.is_file()}
    assert now == before


def test_decisions_that_cannot_be_read_are_an_error_that_names_the_file(index, capsys):
    (index / "not_duplicates.json").write_text('{"format": 1}')
    assert main(["duplicates", str(index)]) == 1
    assert "not_duplicates.json: cannot be read" in capsys.readouterr().err


def test_the_former_function_gives_its_former_result_and_warns(index):
    from clipvisionalign.search.duplicates import find_duplicates
    from clipvisionalign.search.searcher import Searcher

    with pytest.warns(DeprecationWarning, match="duplicate_report"):
        groups = find_duplicates(Searcher(index), near=2.0)
    assert [sorted(row["path"] for row in group) for group in groups] == [sorted(BYTES[1])]
