"""What a study cites: what it uses, and not what a folder happens to be called."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_reports import gallery

from clipvisionalign.study.config import Plan, Variant
from clipvisionalign.study.report.bibliography import (
    DATA_SET_KEYS,
    DESIGN_KEYS,
    TOWER_KEYS,
    entries_for,
    name_words,
    read_entries,
)

OURS = {"minilm", "efficientnet"}


def cited(source: str | Path, layout: str = "folder") -> set[str]:
    part = gallery(2)
    part.source, part.layout = Path(source), layout
    return {entry["key"] for entry in entries_for(Plan(data="x", seeds=[0], variants={"self": Variant()}), part)}


def test_every_key_is_an_entry():
    assert {*DATA_SET_KEYS.values(), *TOWER_KEYS.values(), *DESIGN_KEYS.values()} <= set(read_entries())


def test_a_data_set_is_cited_by_its_layout_or_its_own_name(tmp_path):
    always = cited("mine")
    assert always == {"tan2019", "wang2020", "radford2021"}
    assert cited("data/coconut/mine") == cited("data/coco/mine") == cited("coconut") == cited("vit/resnet/x") == always
    assert cited("somewhere", "coco") - always == {"lin2014"}
    assert cited("/data/Flickr30k", "table") - always == {"young2014"}
    assert cited("somewhere", "flickr30k-kaggle") - always == {"young2014"}
    (tmp_path / "dataset_coco.json").write_text("{}")
    assert cited(tmp_path, "karpathy") - always == {"karpathy2015", "lin2014"}


@pytest.mark.parametrize(("name", "word"), [
    ("vit_base_patch16_224", "vit"), ("resnet50.a1_in1k", "resnet"), ("tf_efficientnet_lite0", "efficientnet"),
    ("sentence-transformers/all-MiniLM-L6-v2", "minilm"), ("allenai/longformer-base-4096", "longformer"),
    ("/home/vitaly/bert", ""), ("levit_128", ""), ("/models/resnet/tower", ""), ("gravity", ""),
])  # fmt: skip
def test_a_tower_is_known_by_a_word_of_its_own_name(name, word):
    assert [known for known in TOWER_KEYS if known in name_words([name])] == ([word] if word else [])
