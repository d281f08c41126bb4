"""Towers by name: fetched from a hub over real HTTP, verified, pinned; every fault is one clear error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from hub_server import Hub
from safetensors.torch import load_file

from clipvisionalign.log import log_to
from clipvisionalign.models.hub import CorruptedDownload, DiskFull, WeightsNotFound
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.models.image_weights import find_image_weights
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig
from clipvisionalign.models.text_weights import find_text_weights

CAPTIONS = ["a red circle above the blue square", "three dogs", "two yellow stars left of a large green ring on grass"]
IMAGE = "test_resnet.r160_in1k"
TEXT = "distilbert/distilbert-base-uncased"
LONG = "allenai/longformer-base-4096"


# --- what the hub has: tiny models in their publishers' own layouts --------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as the hub's repositories have them: a timm backbone, DistilBERT, Longformer."""
    import timm
    import transformers
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    root = tmp_path_factory.mktemp("published")
    folders = {name: root / name for name in ("image", "text", "shards", "long")}
    for folder in folders.values():
        folder.mkdir()
    torch.manual_seed(0)
    backbone = timm.create_model(IMAGE, pretrained=False)
    for module in backbone.modules():
        # Not what a new model has, so that statistics that are not read show.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    save_file(backbone.state_dict(), folders["image"] / "model.safetensors", {"format": "pt"})
    own = {key: backbone.pretrained_cfg[key] for key in ("input_size", "mean", "std", "num_classes", "classifier")}
    config = {"architecture": "test_resnet", "num_classes": 1000, "num_features": 256, "pretrained_cfg": own}
    (folders["image"] / "config.json").write_text(json.dumps(config))
    torch.save(backbone.state_dict(), folders["image"] / "pytorch_model.bin")

    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *letters])]
    (folders["text"] / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.DistilBertTokenizerFast(str(folders["text"] / "vocab.txt")).save_pretrained(folders["text"])
    shape = transformers.DistilBertConfig(
        vocab_size=len(vocabulary), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
    )
    # As published: with the head that it was trained with, under the prefix "distilbert.".
    model = transformers.DistilBertForMaskedLM(shape)
    shutil.copytree(folders["text"], folders["shards"], dirs_exist_ok=True)
    model.save_pretrained(folders["text"])
    model.save_pretrained(folders["shards"], max_shard_size="30KB")
    for other in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "pytorch_model.bin"):
        (folders["text"] / other).write_bytes(b"for other programs")

    tokenizer = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([" ".join(WORDS), *CAPTIONS] * 3, vocab_size=400, special_tokens=specials)
    tokenizer.save_model(str(folders["long"]))
    longformer = transformers.LongformerForMaskedLM(
        transformers.LongformerConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            attention_window=[4, 4],
            max_position_embeddings=66,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    # As published: no safetensors, no tokenizer.json, keys under "longformer.".
    longformer.config.save_pretrained(folders["long"])
    torch.save(longformer.state_dict(), folders["long"] / "pytorch_model.bin")
    return folders


@pytest.fixture(scope="module")
def server(published: dict[str, Path]):
    with Hub() as hub:
        hub.publish(f"timm/{IMAGE}", published["image"], "apache-2.0")
        hub.publish("someone/backbone", published["image"], "mit")
        hub.publish(TEXT, published["text"], "apache-2.0")
        hub.publish("someone/shards", published["shards"], "mit")
        hub.publish(LONG, published["long"], "cc-by-4.0")
        hub.moved["distilbert-base-uncased"] = TEXT
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server as the hub, and a new cache."""
    from huggingface_hub import constants

    server.forget()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return server


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def cache_files(tmp_path: Path) -> set[str]:
    """What is in the cache under a name that is read."""
    return {path.name for path in (tmp_path / "cache").glob("models--*/snapshots/*/*")}


# --- the right file, number for number --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [IMAGE, "test_resnet", f"timm/{IMAGE}", f"hf-hub:timm/{IMAGE}", "hf-hub:someone/backbone"]
)
def test_a_backbone_by_name_is_timms(name, hub, published, tmp_path):
    """Any form of the name gives timm's own outputs with these weights, and fetches one weights file."""
    import timm

    tower = ImageTower(ImageTowerConfig(name)).eval()
    theirs = timm.create_model(IMAGE, checkpoint_path=str(published["image"] / "model.safetensors"))
    theirs.reset_classifier(0)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).pooled, theirs.eval()((pixels / 255 - mean) / std), rtol=0, atol=1e-5)
    assert cache_files(tmp_path) <= {"README.md", "config.json", "model.safetensors"}
    repository = "someone/backbone" if "someone" in name else f"timm/{IMAGE}"
    assert tower.origin.repository == repository
    assert tower.config.revision == hub.repositories[repository].main
    assert tower.image_transform.size == 160


