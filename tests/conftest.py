"""What the tests share: tiny towers saved in their publishers' own layouts, and a small drawn data set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: a second thread each costs more than it brings, and the tests run on all cores anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = (  # noqa: SIM905
    "a an the two three four small large red blue green yellow purple orange pink brown circle square triangle star "
    "cross ring circles squares triangles stars crosses rings left right above below of to on in picture dog grass"
).split()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a word-piece tokenizer, in transformers' layout."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(dict.fromkeys(vocabulary)), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 drawn scenes of 64 pixels."""
    from clipvisionalign.data.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", 120, seed=1, size=64)


@pytest.fixture(scope="session")
def tiny_model(text_folder: Path):
    """Settings of an aligner that trains in seconds: random towers at 64 pixels."""
    from clipvisionalign.models.aligner import AlignerConfig
    from clipvisionalign.models.fusion import FusionConfig
    from clipvisionalign.models.image_tower import ImageTowerConfig
    from clipvisionalign.models.late_interaction import LateConfig
    from clipvisionalign.models.text_tower import TextTowerConfig

    def build(design: str = "self") -> AlignerConfig:
        return AlignerConfig(
            design=design,
            image_tower=ImageTowerConfig("resnet10t", weights="random", size=64),
            text_tower=TextTowerConfig(str(text_folder), window=4),
            late=LateConfig(width=16),
            fusion=FusionConfig(layers=1, heads=2, width=32, candidates=5),
            width=32,
        )

    return build


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, tiny_model) -> dict[str, Path]:
    """A trained run of each design."""
    from clipvisionalign.training.train import RunConfig, train

    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for design in ("self", "sparse", "late", "cross"):
        config = RunConfig(
            data=str(scenes_folder), out=str(folder / design), model=tiny_model(design), epochs=2, batch=16,
            augment="none", precision="float32", cache=str(folder / "cache"),
        )  # fmt: skip
        train(config, say=lambda line: None)
        runs[design] = folder / design
    return runs
