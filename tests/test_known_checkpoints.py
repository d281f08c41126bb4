"""What published models were trained on: the table, how a model is looked up in it, and where it is shown."""

from __future__ import annotations

import json

import pytest
import yaml

from clipvisionalign.models.pretrained.known_checkpoints import (
    DATA_SETS,
    base_checkpoint,
    find_checkpoint,
    known_checkpoints,
    pretraining_of,
)

#: Names as they are on the hub, and a word of what their publishers tell.
PUBLISHED = {
    "openai/clip-vit-base-patch32": "WIT",
    "openai/clip-vit-large-patch14-336": "WIT",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "LAION-2B",
    "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k": "LAION-5B",
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": "DataComp",
    "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K": "DataComp",
    "laion/CLIP-convnext_base_w-laion2B-s13B-b82K": "LAION-2B",
    "facebook/metaclip-b32-400m": "MetaCLIP-400M",
    "facebook/metaclip-h14-fullcc2.5b": "2.5 billion",
    "google/siglip-base-patch16-224": "WebLI",
    "google/siglip2-base-patch16-naflex": "109 languages",
    "OFA-Sys/chinese-clip-vit-base-patch16": "Wukong",
    "apple/DFN5B-CLIP-ViT-H-14": "DFN-5B",
    "apple/DFN2B-CLIP-ViT-L-14": "DFN-2B",
    "apple/MobileCLIP-S1-OpenCLIP": "DataCompDR",
    "timm/ViT-B-16-SigLIP": "WebLI",
    "timm/ViT-B-16-SigLIP2": "109 languages",
    "timm/vit_base_patch32_clip_224.laion400m_e32": "LAION-400M",
    "timm/resnet50_clip.cc12m": "Conceptual 12M",
    "clip-italian/clip-italian": "Italian",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_found(name):
    for written in (name, f"hf-hub:{name}", f"{name}@{'0' * 40}", name.upper()):
        pretraining = find_checkpoint(written)
        assert pretraining is not None, written
        assert PUBLISHED[name] in pretraining.trained_on


def test_every_row_is_the_first_for_some_name_and_has_a_source():
    for row in known_checkpoints():
        for pattern in row.names:
            assert find_checkpoint(pattern.replace("*", "")) is row, pattern
        # A paper, or a model card of the publisher.
        assert all(source.startswith(("arXiv:", "model card of ")) for source in row.sources)
        # What is inside is told by name in what it was trained on.
        for data_set, word in (("flickr8k", "Flickr8k"), ("flickr30k", "Flickr30k"), ("coco", "COCO")):
            if getattr(row, data_set) == "inside":
                assert word in row.trained_on


def test_what_is_not_in_the_table_is_told_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretraining = pretraining_of("someone/clip-of-cats")
    assert pretraining is not None
    assert pretraining.checkpoint is None
    assert {pretraining.membership(data_set) for data_set in DATA_SETS} == {"unknown"}
    assert "someone/clip-of-cats was pretrained on is not known" in pretraining.note()
    record = pretraining.to_dict()
    assert not record["known"]
    assert json.loads(json.dumps(record)) == record


def test_a_model_is_found_by_its_hub_name_its_place_in_the_cache_and_what_its_config_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = pretraining_of("openai/clip-vit-base-patch32@main")
    assert by_name is not None
    assert not by_name.is_derived
    cached = tmp_path / "models--openai--clip-vit-base-patch32" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert pretraining_of(cached) == by_name
    copied = tmp_path / "clip"
    copied.mkdir()
    (copied / "config.json").write_text(json.dumps({"_name_or_path": "OFA-Sys/chinese-clip-vit-base-patch16"}))
    derived = pretraining_of(copied)
    assert derived is not None
    assert derived.is_derived
    assert derived.membership("coco") == "inside"
    assert base_checkpoint(copied) == "OFA-Sys/chinese-clip-vit-base-patch16"
    # A path of the machine that it was saved on is no name.
    (copied / "config.json").write_text(json.dumps({"_name_or_path": "/home/someone/openai/clip"}))
    assert pretraining_of(copied).checkpoint is None
    assert base_checkpoint(copied) == ""
    assert "/" not in pretraining_of(copied).note().split(";")[0]


def test_a_model_made_from_another_may_have_seen_what_that_one_has_not():
    from dataclasses import replace

    row = replace(known_checkpoints()[0], coco="not inside", flickr30k="inside")
    from clipvisionalign.models.pretrained.known_checkpoints import Pretraining

    assert Pretraining("a/b", row).membership("coco") == "not inside"
    assert Pretraining("a/b", row, is_derived=True).membership("coco") == "unknown"
    assert Pretraining("a/b", row, is_derived=True).membership("flickr30k") == "inside"


def test_a_run_is_found_by_what_it_started_from(tmp_path):
    settings = {"model": {"pretrained": f"openai/clip-vit-base-patch32@{'a' * 40}"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    pretraining = pretraining_of(tmp_path)
    assert pretraining is not None
    assert (pretraining.model, pretraining.is_derived) == ("openai/clip-vit-base-patch32", False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": ""}}))
    assert pretraining_of(tmp_path) is None
    # From a folder, which the run keeps the small files of.
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": "/models/clip"}}))
    assert pretraining_of(tmp_path).model == "clip"
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text(
        json.dumps({"_name_or_path": "google/siglip-base-patch16-224"})
    )
    assert pretraining_of(tmp_path).model == "google/siglip-base-patch16-224"