@pytest.mark.parametrize("name", ["distilbert-base-uncased", TEXT, "someone/shards", LONG])
def test_a_text_tower_by_name_is_transformers(name, hub, published, tmp_path):
    """DistilBERT (also by its old name, and in parts) and Longformer give transformers' outputs, and nothing else comes."""
    import transformers

    tower = TextTower(TextTowerConfig(name)).eval()
    folder = published["long"] if name == LONG else published["text"]
    if name == "someone/shards":
        folder = published["shards"]
    clean = tmp_path / "clean"
    shutil.copytree(folder, clean, ignore=lambda _, names: [each for each in names if each == "pytorch_model.bin"])
    if name == LONG:
        shutil.copy(folder / "pytorch_model.bin", clean)
    theirs = transformers.AutoModel.from_pretrained(clean).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clean)
    batch = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    assert tower.tokenize(CAPTIONS) == tokenizer(CAPTIONS)["input_ids"]
    assert tower.tokenizer.unk_token_id not in batch["input_ids"]
    extra = {}
    if name == LONG:
        extra = {"global_attention_mask": torch.zeros_like(batch["input_ids"])}
        extra["global_attention_mask"][:, 0] = 1
    with torch.no_grad():
        expected = theirs(batch["input_ids"], batch["attention_mask"], **extra).last_hidden_state
        hidden_states = tower(batch["input_ids"], batch["attention_mask"]).tokens
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden_states[real], expected[real], rtol=0, atol=1e-5)
    unwanted = {"tf_model.h5", "flax_model.msgpack", "rust_model.ot"} | (
        {"pytorch_model.bin"} if name != LONG else set()
    )
    assert not cache_files(tmp_path) & unwanted
    assert tower.origin.to_dict()["licence"] == {"someone/shards": "mit", LONG: "cc-by-4.0"}.get(name, "apache-2.0")
    assert tower.origin.repository == (TEXT if name == "distilbert-base-uncased" else name)


def test_size_is_told_before_and_progress_meanwhile(hub, capfd, monkeypatch):
    """The size stands there before the first byte is asked for; in a log a slow download has its lines."""
    monkeypatch.setenv("CLIPVISIONALIGN_PROGRESS_SECONDS", "0.1")
    hub.cut["model.safetensors"] = [1_200_000]  # a second until it is asked for again
    lines: list[tuple[str, bool]] = []
    with log_to(lambda line: lines.append((line, any("resolve" in each for each in hub.requests)))):
        find_image_weights(IMAGE)
    (message, asked), *_ = lines
    assert "fetching 2 files, 1.9 MB" in message
    assert "licence apache-2.0" in message
    assert hub.url in message
    assert not asked
    assert f"fetching timm/{IMAGE} (kB) 1,0" in capfd.readouterr().err


