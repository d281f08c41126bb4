"""A sealed study: the plan is hashed before the first training, and every look at its split is written down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.sealed_split import (
    BY_HAND,
    BY_STUDY,
    further_looks,
    image_hashes,
    read_looks,
    record_look,
    record_look_by_hand,
)
from clipvisionalign.study.config import Measurements, Plan, Variant
from clipvisionalign.study.plan_file import plan_text
from clipvisionalign.study.runner import run_study
from clipvisionalign.study.seal import plan_hash
from clipvisionalign.study.verify import verify_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sealed_plan(plan: Plan, scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two cells of one epoch, on the test split of a data set of its own."""
    data = shutil.copytree(scenes_folder, tmp_path_factory.mktemp("sealed-data") / "data")
    return replace(
        plan, data=str(data), split="test", seeds=[0, 1], variants={"self": Variant()}, settings={**plan.settings, "epochs": 1},
        measure=Measurements(rounds=0, brief=True, composition=0, audit_images=12, examples=0, protocol=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def sealed(sealed_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "study"
    run_study(sealed_plan, folder, sealed=True)
    return folder


@pytest.fixture
def copy(sealed: Path) -> Path:
    """Beside it: a plan's cells are named by their paths."""
    kept = sealed.with_name("kept")
    shutil.copytree(sealed, kept)
    yield sealed
    shutil.rmtree(sealed)
    kept.rename(sealed)


def seal_lines(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / "looks.jsonl").read_text().splitlines()]


def failures(study: Path) -> list[str]:
    return [f"{part.part}: {part.detail}" for part in verify_report(study) if part.state == "fails"]


def test_each_run_is_looked_at_once_after_the_seal_and_a_repeated_command_looks_no_more(copy, sealed_plan):
    report = json.loads((copy / "report.json").read_text())
    seal = json.loads((copy / "seal.json").read_text())
    assert seal["plan"] == plan_hash(sealed_plan) == report["seal"]["plan"]
    assert [(entry["by"], entry["run"]) for entry in seal_lines(copy)] == [(BY_STUDY, "self-0"), (BY_STUDY, "self-1")]
    assert report["seal"]["further"] == []
    assert len(report["seal"]["looks"]) == 2
    assert all(entry["at"] >= seal["at"] for entry in seal_lines(copy))
    runs = (copy / "cells").glob("*/config.yaml")
    assert all((copy / "seal.json").stat().st_mtime_ns <= path.stat().st_mtime_ns for path in runs)
    [claim] = [claim["text"] for claim in report["claims"] if "sealed" in claim["text"]]
    assert seal["plan"] in claim
    assert "once for each of 2 runs" in claim
    before = (copy / "looks.jsonl").read_bytes()
    # Without --sealed too: a study that is sealed stays so.
    run_study(sealed_plan, copy)
    assert (copy / "looks.jsonl").read_bytes() == before
    assert failures(copy) == []


@pytest.mark.parametrize("command", ["evaluate", "audit", "encode"])
def test_a_look_by_hand_is_counted_and_in_the_report(copy, command, tmp_path, capsys):
    more = ["--out", str(tmp_path / "v.parquet")] if command == "encode" else []
    main([command, str(copy / "cells/self-0"), *more])
    assert len(seal_lines(copy)) == 2, "dev is not sealed"
    main([command, str(copy / "cells/self-0"), "--split", "test", *(more and [*more, "--overwrite"])])
    assert "further look 1 at it" in capsys.readouterr().err
    assert [(entry["by"], entry["run"]) for entry in seal_lines(copy)[2:]] == [(BY_HAND, "self-0")]
    assert any(line.startswith("seal") for line in failures(copy)), "the report does not have it yet"
    assert main(["report", str(copy)]) == 0
    assert "1 further look at it, after which figures may have been chosen: of `self-0`" in capsys.readouterr().out
    assert failures(copy) == []


def test_some_of_the_sealed_images_in_another_data_set_are_a_look(copy, scenes_folder, tmp_path):
    rows = read_captioned_images(scenes_folder).split("test").rows[:20]
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    lines = ["file_name,caption,split"]
    for number, row in enumerate(rows):
        shutil.copy(row.image, other / "images" / f"{number}.png")
        lines += [f'images/{number}.png,"{caption}",dev' for caption in row.captions]
    (other / "metadata.csv").write_text("\n".join(lines))
    assert len(rows) > 4
    main(["evaluate", str(copy / "cells/self-1"), "--data", str(other)])
    assert [entry["run"] for entry in seal_lines(copy)] == ["self-0", "self-1", "self-1"]


def test_another_model_of_a_run_is_a_further_look_and_an_interrupted_one_is_not(copy, sealed_plan):
    def measured_again() -> dict[str, Any]:
        (copy / "cells" / "self-1" / "measured.json").unlink()
        return run_study(sealed_plan, copy)["seal"]

    interrupted = measured_again()
    assert (len(interrupted["looks"]), interrupted["further"]) == (3, [])
    path = copy / "cells" / "self-1" / "model.safetensors"
    weights = load_file(path)
    next(each for each in weights.values() if each.is_floating_point()).add_(1e-3)
    save_file(weights, path)
    assert [entry["run"] for entry in measured_again()["further"]] == ["self-1"]


def test_a_run_is_recognised_by_any_path_and_images_by_their_content(copy, scenes_folder, tmp_path, monkeypatch):
    cell = copy / "cells" / "self-0"
    (tmp_path / "link").symlink_to(cell)
    (cell / "stages" / "1").mkdir(parents=True)
    test = read_captioned_images(scenes_folder).split("test")
    in_memory = CaptionedImages([replace(row, image=row.image.read_bytes()) for row in test.rows])
    monkeypatch.chdir(cell / "stages")
    for count, run in enumerate((tmp_path / "link", cell / "stages" / "1", Path(".."), cell), 1):
        assert f"further look {count} at it" in record_look_by_hand(run, in_memory if count % 2 else test)
    assert record_look_by_hand(copy, test) == record_look_by_hand(tmp_path, test) == ""
    assert len(read_looks(copy)) == 6


def test_another_plan_other_data_and_a_study_that_was_begun_are_refused(copy, sealed_plan):
    looks = (copy / "looks.jsonl").read_bytes()
    for other in (replace(sealed_plan, seeds=[0, 1, 2]), replace(sealed_plan, title="Another")):
        with pytest.raises(ValueError, match=r"its plan was sealed at .* and this one is another"):
            run_study(other, copy)
    table = Path(sealed_plan.data) / "metadata.csv"
    text = table.read_text()
    lines = text.splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if line.rstrip().endswith("test"))
    table.write_text("".join([*lines[:last], *lines[last + 1 :]]))
    with pytest.raises(DataError, match="other images or captions than were sealed"):
        run_study(sealed_plan, copy)
    assert any("other images or captions" in line for line in failures(copy))
    table.write_text(text)
    assert (copy / "looks.jsonl").read_bytes() == looks
    (copy / "seal.json").unlink()
    with pytest.raises(ValueError, match="has trainings already"):
        run_study(sealed_plan, copy, sealed=True)


def test_dev_cannot_be_sealed(sealed_plan, tmp_path, capsys):
    with pytest.raises(ValueError, match="'dev' is looked at in each training"):
        run_study(replace(sealed_plan, split="dev"), tmp_path / "a", sealed=True)
    (tmp_path / "plan.yaml").write_text(plan_text(sealed_plan))
    assert main(["study", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "b"), "--sealed", "--split", "dev"]) == 1
    assert "seal 'test'" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


