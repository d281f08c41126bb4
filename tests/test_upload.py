"""Exports that are uploaded when asked: over real HTTP, checked before anything is written, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import Hub
from pretrained_models import CAPTIONS, make_pretrained
from test_weights_by_name import point_to

from clipvisionalign.cli import main
from clipvisionalign.models.hub.upload import upload_folder
from clipvisionalign.models.io import load_aligner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pretrained("clip", tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    with Hub() as server:
        server.writers["secret"] = "someone"
        point_to(server.url, monkeypatch)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.chdir(tmp_path)
        yield server


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(each) for each in arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_uploaded_is_opened_by_its_name(hub, model, tmp_path, capsys):
    assert main(["export", str(model), "--transformers", str(tmp_path / "out"), "--push", "someone/tuned"]) == 0
    assert f"{hub.url}/someone/tuned: uploaded" in capsys.readouterr().out
    repository = hub.repositories["someone/tuned"]
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*")
    }
    assert repository.commits[repository.main] == {".gitattributes": b"", **written}
    expected = load_aligner(model, "cpu").encode_captions(list(CAPTIONS))
    assert torch.equal(load_aligner("someone/tuned", "cpu").encode_captions(list(CAPTIONS)), expected)


@pytest.mark.parametrize("of_adapters", [False, True])
def test_a_run_is_uploaded_whole_and_opened_by_its_name(hub, tmp_path, capsys, tiny_runs, of_adapters):
    run = "starter" if of_adapters else str(tiny_runs["self"])
    assert main(["export", run, "--huggingface", str(tmp_path / "out"), "--push", "someone/run"]) == 0
    files = hub.repositories["someone/run"].commits[hub.repositories["someone/run"].main]
    needed = {"adapters.safetensors"} if of_adapters else {"model.safetensors", "text_tower/tokenizer.json"}
    assert {"config.yaml", "README.md", *needed} <= set(files)
    capsys.readouterr()
    assert main(["export", "someone/run", "--transformers", str(tmp_path / "other")]) == 1
    assert "use --huggingface or --onnx" in capsys.readouterr().err
    for name, content in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    expected = load_aligner(run, "cpu").encode_captions(list(CAPTIONS))
    for opened in ("someone/run", f"someone/run@{hub.repositories['someone/run'].main}", tmp_path / "run"):
        assert torch.equal(load_aligner(opened, "cpu").encode_captions(list(CAPTIONS)), expected)


def test_a_repository_with_files_gets_a_commit_only_when_asked(hub, model, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("old")
    upload_folder(tmp_path / "old", "someone/tuned")
    first = hub.repositories["someone/tuned"].main
    command = ["export", model, "--transformers", tmp_path / "out", "--push", "someone/tuned"]
    assert "--overwrite" in refused(capsys, *command)
    # It is refused before anything is written.
    assert not (tmp_path / "out").exists()
    assert main([str(each) for each in [*command, "--overwrite"]]) == 0
    repository = hub.repositories["someone/tuned"]
    assert set(repository.commits[first]) == {".gitattributes", "notes.txt"}
    assert "notes.txt" not in repository.commits[repository.main]
    assert "model.safetensors" in repository.commits[repository.main]


@pytest.mark.parametrize(
    ("push", "words"),
    [("tuned", "OWNER/NAME"), ("some one/tuned", "no repository's name"), ("stranger/tuned", "a token that may write")],
)
def test_what_cannot_be_uploaded_is_one_line(hub, model, tmp_path, capsys, push, words):
    assert words in refused(capsys, "export", model, "--transformers", tmp_path / "out", "--push", push)
    assert push not in hub.repositories


def test_without_an_account_or_a_network_nothing_is_written(hub, model, tmp_path, capsys, monkeypatch):
    command = ["export", model, "--transformers", tmp_path / "out", "--push", "someone/tuned"]
    assert "--offline" in refused(capsys, *command, "--offline")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(capsys, *command)
    assert "goes with --push" in refused(capsys, "export", model, "--transformers", tmp_path / "out", "--private")
    assert not (tmp_path / "out").exists()
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