# --- revisions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def moving(hub: Hub, published: dict[str, Path], tmp_path: Path):
    """A repository with two commits: the older one, and main."""
    folder = tmp_path / "moving"
    shutil.copytree(published["text"], folder)
    (folder / "pytorch_model.bin").unlink()
    first = hub.publish("someone/moving", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seq_classif_dropout": 0.5}))
    second = hub.publish("someone/moving", folder)
    yield first, second
    del hub.repositories["someone/moving"]


def test_revisions_are_pinned(hub, moving):
    first, second = moving
    assert find_text_weights("someone/moving").origin.revision == second
    assert find_text_weights("someone/moving", revision=first).origin.revision == first
    assert find_text_weights(f"someone/moving@{first}").origin.revision == first
    hub.requests.clear()
    # A commit that is there needs no request; a branch needs one, and no file that is there is fetched again.
    assert find_text_weights("someone/moving", revision=first).origin.revision == first
    assert not hub.requests
    assert find_text_weights("someone/moving").origin.revision == second
    asked = [request.split("?")[0] for request in hub.requests if "moving" in request]
    assert asked == ["GET /api/models/someone/moving/revision/main"]
    with pytest.raises(WeightsNotFound, match="no revision 'old'"):
        find_text_weights("someone/moving", revision="old")
    with pytest.raises(ValueError, match="asks for the revision 'a'"):
        find_text_weights("someone/moving@a", revision="b")


def test_a_study_takes_one_commit_for_all_of_its_cells(hub, moving, published, tmp_path):
    """Also if the branch moves between two of its calls; what stands in a finished cell's place is then no other run."""
    from dataclasses import asdict, replace

    import yaml

    from clipvisionalign.study.config import Plan, Variant, trials_of
    from clipvisionalign.study.tower_commits import pin_tower_commits
    from clipvisionalign.study.trial_checks import refuse_other_settings

    plan = Plan(
        data="x", seeds=[0, 1], variants={"self": Variant(), "late": Variant()},
        settings={"model": {"image_tower": {"name": IMAGE}, "text_tower": {"name": "someone/moving"}}},
    )  # fmt: skip
    asked = trials_of(plan, tmp_path)
    trials = pin_tower_commits(asked, tmp_path)
    hub.publish("someone/moving", published["text"])
    assert hub.repositories["someone/moving"].main not in moving
    trials[0].folder.mkdir(parents=True)
    (trials[0].folder / "config.yaml").write_text(yaml.safe_dump(asdict(trials[0].config)))
    later = pin_tower_commits(asked, tmp_path)
    assert {trial.config.model.text_tower.revision for trial in [*trials, *later]} == {moving[1]}
    for trial in (trials[0], asked[0], later[0]):
        refuse_other_settings(trial)
    text = replace(later[0].config.model.text_tower, revision=moving[0])
    other = replace(later[0].config, model=replace(later[0].config.model, text_tower=text))
    with pytest.raises(FileExistsError):
        refuse_other_settings(replace(later[0], config=other))


def test_a_foreign_cache_is_completed(hub, tmp_path):
    """A commit of which another program fetched only a part is completed, not taken for whole."""
    folder = find_text_weights(TEXT).folder
    commit = hub.repositories[TEXT].main
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").unlink()
    assert find_text_weights(TEXT, revision=commit).folder == folder
    assert (folder / "vocab.txt").is_file()


# --- one clear error each -------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_gated_says_how_to_log_in(hub, monkeypatch):
    hub.repositories[TEXT].gated, hub.token = True, "mine"
    with pytest.raises(WeightsNotFound) as error:
        find_text_weights(TEXT)
    message = one_line(error)
    assert "gated" in message
    assert "hf auth login" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "expired")
    with pytest.raises(WeightsNotFound, match=r"refuses it \(401\).*hf auth login"):
        find_text_weights(TEXT)
    # With the right one it comes; the store, which asserts that no token reaches it, sends the weights.
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert find_text_weights(TEXT).folder.is_dir()


def test_a_name_that_does_not_exist_names_the_nearest(hub):
    with pytest.raises(WeightsNotFound) as error:
        find_text_weights("distilbert-base-uncased2")
    assert "distilbert-base-uncased," in one_line(error)
    with pytest.raises(WeightsNotFound, match="allenai/longformer-base-4096"):
        find_text_weights("longformer-base-4096")
    with pytest.raises(WeightsNotFound, match=r"timm/resnet50\.a1_in1k"):
        find_image_weights("hf-hub:timm/resnet50.a1_in1")
    with pytest.raises(ValueError, match=r"resnet50\.a1_in1k"):
        find_image_weights("resnet50.nope")
    with pytest.raises(ValueError, match="resnet50"):
        find_image_weights("resnet5o")
    hub.requests.clear()
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(WeightsNotFound, match="no such folder"):
            find_text_weights(name)
    assert not hub.requests
    with pytest.raises(WeightsNotFound, match=r"github\.com.*weights FILE"):
        find_image_weights("gcvit_tiny.in1k")


