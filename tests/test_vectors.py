"""Vectors in files: what a run's give is what the run gives, and what anyone's give is what they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.retrieval.vector_files import read_gallery
from clipvisionalign.retrieval.vectors import audit_vectors, evaluate_vectors

WAYS = ("image_to_text", "text_to_image")


def figures(capsys, *arguments: str, status: int = 0) -> dict:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("ending", ["parquet", "npy"])
@pytest.mark.parametrize("identity", ["auto", "caption"])
def test_encoded_vectors_give_the_runs_figures_one_by_one(tiny_runs, tmp_path, capsys, ending, identity):
    run, out = str(tiny_runs["self"]), tmp_path / f"vectors.{ending}"
    own = figures(capsys, "evaluate", run, "--identity", identity)
    output = figures(capsys, "encode", run, "--identity", identity, "--out", str(out))
    assert (output["images"], output["captions"], output["distractors"]) == (15, 75, 0)
    files = output["files"] if ending == "parquet" else [*output["files"][:2], "--partners", output["files"][2]]
    assert [Path(file).name for file in output["files"]] == {
        "parquet": ["vectors.parquet"], "npy": ["vectors-images.npy", "vectors-captions.npy", "vectors-partners.json"],
    }[ending]  # fmt: skip
    evaluation = figures(capsys, "evaluate", "--identity", identity, "--vectors", *files)
    same = ("images", "captions", *WAYS, "rsum", "chance", "equal_captions")
    assert {name: evaluation[name] for name in same} == {name: own[name] for name in same}
    assert evaluation["audit"]["passed"]
    # Nothing is replaced without being asked.
    before = {file: Path(file).read_bytes() for file in output["files"]}
    assert main(["encode", run, "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert {file: Path(file).read_bytes() for file in output["files"]} == before
    figures(capsys, "encode", run, own["data"], "--out", str(out), "--split", "test", "--overwrite")
    assert {file: Path(file).read_bytes() for file in output["files"]} != before


def test_distractors_of_a_run_stand_behind_its_images(tiny_runs, scenes_folder, tmp_path, capsys):
    out = str(tmp_path / "vectors.parquet")
    (tmp_path / "more").mkdir()
    for number, path in enumerate(sorted((scenes_folder / "images").iterdir())[:7]):
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes() if number else b"none")
    output = figures(capsys, "encode", str(tiny_runs["self"]), "--out", out, "--distractors", str(tmp_path / "more"))
    assert (output["images"], output["distractors"]) == (15, 6)
    evaluation = figures(capsys, "evaluate", "--vectors", out)
    assert (evaluation["images"], evaluation["distractors"], evaluation["captions"]) == (15, 6, 75)
    assert main(["evaluate", "--vectors", out]) == 0
    assert "6 more without captions" in " ".join(capsys.readouterr().out.split())


def made(seed: int = 0, images: int = 30, more: int = 25, captions: int = 70, width: int = 12):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((images + more, width)).astype(np.float32)
    owner = np.concatenate([np.arange(images), rng.integers(images, size=captions - images)])
    texts = vectors[owner] + 1.5 * rng.standard_normal((captions, width)).astype(np.float32)
    return vectors, texts, owner


def write(folder: Path, images: np.ndarray, captions: np.ndarray, owner) -> tuple[list[str], str]:
    np.save(folder / "i.npy", images)
    np.save(folder / "c.npy", captions)
    (folder / "p.json").write_text(json.dumps(np.asarray(owner).tolist()))
    return [str(folder / "i.npy"), str(folder / "c.npy")], str(folder / "p.json")


def by_force(images: np.ndarray, captions: np.ndarray, owner: np.ndarray, k: int) -> tuple[float, float]:
    """Recalls at k of both ways, over images that have captions, and over all captions in the whole gallery."""
    scores = images.astype(np.float64) @ captions.T.astype(np.float64)
    asked = sorted(set(owner.tolist()))
    i2t = [any(owner[c] == i for c in np.argsort(-scores[i])[:k]) for i in asked]
    t2i = [owner[c] in np.argsort(-scores[:, c])[:k] for c in range(len(captions))]
    return float(np.mean(i2t)), float(np.mean(t2i))


@pytest.mark.parametrize("seed", range(3))
def test_distractors_lower_recall_as_much_as_counting_says(tmp_path, seed):
    images, captions, owner = made(seed)
    files, partners = write(tmp_path, images[:30], captions, owner)
    np.save(tmp_path / "d.npy", images[30:])
    without = evaluate_vectors(read_gallery(files, partners)).metrics
    with_them = evaluate_vectors(read_gallery(files, partners, tmp_path / "d.npy")).metrics
    for metrics, gallery in ((without, images[:30]), (with_them, images)):
        for k in (1, 5, 10):
            own = tuple(getattr(metrics, way)[f"recall_at_{k}"].value for way in WAYS)
            assert own == pytest.approx(by_force(gallery, captions, owner, k))
    assert without.image_to_text == with_them.image_to_text
    assert with_them.text_to_image["recall_at_1"].value < without.text_to_image["recall_at_1"].value
    assert with_them.chance["text_to_image"]["recall_at_1"] == pytest.approx(1 / 55)
    assert (with_them.images, with_them.ranks.distractors) == (30, 25)
    # The same where rows without captions stand among the others.
    order = np.random.default_rng(seed).permutation(len(images))
    files, partners = write(tmp_path, images[order], captions, np.argsort(order)[owner])
    mixed = evaluate_vectors(read_gallery(files, partners)).metrics
    assert [getattr(mixed, way)["mean_rank"].value for way in WAYS] == [
        getattr(with_them, way)["mean_rank"].value for way in WAYS
    ]


def test_partners_and_vectors_come_in_every_form(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    images, captions, owner = made()
    files, partners = write(tmp_path, images, captions, owner)
    expected = evaluate_vectors(read_gallery(files, partners)).metrics.to_dict()
    np.save(tmp_path / "p.npy", owner)
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption", "image"], *(("words, more", number) for number in owner)])
    (tmp_path / "bare.csv").write_text("".join(f"{number}\n" for number in owner))
    for name in ("p.npy", "p.csv", "bare.csv"):
        assert evaluate_vectors(read_gallery(files, tmp_path / name)).metrics.to_dict() == expected
    for number, kind in enumerate((arrow.list_(arrow.float32()), arrow.large_list(arrow.float64()), None)):
        for name, vectors, more in (("i", images, {}), ("c", captions, {"image": owner})):
            lists = arrow.array(vectors.tolist(), kind or arrow.list_(arrow.float32(), 12))
            parquet.write_table(
                arrow.table({"vector": lists, **more}), tmp_path / f"{name}{number}.parquet", row_group_size=9
            )
        both = [tmp_path / f"i{number}.parquet", tmp_path / f"c{number}.parquet"]
        metrics = evaluate_vectors(read_gallery(both)).metrics.to_dict()
        assert {way: metrics[way] for way in WAYS} == {way: expected[way] for way in WAYS}
    # Half precision ties where float32 does not.
    np.save(tmp_path / "i.npy", images.astype(np.float16))
    assert read_gallery(files, partners).images.dtype_name == "float16"
    evaluate_vectors(read_gallery(files, partners))


def test_identities_are_partners(tmp_path):
    images, captions, owner = made(more=0)
    files, _ = write(tmp_path, images, captions, owner)
    (tmp_path / "p.json").write_text(json.dumps({"image": owner.tolist(), "identity": [n // 2 for n in range(30)]}))
    gallery = read_gallery(files, tmp_path / "p.json")
    together, alone = (evaluate_vectors(gallery, how).metrics.rsum.value for how in ("auto", "none"))
    assert together > alone
    with pytest.raises(DataError, match="compares captions' texts, and none are given"):
        evaluate_vectors(gallery, "caption")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, c, p: (i, c[:-1], p), r"69 caption vectors, and partners of 70"),
        (lambda i, c, p: (i, c, [*p[:-1], 99]), r"caption 69 is of image 99, and there are 55 image vectors"),
        (lambda i, c, p: (i, c, [*p[:-1], -1]), r"caption 69 is of image -1"),
        (lambda i, c, p: (i, c, [*p[:-1], 0.5]), r"caption 69 is of image 0.5, which is no whole number"),
        (lambda i, c, p: (i, c, [*p[:-1], None]), r"caption 69 is of image None, which is no whole number"),
        (lambda i, c, p: (i, c, {"a": 1}), r"should be a list of numbers"),
        (lambda i, c, p: (i[:, :5], c, p), r"image vectors are 5 wide, caption vectors 12"),
        (lambda i, c, p: (i * np.nan, c, p), r"i.npy: some image vectors are not finite numbers, number 0 is the first"),
        (lambda i, c, p: (i, c.astype(int), p), r"c.npy: caption vectors should be floating-point"),
        (lambda i, c, p: (i[0], c, p), r"i.npy: image vectors should be floating-point \(number, width\)"),
        (lambda i, c, p: (np.array([{}]), c, p), r"i.npy: not an array of numbers"),
        (lambda i, c, p: (i[:0], c, p), r"i.npy: no image vectors in it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(tmp_path, capsys, change, message):
    images, captions, owner = made()
    images, captions, owner = change(images, captions, owner.tolist())
    np.save(tmp_path / "i.npy", images, allow_pickle=True)
    np.save(tmp_path / "c.npy", captions)
    (tmp_path / "p.json").write_text(json.dumps(owner))
    files, partners = [str(tmp_path / "i.npy"), str(tmp_path / "c.npy")], str(tmp_path / "p.json")
    with pytest.raises(DataError, match=message):
        read_gallery(files, partners)
    assert main(["evaluate", "--vectors", *files, "--partners", partners]) == 1
    assert "error: " in capsys.readouterr().err


def test_files_that_say_too_little_are_told(tmp_path, capsys):
    images, captions, owner = made()
    files, partners = write(tmp_path, images, captions, owner)
    (tmp_path / "half.parquet").write_bytes(b"PAR1 half of one")
    (tmp_path / "p.txt").write_text("0\n1\n")
    for arguments, message in (
        ((files, ""), "no image for each caption: give it with --partners"),
        ((files, str(tmp_path / "none.json")), "none.json: no such file"),
        ((files, str(tmp_path / "p.txt")), "partners are read from .json, .csv and .npy"),
        (([*files, "x"], partners), "not 3 files"),
        (([str(tmp_path / "half.parquet")], partners), "not a whole Parquet file"),
        (([partners, files[1]], partners), "vectors are read from .npy and .parquet"),
    ):
        with pytest.raises(DataError, match=message):
            read_gallery(*arguments)
    for arguments in (
        ["run", "--vectors", *files],
        ["--vectors", *files, "--data", "d"],
        [],
        ["run", "--partners", "p"],
    ):
        assert main(["evaluate", *arguments]) == 1
    assert "give a run, or --vectors" in capsys.readouterr().err


def checks(tmp_path: Path, images: np.ndarray, captions: np.ndarray, owner, **partners) -> dict[str, bool]:
    files, _ = write(tmp_path, images, captions, owner)
    (tmp_path / "p.json").write_text(json.dumps({"image": np.asarray(owner).tolist(), **partners}))
    return {check.name: check.passed for check in audit_vectors(read_gallery(files, tmp_path / "p.json")).checks}


def test_vectors_tell_of_themselves(tmp_path):
    images, captions, owner = made()
    assert all(checks(tmp_path, images, captions, owner).values())
    failed = {
        "image vectors apart": (np.ones_like(images), captions),
        "caption vectors apart": (images, np.ones_like(captions)),
        "captions without their images": (images, np.concatenate([images[owner[:9]], captions[9:]])),
        "caption vectors' lengths": (images, np.concatenate([captions[:-1], 0 * captions[-1:]])),
    }
    for name, (left, right) in failed.items():
        results = checks(tmp_path, left, right, owner)
        assert [check for check, passed in results.items() if not passed] == [name]
    # The same up to the last digits is the same.
    noisy = np.ones_like(images) + np.float32(1e-7) * np.sign(images)
    assert not checks(tmp_path, noisy, captions, owner)["image vectors apart"]
    # Captions of one text that differ by their image.
    texts = [f"class {number % 5}" for number in range(70)]
    assert not checks(tmp_path, images, captions, owner, caption=texts)["equal captions alike"]
    alike = captions[:5][np.arange(70) % 5]
    results = checks(tmp_path, images, alike, owner, caption=texts)
    assert results["equal captions alike"]
    assert results["caption vectors apart"]


# --- files as other programs write them -------------------------------------------------------------------------------


def as_parquet(path: Path, **columns) -> str:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("partners", "message"),
    [
        (np.int64(3), r"p.npy: partners should be a row of whole numbers"),
        (np.zeros((70, 1), int), r"p.npy: partners should be a row of whole numbers"),
        ([10**30] * 70, r"p.json: caption 0 is of image 10{30}, which is no number of an image"),
        ([1e30] * 70, r"p.json: caption 0 is of image 10+.*, which is no number of an image"),
        ([], r"70 caption vectors, and partners of 0"),
        ("image\n" + "9" * 30, r"p.csv: caption 0 is of image 9{30}, which is no number of an image"),
        ("image\n" + "9" * 5000, r"p.csv: cannot be read"),
        ("image,caption\nx,words", r"p.csv, line 2: no number of an image in it"),
        ("", r"p.csv: no column 'image'; its columns are: none"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), r"p.csv: no column 'image'"),
    ],
)  # fmt: skip
def test_partners_that_are_none_are_told(tmp_path, partners, message):
    images, captions, owner = made()
    files, _ = write(tmp_path, images, captions, owner)
    ending = "npy" if isinstance(partners, np.generic | np.ndarray) else "csv" if isinstance(partners, str) else "json"
    path = tmp_path / f"p.{ending}"
    if ending == "npy":
        np.save(path, partners)
    else:
        path.write_text(partners if ending == "csv" else json.dumps(partners))
    with pytest.raises(DataError, match=message):
        read_gallery(files, path)


def test_an_archive_of_arrays_is_no_array(tmp_path):
    images, captions, owner = made()
    files, partners = write(tmp_path, images, captions, owner)
    with (tmp_path / "z.npy").open("wb") as file:
        np.savez(file, images)
    archive = str(tmp_path / "z.npy")
    for arguments in ((files, archive), ([archive, files[1]], partners), ([files[0], archive], partners)):
        with pytest.raises(DataError, match=r"z.npy: not an array of numbers, but an archive of them"):
            read_gallery(*arguments)


def test_captions_of_partners_are_read_as_any_text_file_is(tmp_path):
    """However long, over several lines, with quotes that are never closed, in any encoding."""
    images, captions, owner = made()
    files, _ = write(tmp_path, images, captions, owner)
    texts = [f"caption {n}" for n in range(70)]
    texts[:4] = ["x" * 200_000, "one,\ntwo", 'a "word" in it', "caf\u00e9 \u2028 more"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        with (tmp_path / "p.csv").open("w", newline="", encoding=encoding) as file:
            csv.writer(file).writerows([["image", "caption"], *zip(owner, texts, strict=True)])
        assert read_gallery(files, tmp_path / "p.csv").texts == texts
    lines = ["image,caption", *(f'{number},"open {index}' for index, number in enumerate(owner))]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    gallery = read_gallery(files, tmp_path / "p.csv")
    assert (gallery.caption_image == owner).all()
    assert gallery.texts == [f'"open {index}' for index in range(70)]


@pytest.mark.parametrize("unknown", [None, float("nan"), "", "  "])
def test_unknown_identities_and_texts_are_equal_to_none(tmp_path, unknown):
    images, captions, owner = made(more=0)
    files, _ = write(tmp_path, images, captions, owner)
    for known in (None, "p", 7):
        identity = [known if number < 2 else unknown for number in range(30)]
        (tmp_path / "p.json").write_text(json.dumps({"image": owner.tolist(), "identity": identity}))
        read_identity = read_gallery(files, tmp_path / "p.json").identity
        assert (None if read_identity is None else len(set(read_identity))) == (None if known is None else 29)
    texts = [unknown if number in (3, 5) else "a dog" for number in range(70)]
    for some in (texts, [None] * 70):
        (tmp_path / "p.json").write_text(json.dumps({"image": owner.tolist(), "caption": some}))
        if some is texts and not isinstance(unknown, str):
            with pytest.raises(DataError, match=r"p.json: 2 of 70 captions have no text, such as caption 3"):
                read_gallery(files, tmp_path / "p.json")
        else:
            assert read_gallery(files, tmp_path / "p.json").texts == (texts if some is texts else None)


def test_rows_of_a_parquet_file_are_of_a_known_kind(tmp_path):
    images, captions, owner = made(more=0)
    vectors = [*images.tolist(), *captions.tolist()]
    of = [*([None] * 30), *owner.tolist()]
    for image, caption in (("image", "caption"), ("Image", "CAPTION "), (b"image", b"caption")):
        kinds = [image] * 30 + [caption] * 70
        if isinstance(image, bytes):
            kinds = [each.decode() for each in kinds]
        gallery = read_gallery([as_parquet(tmp_path / "v.parquet", kind=kinds, vector=vectors, image=of)])
        assert (len(gallery.images.values), len(gallery.captions.values)) == (30, 70)
    for odd in ("distractor", "", None, 0):
        kinds = [odd] * 100 if odd == 0 else ["image"] * 29 + [odd] + ["caption"] * 70
        with pytest.raises(DataError, match=r"v.parquet: \d+ of 100 rows are of an unknown kind"):
            read_gallery([as_parquet(tmp_path / "v.parquet", kind=kinds, vector=vectors, image=of)])


@pytest.mark.parametrize("vectors", [[[]] * 9, [[], [1.0]] * 9, [["a"]] * 9, [[[1.0]]] * 9, [1.0] * 9, [[True]] * 9])
def test_vectors_of_a_parquet_file_that_are_none_are_told(tmp_path, vectors):
    path = as_parquet(tmp_path / "v.parquet", vector=vectors)
    with pytest.raises(DataError, match=r"v.parquet: "):
        read_gallery([path, path], "")