HOLDER = "import sys, time; from pathlib import Path; from clipvisionalign.files import run_lock\n" + (
    "with run_lock(Path(sys.argv[1]), 'trains'):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_the_split_stays_closed_while_a_training_is_not_finished(copy, sealed_plan, tmp_path):
    cell = copy / "cells" / "self-1"
    (cell / "results.json").unlink()
    (copy / "cells" / "self-0" / "measured.json").unlink()
    looks = (copy / "looks.jsonl").read_bytes()
    with subprocess.Popen([sys.executable, "-c", HOLDER, cell / "lock"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="stays closed until all is trained: self-1"):
            run_study(sealed_plan, copy)
        holder.kill()
    assert (copy / "looks.jsonl").read_bytes() == looks


@pytest.mark.parametrize("line", [0, 1])
def test_a_look_that_is_removed_or_changed_is_found(copy, line):
    lines = (copy / "looks.jsonl").read_text().splitlines(keepends=True)
    (copy / "looks.jsonl").write_text("".join(lines[:line] + lines[line + 1 :]))
    assert any(text.startswith("seal") for text in failures(copy)), failures(copy)
    changed = lines[line].replace("self-", "late-")
    (copy / "looks.jsonl").write_text("".join([*lines[:line], changed, *lines[line + 1 :]]))
    assert any(text.startswith("seal") for text in failures(copy))


def test_a_seal_that_is_changed_is_found(copy):
    seal = json.loads((copy / "seal.json").read_text())
    (copy / "seal.json").write_text(json.dumps(seal | {"at": "2020-01-01T00:00:00+00:00"}))
    assert any("changed or removed" in text for text in failures(copy))
    (copy / "seal.json").unlink()
    assert any("seal.json" in text for text in failures(copy))


def test_a_line_that_was_cut_off_is_no_look(copy):
    looks = read_looks(copy)
    with (copy / "looks.jsonl").open("a") as file:
        file.write('{"at": "2026')
    assert read_looks(copy) == looks
    assert record_look(copy, "self-1", BY_STUDY, "another model") == 1
    assert read_looks(copy)[:2] == looks
    assert further_looks(read_looks(copy)) == read_looks(copy)[2:]


def test_looks_of_many_processes_are_all_counted(copy):
    code = f"from pathlib import Path; from clipvisionalign.data.sealed_split import record_look\nfor _ in range(5): record_look(Path({str(copy)!r}), 'self-0', 'command', '')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(read_looks(copy)) == 22


def test_the_images_are_recognised_in_any_order(scenes_folder):
    test = read_captioned_images(scenes_folder).split("test")
    assert sorted(image_hashes(test)) == sorted(image_hashes(CaptionedImages(test.rows[::-1])))
