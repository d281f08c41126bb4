"""Pretrained dual encoders and runs by hub name: fetched over real HTTP, whole or one clear error, pinned, and offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Hub
from pretrained_models import CAPTIONS, FAMILIES, OPEN_CLIP, make_pretrained
from test_pretrained import drawn_images
from test_refused import contents
from test_weights_by_name import cache_files, one_line, point_to

from clipvisionalign.adaptation.start import start_of
from clipvisionalign.cli import main
from clipvisionalign.export.huggingface import export_huggingface
from clipvisionalign.log import log_to
from clipvisionalign.models import run_names
from clipvisionalign.models.hub import CorruptedDownload, DiskFull, WeightsNotFound
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.models.io import load_aligner, model_files, resolve_model
from clipvisionalign.models.pretrained import find_pretrained
from clipvisionalign.models.run_names import display_name, is_of_publisher, resolve_run
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig
from clipvisionalign.search.manifest import read_manifest

#: What repositories have for other programs.
OTHER_FILES = ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "training_args.json", "requirements.txt")


class Publisher:
    """Models on a hub, made and published when they are first asked for, with files of other programs beside them."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub, self.root = hub, root

    def folder(self, family: str) -> Path:
        """The model as its library saves it."""
        return self.root / family if (self.root / family).is_dir() else make_pretrained(family, self.root / family)

    def publish(self, family: str, name: str = "") -> str:
        """The repository's name, with files of other programs beside those of the model."""
        name = name or f"someone/{family}"
        if name not in self.hub.repositories:
            folder = self.root / "published" / name.replace("/", "-")
            shutil.copytree(self.folder(family), folder)
            for other in OTHER_FILES:
                (folder / other).write_bytes(b"for other programs")
            if not (folder / "pytorch_model.bin").exists():
                (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
            commit = self.hub.publish(name, folder, "mit")
            self.hub.repositories[name].commits[commit]["onnx/model.onnx"] = b"for other programs"
        return name

    def publish_folder(self, folder: Path, name: str = "someone/lacking") -> str:
        """A folder as it is, as the newest commit of a repository."""
        self.hub.publish(name, folder)
        return name


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory):
    with Hub() as hub:
        yield Publisher(hub, tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server as the hub, and a new cache."""
    from huggingface_hub import constants

    publisher.hub.forget()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(publisher.hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    return publisher.hub


def fetched_files(hub: Hub) -> list[str]:
    """The files that were asked for, in order."""
    return [request.split("?")[0].split()[1].rpartition("/")[2] for request in hub.requests if "resolve/" in request]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_by_name(family, hub, publisher, tmp_path, monkeypatch):
    """The vectors of the published folder; only what is needed comes; the commit is recorded, and needs no request."""
    name, folder = publisher.publish(family), publisher.folder(family)
    if family == "oc_hf":
        # Its config.json names the text model, whose settings the hub has elsewhere.
        hub.publish("google-bert/bert-base-uncased", folder / "hf_text_config")
        hub.moved["bert-base-uncased"] = "google-bert/bert-base-uncased"
    aligner, expected = load_aligner(name, "cpu"), load_aligner(folder, "cpu")
    captions, images = list(CAPTIONS), drawn_images(3)
    assert torch.equal(aligner.encode_captions(captions), expected.encode_captions(captions))
    assert torch.equal(aligner.encode_images(images), expected.encode_images(images))
    pinned = f"{name}@{hub.repositories[name].main}"
    assert aligner.config.pretrained == aligner.config.image_tower.name == pinned
    origin = aligner.image_tower.origin.to_dict()
    assert (origin["kind"], origin["repository"], origin["licence"]) == ("hub", name, "mit")
    weights = "open_clip_model.safetensors" if family in OPEN_CLIP else "model.safetensors"
    assert [file["file"] for file in origin["files"]] == [weights]
    assert not cache_files(tmp_path) & {*OTHER_FILES, "pytorch_model.bin", "model.onnx"}
    hub.requests.clear()
    Path("someone").mkdir()
    for again in (f"hf-hub:{pinned}", pinned):
        # Beside a folder of the owner's name only the prefix tells what is meant.
        assert load_aligner(again).config.pretrained == again
        shutil.rmtree("someone", ignore_errors=True)
    assert not hub.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(load_aligner(name).encode_captions(captions), aligner.encode_captions(captions))
    assert not hub.requests


@pytest.mark.slow
def test_commands_take_a_name_and_keep_its_commit(hub, publisher, scenes_folder, tmp_path, capsys):
    """evaluate, audit, index, search and train by the name; the branch moves on, and what was made stays with its commit."""
    name = publisher.publish("clip", "someone/commands")
    pinned = f"{name}@{hub.repositories[name].main}"
    assert main(["evaluate", name, "--data", str(scenes_folder), "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == name
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(drawn_images(4)):
        image.save(images / f"{number}.png")
    assert main(["index", name, str(images), "--out", "index"]) == 0
    assert read_manifest("index").run == pinned
    assert main(["train", str(scenes_folder), "--model.pretrained", name, "--out", "run", "--steps", "1", "--batch",
                 "4", "--workers", "0", "--precision", "float32", "--trackers", "", "--epochs", "1", "--train_images",
                 "8", "--cache", "off", "--device", "cpu"]) == 0  # fmt: skip
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["pretrained"] == pinned
    weights = json.loads(Path("run/weights.json").read_text())
    assert weights["image_tower"]["revision"] == weights["text_tower"]["revision"] == pinned.partition("@")[2]
    hub.publish(name, publisher.folder("siglip"))
    hub.requests.clear()
    capsys.readouterr()
    assert main(["search", "index", "a dog", "--offline"]) == 0
    assert "0.png" in capsys.readouterr().out
    assert not hub.requests
    # A run folder needs nothing else.
    shutil.rmtree(tmp_path / "cache")
    assert main(["evaluate", "run", "--split", "test", "--offline"]) == 0
    assert not hub.requests


def test_a_study_takes_one_commit_for_all_of_its_cells(hub, publisher, tmp_path):
    """Also if the branch moves between two of its calls; what stands in a finished cell's place is then no other run."""
    from dataclasses import asdict, replace

    from clipvisionalign.study.config import Plan, Variant, trials_of
    from clipvisionalign.study.tower_commits import pin_tower_commits
    from clipvisionalign.study.trial_checks import refuse_other_settings

    name = publisher.publish("clip", "someone/studied")
    pinned = f"{name}@{hub.repositories[name].main}"
    plan = Plan(data="x", seeds=[0, 1], variants={"self": Variant()}, settings={"model": {"pretrained": name}})
    asked = trials_of(plan, tmp_path)
    trials = pin_tower_commits(asked, tmp_path, lambda _: None)
    hub.publish(name, publisher.folder("siglip"))
    trials[0].folder.mkdir(parents=True)
    (trials[0].folder / "config.yaml").write_text(yaml.safe_dump(asdict(trials[0].config)))
    later = pin_tower_commits(asked, tmp_path, lambda _: None)
    assert {trial.config.model.pretrained for trial in [*trials, *later]} == {pinned}
    for trial in (trials[0], asked[0], later[0]):
        refuse_other_settings(trial)
    other = replace(later[0].config, model=replace(later[0].config.model, pretrained=f"{name}@{'0' * 40}"))
    with pytest.raises(FileExistsError):
        refuse_other_settings(replace(later[0], config=other))


@pytest.mark.parametrize("command", ["evaluate", "audit", "encode", "index", "explain", "export", "train"])
def test_help_names_pretrained_models(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "openai/clip-vit-base-patch32" in "".join(capsys.readouterr().out.split())


def test_size_is_told_before_the_weights_are_asked_for(hub, publisher):
    name = publisher.publish("clip")
    lines: list[tuple[str, list[str]]] = []
    with log_to(lambda line: lines.append((line, fetched_files(hub)))):
        find_pretrained(name)
    message, asked = lines[0]
    assert not asked
    assert message.startswith(f"{name}: fetching ")
    assert " MB, from " in message
    assert "licence mit" in message


def test_both_layouts_in_a_repository(hub, publisher, tmp_path):
    """transformers' files are taken, and not open_clip's weights; open_clip's where they alone are there."""
    both = tmp_path / "both"
    shutil.copytree(publisher.folder("clip"), both)
    shutil.copytree(publisher.folder("oc_vit"), both, dirs_exist_ok=True)
    name = publisher.publish_folder(both, "someone/both")
    assert load_aligner(name).text_tower.encoder.__class__.__module__.startswith("transformers")
    assert "open_clip_model.safetensors" not in cache_files(tmp_path)
    (both / "model.safetensors").unlink()
    publisher.publish_folder(both, name)
    aligner, expected = load_aligner(name), load_aligner(publisher.folder("oc_vit"))
    assert torch.equal(aligner.encode_captions(list(CAPTIONS)), expected.encode_captions(list(CAPTIONS)))
    aligner.save(tmp_path / "run")
    reopened = load_aligner(tmp_path / "run")
    assert torch.equal(reopened.encode_captions(list(CAPTIONS)), expected.encode_captions(list(CAPTIONS)))


def test_weights_in_parts_and_pickled_weights(hub, publisher, tmp_path):
    """Both as transformers saved them; of a pickle tensors alone are read."""
    import transformers

    folder, expected = publisher.folder("clip"), load_aligner(publisher.folder("clip"))
    for kind in ("parts", "pickled"):
        copy = tmp_path / kind
        shutil.copytree(folder, copy)
        (copy / "model.safetensors").unlink()
        model = transformers.CLIPModel.from_pretrained(folder)
        if kind == "parts":
            model.save_pretrained(copy, max_shard_size="200KB")
            assert len(list(copy.glob("model-*-of-*.safetensors"))) > 1
        else:
            torch.save(model.state_dict(), copy / "pytorch_model.bin")
        aligner = load_aligner(publisher.publish_folder(copy, f"someone/{kind}"))
        assert torch.equal(aligner.encode_captions(list(CAPTIONS)), expected.encode_captions(list(CAPTIONS)))


# --- one clear error each -------------------------------------------------------------------------------------------


def test_gated_absent_and_unknown_revisions(hub, publisher, monkeypatch):
    name = publisher.publish("clip")
    hub.repositories[name].gated = True
    with pytest.raises(WeightsNotFound, match=r"gated.*hf auth login") as error:
        load_aligner(name)
    one_line(error)
    hub.repositories[name].gated = False
    with pytest.raises(WeightsNotFound, match=r"no revision 'old'.*a branch, a tag or a commit") as error:
        load_aligner(f"{name}@old")
    one_line(error)
    with pytest.raises(WeightsNotFound, match=r"no folder 'openai/clip-vit-base-patch31' is here.*no such repository"
                       r".*openai/clip-vit-base-patch32") as error:  # fmt: skip
        load_aligner("openai/clip-vit-base-patch31")
    one_line(error)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    with pytest.raises(WeightsNotFound, match=r"runs/self: no such folder.*--offline.*path of a run folder") as error:
        load_aligner("runs/self")
    one_line(error)
    assert not hub.requests


def test_cut_connections(hub, publisher, tmp_path, monkeypatch):
    """One that is cut is resumed where it was cut; one that stays cut is one error, and leaves nothing."""
    name = publisher.publish("clip")
    weights = publisher.folder("clip") / "model.safetensors"
    monkeypatch.setattr("clipvisionalign.models.hub.download.CHUNK", 1000)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut["model.safetensors"] = [0] * 50
    with pytest.raises(WeightsNotFound, match=r"did not answer.*run this once where the hub can be reached") as error:
        load_aligner(name)
    one_line(error)
    assert "model.safetensors" not in cache_files(tmp_path)
    hub.cut["model.safetensors"] = [100_000, 50_000]
    hub.requests.clear()
    folder = find_pretrained(name)[0]
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert [request.split("bytes=")[1] for request in hub.requests if "bytes=" in request] == ["100000-", "150000-"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_another_content_is_not_kept(file, hub, publisher, tmp_path, monkeypatch):
    name = publisher.publish("clip")
    monkeypatch.setattr("time.sleep", lambda _: None)
    content = hub.repositories[name].commits[hub.repositories[name].main][file]
    hub.wrong[file] = content[:-1] + b"x"
    with pytest.raises(CorruptedDownload, match=file) as error:
        load_aligner(name)
    one_line(error)
    assert file not in cache_files(tmp_path)
    hub.wrong.clear()
    folder, pinned, _ = find_pretrained(name)
    # Broken later, in the cache.
    (folder / file).write_bytes(content[:100])
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CorruptedDownload, match=rf"{file}.*with a network") as error:
            load_aligner(pinned)
        one_line(error)
    assert (find_pretrained(pinned)[0] / file).read_bytes() == content


def test_a_full_disk_is_told_before(hub, publisher, monkeypatch):
    name = publisher.publish("clip")
    monkeypatch.setattr("clipvisionalign.models.hub.download.free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull, match=r"needs \d.*HF_HOME") as error:
        load_aligner(name)
    one_line(error)
    assert not fetched_files(hub)


@pytest.mark.parametrize(
    ("family", "lacking", "message"),
    [
        ("clip", ("model.safetensors",), "holds no weights"),
        ("clip", ("tokenizer.json", "vocab.json", "merges.txt"), "no tokenizer"),
        ("clip", ("preprocessor_config.json",), r"no preprocessor_config\.json.*add the publisher's"),
        ("clip", ("config.json",), r"neither config\.json nor open_clip_config\.json"),
        ("oc_vit", ("open_clip_model.safetensors",), "none of open_clip_model.safetensors"),
    ],
)
def test_what_a_repository_lacks_is_named_before_a_file_is_fetched(family, lacking, message, hub, publisher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(publisher.folder(family), copy, ignore=lambda _, names: set(lacking) & set(names))
    name = publisher.publish_folder(copy)
    with pytest.raises(WeightsNotFound, match=message) as error:
        load_aligner(name)
    assert name in one_line(error)
    assert not fetched_files(hub)


@pytest.mark.parametrize("kind", ["gpt2", "llava", "blip", "bert", "clip_text_model", "clip_vision_model"])
def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(kind, hub, publisher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(publisher.folder("clip"), copy)
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    name = publisher.publish_folder(copy, "someone/other")
    with pytest.raises(ValueError, match=f"{name}: '{kind}' .*known are CLIP") as error:
        load_aligner(name)
    one_line(error)
    assert "config.json" in fetched_files(hub)
    assert "model.safetensors" not in fetched_files(hub)


def test_a_dual_encoder_is_no_tower(hub, publisher):
    """By name as by folder, before its weights are fetched; with the setting that takes it."""
    clip, open_clip = publisher.publish("clip"), publisher.publish("oc_vit")
    folders = (str(publisher.folder("clip")), str(publisher.folder("oc_vit")))
    for name in (clip, f"hf-hub:{clip}", *folders):
        with pytest.raises(ValueError, match=r"is no image tower: open it whole, --model\.pretrained") as error:
            ImageTower(ImageTowerConfig(name))
        one_line(error)
    for name in (clip, *folders):
        with pytest.raises(ValueError, match=r"is no text tower: open it whole, --model\.pretrained") as error:
            TextTower(TextTowerConfig(name))
        one_line(error)
    with pytest.raises(WeightsNotFound, match=r"--model\.pretrained someone/oc_vit"):
        TextTower(TextTowerConfig(open_clip))
    assert "model.safetensors" not in fetched_files(hub)


# --- runs -----------------------------------------------------------------------------------------------------------


def asked(hub: Hub) -> int:
    """How often the hub was asked for a commit and its files."""
    return sum("/api/models/" in request for request in hub.requests)


@pytest.mark.parametrize("design", ["self", "late"])
def test_a_run_by_name(design, hub, publisher, tiny_runs, tmp_path, monkeypatch):
    """What `export --huggingface` writes opens by its name: the same vectors, its own files alone, pinned, and offline."""
    written = export_huggingface(tiny_runs[design], tmp_path / "written")
    for other in OTHER_FILES:
        (written / other).write_bytes(b"for other programs")
    (written / "text_tower" / "code.py").write_text("raise SystemExit")
    name = publisher.publish_folder(written, f"someone/run-{design}")
    pinned = f"{name}@{hub.repositories[name].main}"
    aligner, expected = load_aligner(name, "cpu"), load_aligner(tiny_runs[design], "cpu")
    captions = list(CAPTIONS)
    assert torch.equal(aligner.encode_captions(captions), expected.encode_captions(captions))
    assert torch.equal(aligner.encode_images(drawn_images(3)), expected.encode_images(drawn_images(3)))
    assert not cache_files(tmp_path) & {*OTHER_FILES, "code.py"}
    assert resolve_model(name) == display_name(resolve_run(name)) == pinned
    assert resolve_model(f"hf-hub:{name}") == f"hf-hub:{pinned}"
    (tmp_path / "link").symlink_to(resolve_run(name))
    assert is_of_publisher(tmp_path / "link")
    assert [file.name for file in model_files(name)] == ["model.safetensors"]
    # The branch moves on; a commit needs no request, and neither does anything offline.
    (written / "results.json").write_text("{}")
    publisher.publish_folder(written, name)
    assert resolve_model(name) == f"{name}@{hub.repositories[name].main}" != pinned
    hub.requests.clear()
    assert torch.equal(load_aligner(pinned).encode_captions(captions), aligner.encode_captions(captions))
    assert json.loads((Path(resolve_run(pinned)) / "results.json").read_text()) != {}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert json.loads((Path(resolve_run(name)) / "results.json").read_text()) == {}
    assert not hub.requests


def test_a_dual_encoder_by_name_is_asked_for_once_more_by_a_process(hub, publisher, monkeypatch):
    """Whether it is a run; another process that finds a run under its name opens that, also beside settings of others."""
    name = publisher.publish("clip", "someone/changes")
    for requests in (2, 1):
        hub.requests.clear()
        load_aligner(name)
        assert asked(hub) == requests
    expected = load_aligner(publisher.folder("clip"), "cpu").encode_captions(["a dog"])
    hub.requests.clear()
    assert torch.equal(load_aligner(f"{name}@{hub.repositories[name].main}").encode_captions(["a dog"]), expected)
    assert not hub.requests


@pytest.mark.parametrize("config", ["", "config.json"])
def test_a_repository_that_becomes_a_run_is_opened_as_one(config, hub, publisher, tiny_runs, tmp_path, monkeypatch):
    """Also beside another program's config.json, and where the system has left a file among the cached commits."""
    name = publisher.publish("clip", f"someone/becomes-{config}x")
    load_aligner(name)
    monkeypatch.setattr(run_names, "_NO_RUNS", set())
    written = export_huggingface(tiny_runs["self"], tmp_path / "written")
    shutil.copy(tiny_runs["self"] / "trained_on.npz", written)
    if config:
        (written / config).write_text("{}")
    publisher.publish_folder(written, name)
    next((tmp_path / "cache").glob("models--*/snapshots")).joinpath(".DS_Store").touch()
    expected = load_aligner(tiny_runs["self"], "cpu").encode_captions(["a dog"])
    assert torch.equal(load_aligner(name, "cpu").encode_captions(["a dog"]), expected)
    # By which images of its training are recognised.
    assert (Path(resolve_run(name)) / "trained_on.npz").is_file()


def test_a_run_that_the_hub_refuses_is_told_as_that(hub, publisher, tiny_runs, scenes_folder, tmp_path, capsys):
    name = publisher.publish_folder(export_huggingface(tiny_runs["self"], tmp_path / "written"), "someone/refused")
    hub.repositories[name].gated = True
    for arguments in (["evaluate", name, "--data", str(scenes_folder)], ["worth", name], ["export", name, "--onnx", "o"],
                      ["train", str(scenes_folder), "--init", name, "--out", "tuned"]):  # fmt: skip
        assert main(arguments) == 1
        assert "gated" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_run_started_from_is_found_by_its_name_where_the_cache_has_moved(hub, publisher, tiny_runs, tmp_path):
    name = publisher.publish_folder(export_huggingface(tiny_runs["self"], tmp_path / "written"), "someone/start")
    folder = Path(resolve_run(name))
    shutil.copytree(tiny_runs["self"], tmp_path / "tuned")
    config = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    (tmp_path / "tuned" / "config.yaml").write_text(yaml.safe_dump({**config, "init": str(folder)}))
    assert start_of(str(tmp_path / "tuned")) == str(folder)
    elsewhere = str(tmp_path / "former" / "/".join(folder.parts[-3:]))
    (tmp_path / "tuned" / "config.yaml").write_text(yaml.safe_dump({**config, "init": elsewhere}))
    assert start_of(str(tmp_path / "tuned")) == str(folder)


def test_runs_that_cannot_be_opened_by_name_are_one_line(hub, publisher, tiny_runs, tmp_path, monkeypatch):
    written = export_huggingface(tiny_runs["self"], tmp_path / "written")
    whole = publisher.publish_folder(written, "someone/whole")
    with pytest.raises(WeightsNotFound, match=r"no pretrained dual encoder.*--init someone/whole") as error:
        find_pretrained(whole)
    one_line(error)
    # A file whose content is another is not kept, and the next try is whole.
    monkeypatch.setattr("time.sleep", lambda _: None)
    content = hub.repositories[whole].commits[hub.repositories[whole].main]["text_tower/tokenizer.json"]
    hub.wrong["text_tower/tokenizer.json"] = b"x" + content[1:]
    with pytest.raises(CorruptedDownload, match=r"text_tower/tokenizer\.json") as error:
        load_aligner(whole)
    one_line(error)
    hub.wrong.clear()
    load_aligner(whole)
    (written / "text_tower").rename(tmp_path / "text_tower")
    with pytest.raises(WeightsNotFound, match=r"someone/towerless: has the weights.*no folder text_tower") as error:
        load_aligner(publisher.publish_folder(written, "someone/towerless"))
    one_line(error)
    (written / "model.safetensors").unlink()
    with pytest.raises(
        WeightsNotFound, match=r"someone/weightless: has the config\.yaml.*export RUN --huggingface"
    ) as error:
        load_aligner(publisher.publish_folder(written, "someone/weightless"))
    one_line(error)
    # What is not there is told as before.
    with pytest.raises(WeightsNotFound, match="no folder 'someone/nothing' is here, and as a name of the hub") as error:
        load_aligner("someone/nothing")
    one_line(error)
    with pytest.raises(WeightsNotFound, match="no revision 'old'"):
        load_aligner("someone/whole@old")


@pytest.mark.slow
def test_commands_take_a_run_by_name_and_keep_its_commit(
    hub, publisher, tiny_runs, scenes_folder, tmp_path, capsys, monkeypatch
):
    """evaluate, index, search with re-ranking and a training that starts from it; from another directory, and offline."""
    name = publisher.publish_folder(
        export_huggingface(tiny_runs["late"], tmp_path / "written"), "someone/commands-of-run"
    )
    pinned = f"{name}@{hub.repositories[name].main}"
    assert main(["evaluate", name, "--data", str(scenes_folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["run"] == pinned
    assert main(["evaluate", str(tiny_runs["late"]), "--data", str(scenes_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rsum"] == figures["rsum"]
    assert main(["index", name, str(scenes_folder / "images"), "--out", "index"]) == 0
    assert read_manifest("index").run == pinned
    assert main(["train", str(scenes_folder), "--init", name, "--out", "tuned", "--steps", "1", "--batch", "4", "--workers",
                 "0", "--precision", "float32", "--trackers", "", "--epochs", "1", "--train_images", "8", "--cache", "off",
                 "--device", "cpu", "--config", str(tiny_runs["late"] / "config.yaml")]) == 0  # fmt: skip
    # Its folder in the cache is not ours: an audit leaves it as it is, and what would be kept in it asks for a place.
    before = contents(Path(resolve_run(name)))
    assert main(["audit", name, "--data", str(scenes_folder), "--json"]) in (0, 1)
    for command, message in (
        ("calibrate", "is its publisher's: give --out FILE"),
        ("worth", f"{pinned}: has no data.json"),
    ):
        capsys.readouterr()
        assert main([command, name, *([str(scenes_folder)] if command == "calibrate" else [])]) == 1
        assert message in capsys.readouterr().err
    assert contents(Path(resolve_run(name))) == before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    for more in ([], ["--rerank", "3"]):
        capsys.readouterr()
        assert main(["search", str(tmp_path / "index"), "a red circle", "--json", *more]) == 0
        assert json.loads(capsys.readouterr().out)
    # Words alone need the index alone: nothing of the model, and no hub.
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["search", str(tmp_path / "index"), "a red circle", "--json"]) == 0
    assert not hub.requests
