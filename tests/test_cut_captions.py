"""Captions that are cut at `max_tokens` are counted, told and recorded."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipvisionalign.batch import TokenizedCaptions, TruncationStats
from clipvisionalign.cli import main
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.tokenizer import load_tokenizer, tokenize_captions

SENTENCES = st.lists(st.sampled_from(["dog", "a", "circle", "xyzzy", "purple", "!"]), max_size=12).map(" ".join)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SENTENCES, max_size=5), st.integers(3, 9))
@pytest.mark.parametrize("fast", [True, False])
def test_what_is_lost_is_what_the_whole_captions_have_more(text_folder, fast, captions, limit):
    tokenizer = load_tokenizer(text_folder)
    token_ids = [tokenizer(caption)["input_ids"] for caption in captions]

    class Slow:
        """A tokenizer that knows no pieces."""

        def __call__(self, some, **more):
            encoding = tokenizer(some, **more)
            encoding.__class__ = type("Plain", (type(encoding),), {"is_fast": False})
            return encoding

    tokens = tokenize_captions(tokenizer if fast else Slow(), captions, limit)
    assert [len(ids) for ids in tokens] == [min(limit, len(ids)) for ids in token_ids]
    assert tokens.num_truncated == [max(0, len(ids) - limit) for ids in token_ids]
    cut_captions = TruncationStats.from_tokens(tokens)
    assert cut_captions == TruncationStats(
        len(captions),
        sum(len(ids) > limit for ids in token_ids),
        sum(tokens.num_truncated),
        max(map(len, token_ids), default=0),
    )
    # Counted in parts, as a stream passes.
    half = len(captions) // 2
    parts = [
        TokenizedCaptions(tokens[some], tokens.num_truncated[some]) for some in (slice(None, half), slice(half, None))
    ]
    assert TruncationStats.from_tokens(parts[0]) + TruncationStats.from_tokens(parts[1]) == cut_captions


@pytest.fixture(scope="module")
def long_captions(tmp_path_factory):
    """40 images: every fifth caption has 40 words, the others 3."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("long")
    rows = []
    for n in range(40):
        Image.new("RGB", (64, 64), (6 * n, (37 * n) % 256, (91 * n) % 256)).save(folder / f"{n}.png")
        rows.append([f"{n}.png", " ".join(["dog"] * (40 if n % 5 == 0 else 3)), "dev" if n >= 25 else "train"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "split"], *rows])
    return folder


def test_check_counts_joined_captions_as_they_are_measured(scenes_folder, text_folder, capsys):
    command = ["check", str(scenes_folder), "--quick", "--tokens", str(text_folder), "--json"]
    counts = {}
    for form in ("each", "joined"):
        assert main([*command, "--captions", form]) == 0
        counts[form] = json.loads(capsys.readouterr().out)["cut_captions"]["dev"]
    dev = with_captions(read_captioned_images(scenes_folder).split("dev"), "joined")
    assert counts["joined"]["captions"] == len(dev.captions)
    assert counts["joined"]["longest"] > counts["each"]["longest"]
    assert main(["check", str(scenes_folder), "--captions", "joined"]) == 1
    assert "--captions is what --tokens" in capsys.readouterr().err


def test_check_counts_them_for_any_tokenizer(long_captions, text_folder, capsys):
    command = ["check", str(long_captions), "--quick", "--tokens", str(text_folder), "--max-tokens", "16"]
    assert main(command) == 0
    stdout = capsys.readouterr().out
    assert "train: 5 of 25 captions (20.0 %) are longer than 16 tokens and cut" in stdout
    assert "the longest has 42, 130 tokens are lost" in stdout
    assert main([*command, "--json"]) == 0
    cut_captions = json.loads(capsys.readouterr().out)["cut_captions"]
    assert cut_captions["dev"] == {"captions": 15, "cut": 3, "tokens_lost": 78, "longest": 42, "share": 0.2}
    # Nothing is cut at a tower's own limit, which is never above its positions.
    assert open_tokenizer(text_folder).max_tokens == 128
    assert open_tokenizer(text_folder, 1000).max_tokens == 128
    assert main(["check", str(long_captions), "--quick", "--max-tokens", "16"]) == 1
    assert "--tokens" in capsys.readouterr().err
    assert main([*command[:-1], "2"]) == 1
    assert "--max-tokens 2" in capsys.readouterr().err


def test_a_training_tells_and_records_them_and_check_knows_the_run(long_captions, tmp_path, tiny_model, capsys):
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    model = tiny_model("self")
    model.text_tower.max_tokens = 16
    config = RunConfig(
        data=str(long_captions), out=str(tmp_path / "run"), model=model, epochs=1, batch=12, augment="none",
        precision="float32", cache=str(tmp_path / "cache"), trackers="",
    )  # fmt: skip
    said: list[str] = []
    train(config, said.append)
    assert sum("are longer than 16 tokens and cut" in line for line in said) == 2
    kept = json.loads((tmp_path / "run" / "data.json").read_text())["cut_captions"]
    assert kept["max_tokens"] == 16
    assert (kept["train"]["cut"], kept["dev"]["cut"]) == (5, 3)
    assert main(["check", str(long_captions), "--quick", "--json", "--tokens", str(tmp_path / "run")]) == 0
    cut_captions = json.loads(capsys.readouterr().out)["cut_captions"]
    assert {name: cut_captions[name] for name in kept} == kept


def test_a_streams_captions_are_counted_as_they_pass(long_captions, tmp_path, tiny_model):
    pytest.importorskip("webdataset")
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    assert main(["shards", str(long_captions), str(tmp_path / "shards"), "--per-shard", "10"]) == 0
    model = tiny_model("self")
    model.text_tower.max_tokens = 16
    config = RunConfig(
        data=str(tmp_path / "shards"), out=str(tmp_path / "run"), model=model, epochs=1, batch=5, augment="none",
        precision="float32", cache=str(tmp_path / "cache"), trackers="", workers=0,
    )  # fmt: skip
    said: list[str] = []
    train(config, said.append)
    assert any(line.startswith("train, as it passed: 5 of 25 captions") for line in said)
    kept = json.loads((tmp_path / "run" / "data.json").read_text())["cut_captions"]
    assert (kept["train"]["captions"], kept["train"]["cut"], kept["dev"]["cut"]) == (25, 5, 3)