def test_a_cut_connection_is_resumed(hub, published, monkeypatch):
    """Each new connection asks for the rest, and the file is the published one."""
    monkeypatch.setattr("clipvisionalign.models.hub.download.CHUNK", 1000)
    hub.cut["model.safetensors"] = [40_000, 25_000]
    weights = find_text_weights(TEXT)
    assert (weights.folder / "model.safetensors").read_bytes() == (published["text"] / "model.safetensors").read_bytes()
    ranges = [request.split("bytes=")[1] for request in hub.requests if "bytes=" in request]
    assert ranges == ["40000-", "65000-"]


def test_a_reset_connection_is_asked_again(hub, published):
    hub.cut["model.safetensors"], hub.reset = [40_000], True
    weights = find_text_weights(TEXT)
    assert (weights.folder / "model.safetensors").read_bytes() == (published["text"] / "model.safetensors").read_bytes()


def test_a_connection_that_stays_cut_is_one_error(hub, tmp_path, monkeypatch):
    hub.cut["model.safetensors"] = [0] * 50
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(WeightsNotFound) as error:
        find_text_weights(TEXT)
    assert "did not answer" in one_line(error)
    assert "model.safetensors" not in cache_files(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_content_that_is_not_the_announced_one_is_not_kept(file, hub, tmp_path, monkeypatch):
    """A byte of the right length differs: refused, not loaded, and right at the next try."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    files = hub.repositories[TEXT].commits[hub.repositories[TEXT].main]
    hub.wrong[file] = files[file][:-1] + b"x"
    with pytest.raises(CorruptedDownload) as error:
        find_text_weights(TEXT)
    assert file in one_line(error)
    assert file not in cache_files(tmp_path)
    hub.wrong.clear()
    assert (find_text_weights(TEXT).folder / file).read_bytes() == files[file]


@pytest.mark.parametrize("offline", [False, True])
def test_a_file_that_broke_in_the_cache_is_seen(offline, hub, moving, monkeypatch):
    """A truncated weights file under a pinned commit: fetched again, and offline one error that names it."""
    first, _ = moving
    folder = find_text_weights("someone/moving", revision=first).folder
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CorruptedDownload, match=r"model\.safetensors"):
            find_text_weights("someone/moving", revision=first)
        return
    assert find_text_weights("someone/moving", revision=first).folder == folder
    assert weights.read_bytes() == content


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="no small disk without root: it is mounted")
def test_a_full_disk_is_told_before_and_while(hub, tmp_path, monkeypatch):
    """A real file system of 256 kB: what is needed and what is there; nothing half-written stays."""
    from huggingface_hub import constants

    from clipvisionalign.models.hub import download as own

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk: this system mounts no tmpfs")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small / "cache"))
        (small / "other").write_bytes(bytes(120_000))
        with pytest.raises(DiskFull) as error:
            find_image_weights(IMAGE)
        assert "needs 1." in one_line(error)
        assert " are free in " in one_line(error)
        assert "HF_HOME" in one_line(error)
        assert not [request for request in hub.requests if "resolve" in request]
        # It fills up while the file comes: the same words.
        monkeypatch.setattr(own, "_check_room", lambda name, total: None)
        with pytest.raises(DiskFull) as error:
            find_image_weights(IMAGE)
        assert "became full" in one_line(error)
        assert "model.safetensors" not in {path.name for path in small.rglob("*")}
        assert not list(small.rglob("*.incomplete"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_a_repository_lacks_is_named(hub, published, tmp_path):
    for lacking, message in (
        (("model.safetensors", "pytorch_model.bin"), "holds no weights"),
        (("vocab.txt", "tokenizer.json"), "no tokenizer"),
        (("config.json",), r"no config\.json"),
    ):
        folder = tmp_path / lacking[0]
        shutil.copytree(published["text"], folder, ignore=lambda _, names, lacking=lacking: set(lacking) & set(names))
        hub.publish("someone/lacking", folder)
        with pytest.raises(WeightsNotFound, match=message) as error:
            find_text_weights("someone/lacking")
        if "weights" in message:
            assert "tf_model.h5" in one_line(error)
        assert not [request for request in hub.requests if "resolve" in request]
    folder = tmp_path / "part"
    part = "model-00002-of-"
    shutil.copytree(
        published["shards"], folder, ignore=lambda _, names: [name for name in names if name.startswith(part)]
    )
    hub.publish("someone/lacking", folder)
    with pytest.raises(WeightsNotFound, match="parts that"):
        find_text_weights("someone/lacking")


def test_weights_of_another_model_are_refused(hub, published, tmp_path):
    """Nothing is filled up at random in silence: what is missing is an error, and a pickle is not run."""
    import pickle

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(published["text"], folder)
    (folder / "pytorch_model.bin").unlink()
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1.attention.q_lin" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    hub.publish("someone/other", folder)
    with pytest.raises(ValueError, match="2 tensors are missing"):
        TextTower(TextTowerConfig("someone/other"))
    # A config of fewer layers than the weights have would cut the model off.
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "n_layers": settings["n_layers"] - 1}))
    hub.publish("someone/other", folder)
    with pytest.raises(ValueError, match="more layers than its config"):
        TextTower(TextTowerConfig("someone/other"))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    hub.publish("someone/other", folder)
    with pytest.raises(ValueError, match="someone--other"):
        TextTower(TextTowerConfig("someone/other"))
    backbone = tmp_path / "backbone"
    shutil.copytree(published["image"], backbone)
    (backbone / "model.safetensors").unlink()
    shutil.copy(folder / "pytorch_model.bin", backbone)
    hub.publish("someone/evil", backbone)
    with pytest.raises(ValueError, match="someone--evil"):
        ImageTower(ImageTowerConfig("hf-hub:someone/evil"))
    assert not (tmp_path / "ran").exists()


# --- without a network ------------------------------------------------------------------------------------------------


def test_without_a_network_the_cache_is_used(hub, monkeypatch, capsys):
    for way in ("refused", "no such host", "silent"):
        find_text_weights(TEXT)
        with monkeypatch.context() as patch:
            broken(way, hub, patch)
            lines: list[str] = []
            with log_to(lines.append):
                weights = find_text_weights(TEXT)
            assert weights.origin.revision == hub.repositories[TEXT].main
            assert weights.origin.licence == "apache-2.0"
            assert "did not answer" in lines[0]
            assert "taken from the cache" in lines[0]
            with pytest.raises(WeightsNotFound) as error:
                find_text_weights("someone/shards")
            message = one_line(error)
            assert "did not answer" in message
            assert "hf download someone/shards" in message
            assert "random" in message
        hub.stall = 0.0


def broken(way: str, hub: Hub, patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    if way == "silent":
        hub.stall = 3.0
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        return
    point_to("http://127.0.0.1:9" if way == "refused" else "http://hub.invalid", patch)


FORBID = """
import sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise AssertionError(f"the network was asked: {event} {arguments}")
sys.addaudithook(forbid)
"""


@pytest.mark.slow
def test_offline_opens_no_socket(hub, tmp_path, scenes_folder):
    """A training from the cache with --offline, and what is missing by HF_HUB_OFFLINE, in a process in which asking the
    network is an error; the environment is afterwards as it was."""
    for find, name in ((find_image_weights, IMAGE), (find_text_weights, LONG)):
        find(name)
    hub.requests.clear()
    line = ["train", str(scenes_folder), "--out", str(tmp_path / "run"), "--model.image_tower.name", IMAGE,
            "--model.text_tower.name", LONG, "--model.image_tower.size", "64", "--steps", "1", "--batch", "4",
            "--freeze", "none", "--workers", "0", "--precision", "float32", "--trackers", "", "--epochs", "1",
            "--train_images", "8", "--cache", "off", "--device", "cpu"]  # fmt: skip
    code = f"""{FORBID}
import os
from clipvisionalign.cli import main
assert main({[*line, "--offline"]!r}) == 0
assert "HF_HUB_OFFLINE" not in os.environ
from huggingface_hub import constants
assert not constants.HF_HUB_OFFLINE
assert constants.ENDPOINT == {hub.url!r}
os.environ["HF_HUB_OFFLINE"] = "1"
assert main({[*line[:3], str(tmp_path / "other"), *line[4:], "--model.text_tower.name", "someone/shards"]!r}) == 1
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not hub.requests
    weights = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert weights["text_tower"]["revision"] == hub.repositories[LONG].main
    assert "the hub is not asked (--offline, or HF_HUB_OFFLINE); 'someone/shards' is not in the cache" in done.stderr


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Flickr30k as Kaggle ships it, its one broken row included, with drawn images."""
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.scene_dataset import write_scenes
    from clipvisionalign.data.splits import content_key, hash_split

    drawn = read_captioned_images(write_scenes(tmp_path / "drawn", 80, seed=3, size=64)).rows
    folder = tmp_path / "flickr30k" / "flickr30k_images"
    folder.mkdir(parents=True)
    by_hash = [(hash_split(content_key(row.image)), row) for row in drawn]
    chosen = [row for split, row in by_hash if split == "dev"][:4] + [
        row for split, row in by_hash if split == "train"
    ][:18]
    assert len(chosen) == 22
    rows = ["image_name| comment_number| comment"]
    for index, row in enumerate(chosen):
        name = f"{1000092795 + 7 * index}.jpg"
        shutil.copy(str(row.image), folder / name)
        rows += [f"{name}| {number}| {caption} ." for number, caption in enumerate(row.captions)]
    rows[-1] = rows[-1].replace("| 4| ", "| 4   ")
    (folder.parent / "results.csv").write_text("\n".join(rows))
    return folder.parent


@pytest.mark.slow
def test_the_original_recipe_is_one_line(hub, kaggle, published, tmp_path):
    """`train DATA --recipe original` as a user types it: both towers by their real names, ResNet50 in its real layout."""
    import timm
    import yaml
    from safetensors.torch import save_file

    backbone = timm.create_model("resnet50", pretrained=False)
    folder = tmp_path / "resnet50"
    folder.mkdir()
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in backbone.state_dict().items()}, folder / "model.safetensors")  # fmt: skip
    hub.publish("timm/resnet50.a1_in1k", folder)
    out = tmp_path / "run"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "COLUMNS": "200"}
    line = [sys.executable, "-m", "clipvisionalign", "train", str(kaggle), "--recipe", "original", "--out", str(out)]
    # So that it takes seconds here; the recipe's own stay.
    line += ["--precision", "float32", "--device", "cpu", "--workers", "0", "--model.image_tower.size", "64"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
    del hub.repositories["timm/resnet50.a1_in1k"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert "timm/resnet50.a1_in1k: fetching" in done.stderr
    assert "R@1" in done.stdout
    assert f"the run is in {out}" in done.stdout
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["batch"], settings["epochs"], settings["freeze"], settings["model"]["width"]) == (
        8,
        2,
        "none",
        256,
    )
    assert settings["best_by"] == "loss"
    assert settings["model"]["image_tower"]["name"] == "resnet50"
    assert settings["model"]["text_tower"]["revision"] == hub.repositories[TEXT].main
    weights = json.loads((out / "weights.json").read_text())
    own = weights["text_tower"]
    assert (own["repository"], own["licence"], own["name"]) == (TEXT, "apache-2.0", "distilbert-base-uncased")
    assert len(own["files"][0]["sha256"]) == 64
    problems = json.loads((out / "data.json").read_text())
    assert "its caption stood in column 2 (mended)" in json.dumps(problems)


def test_recipes_config_and_flags_count_in_that_order(tmp_path, capsys, monkeypatch):
    from clipvisionalign.cli import main

    taken = []
    monkeypatch.setattr("clipvisionalign.training.train.train", lambda config, *_: taken.append(config) or {"run": "x"})
    monkeypatch.setattr("clipvisionalign.cli.train.print_metrics", lambda results: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").mkdir()
    (tmp_path / "own.yaml").write_text("batch: 16\nmodel: {width: 32}\n")
    assert main(["train", "DATA", "--epochs", "5", "--config", str(tmp_path / "own.yaml"), "--recipe=original"]) == 0
    config = taken[0]
    assert (config.epochs, config.batch, config.model.width, config.best_by) == (5, 16, 32, "loss")
    assert config.model.image_tower.name == "resnet50"
    assert config.views == 4
    capsys.readouterr()
    assert main(["train", "DATA", "--recipe", "orignal"]) == 1
    assert "original: ResNet50 and DistilBERT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "original: ResNet50 and DistilBERT" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["best", "original"])
def test_every_setting_of_a_recipe_counts(name, monkeypatch):
    from clipvisionalign.cli import main
    from clipvisionalign.training.config_checks import check_settings
    from clipvisionalign.training.ineffective_settings import ineffective_settings
    from clipvisionalign.training.recipes import recipes

    assert sorted(recipes()) == ["best", "original"]
    taken = []
    monkeypatch.setattr("clipvisionalign.training.train.train", lambda config, *_: taken.append(config) or {"run": "x"})
    monkeypatch.setattr("clipvisionalign.cli.train.print_metrics", lambda results: None)
    assert main(["train", "--data", str(Path(__file__).parent), "--recipe", name]) == 0
    check_settings(taken[0])
    assert ineffective_settings(taken[0]) == []
    assert main(["train", "--data", str(Path(__file__).parent), "--recipe", name, "--epochs", "3"]) == (name == "best")


@pytest.mark.slow
def test_the_best_recipe_trains_both_of_its_stages(scenes_folder, text_folder, tmp_path):
    """Towers of its kind, small and with random weights; all else as the recipe has it, for fewer passes."""
    from clipvisionalign.cli import main

    out = tmp_path / "run"
    line = ["train", str(scenes_folder), "--recipe", "best", "--out", str(out), "--cache", str(tmp_path / "cache")]
    line += ["--model.image_tower.weights", "random", "--model.image_tower.size", "64", "--views", "1"]
    line += ["--model.text_tower.name", str(text_folder), "--stages", "text:1,all:1@5e-5/1e-4/3e-4", "--batch", "16"]
    assert main([*line, "--trackers", ""]) == 0
    first, last = json.loads((out / "results.json").read_text())["stages"]
    assert (first["trains"], first["learning_rate"]) == ("text", None)
    assert last["learning_rate"] == {"text_lr": 5e-5, "image_lr": 1e-4, "head_lr": 3e-4}
    before, after = (load_file(folder / "model.safetensors") for folder in (out / "stages" / "1-text", out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    image = {name for name in before if name.startswith("image_tower.") and before[name].is_floating_point()}
    assert not [name for name in changed & image if "conv_dw" in name]
    assert not [name for name in changed if any(f".blocks.{number}." in name for number in range(4))]
    assert [name for name in changed & image if ".blocks.6." in name]


@pytest.mark.parametrize("given", [["--recip", "original"], ["--off"], ["--conf", "own.yaml"]])
def test_a_shortened_flag_is_an_error(given, monkeypatch, capsys):
    """It would pass by what looks for the whole word: a recipe not taken, a hub asked that should not be."""
    from clipvisionalign.cli import main

    monkeypatch.setattr("clipvisionalign.training.train.train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        main(["train", "DATA", *given])
    for command in ("evaluate", "check", "audit", "study"):
        with pytest.raises(SystemExit):
            main([command, "DATA", "--off"])


@pytest.mark.parametrize(("line", "message"), [("recipe: original", "--recipe"), ("offline: true", "--offline")])
def test_what_has_to_be_known_first_is_refused_in_a_file_of_settings(line, message, tmp_path, monkeypatch, capsys):
    from clipvisionalign.cli import main

    monkeypatch.setattr("clipvisionalign.training.train.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "own.yaml").write_text(f"{line}\n")
    assert main(["train", "DATA", "--config", str(tmp_path / "own.yaml")]) == 1
    assert message in capsys.readouterr().err
