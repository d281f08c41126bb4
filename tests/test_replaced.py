"""A run folder loses nothing before the run that takes its place has got past every refusal."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from clipvisionalign.data.captioned import DataError
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.run_folder import RUN_FILES
from clipvisionalign.training.train import resume, train

#: Settings that are refused, some of them only once the data is open and the towers are there.
REFUSED = {
    "batch norms in chunks": ({"chunk": 8, "freeze": "none"}, "would be those of a chunk"),
    "no such layer": ({"freeze_layers": ["txet*"]}, "no parameter has such a name"),
    "nothing to train": ({"freeze_layers": ["*"]}, "nothing is left to be trained"),
    "a revision of a folder": ({"revision": "v1"}, "has no revisions"),
    "no data": ({"data": "nowhere"}, "nowhere"),
    "no run to start from": ({"init": "nowhere"}, "not a run folder"),
    "the folder itself to start from": ({"init": "run"}, "--init run lies in --out"),
    "data in the folder": ({"data": "run/data"}, "--data run/data lies in --out"),
    "shards in the folder": ({"dev_data": "run/data/dev-{0..3}.tar"}, "--dev_data .* lies in --out"),
    "features in the folder": ({"cache": "run/data"}, "--cache run/data lies in --out"),
}


@pytest.fixture
def config(tmp_path, scenes_folder, tiny_model, monkeypatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    Path("run/data").mkdir(parents=True)
    Path("run/config.yaml").write_text("out: run\n")
    Path("run/model.safetensors").write_text("weeks of work")
    Path("run/data/notes.txt").write_text("mine")
    return RunConfig(
        data=str(scenes_folder), out="run", model=tiny_model(), epochs=1, batch=16, train_images=32, augment="none",
        precision="float32", cache="cache", trackers="", workers=0, overwrite=True,
    )  # fmt: skip


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REFUSED)
def test_the_former_run_is_there_whole_after_a_refusal(name, config):
    more, message = REFUSED[name]
    before = contents("run")
    more = dict(more)
    if revision := more.pop("revision", ""):
        more["model"] = replace(config.model, text_tower=replace(config.model.text_tower, revision=revision))
    with pytest.raises((ValueError, OSError), match=message):
        train(replace(config, **more), lambda line: None)
    assert contents("run") == before


def test_a_run_takes_the_place_of_another_and_a_chunk_that_is_the_batch_is_none(config):
    said: list[str] = []
    train(replace(config, chunk=16, freeze="none"), said.append)
    assert "no effect of --chunk: a step is 16 images, one chunk" in said
    assert not Path("run/data").exists()
    one = Path("run/model.safetensors").read_bytes()
    assert "chunk: 16" in Path("run/config.yaml").read_text()
    train(replace(config, out="other", freeze="none", overwrite=False), said.append)
    assert Path("other/model.safetensors").read_bytes() == one


def test_what_a_run_does_not_write_stays_in_a_folder_that_is_resumed(config):
    """Whether its data is there or not: a folder with a config.yaml may be more than a run's."""
    Path("run/model.safetensors").unlink()
    Path("run/metrics.jsonl").write_text("cut off")
    own = contents("run/data")
    Path("run/config.yaml").write_text(yaml.safe_dump(asdict(replace(config, data="nowhere"))))
    before = contents("run")
    with pytest.raises((DataError, OSError)):
        resume("run", lambda line: None)
    assert contents("run") == before
    Path("run/config.yaml").write_text(yaml.safe_dump(asdict(config)))
    resume("run", lambda line: None)
    assert contents("run/data") == own
    # What the run writes is its own from the first line on, and all of it is known by name.
    assert Path("run/metrics.jsonl").read_text().startswith('{"step": 1,')
    assert {path.name for path in Path("run").iterdir()} <= {*RUN_FILES, "config.yaml", "data"}
