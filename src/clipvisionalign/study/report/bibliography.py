"""What a study should cite: the data set, the towers, the designs; from references.bib."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.study.config import Plan, trials_of

#: A data set, as a layout or its own name is called -> the entry's key.
DATA_SET_KEYS = {
    "flickr8k": "hodosh2013",
    "flickr30k": "young2014",
    "karpathy": "karpathy2015",
    "coco": "lin2014",
    "rstpreid": "zhu2021",
}
#: A word in the name of a tower, or of a pretrained model -> the entry's key.
TOWER_KEYS = {
    "clip": "radford2021",
    "siglip": "zhai2023",
    "metaclip": "xu2024",
    "chinese": "yang2022",
    "efficientnet": "tan2019",
    "resnet": "he2016",
    "vit": "dosovitskiy2021",
    "minilm": "wang2020",
    "distilbert": "sanh2019",
    "longformer": "beltagy2020",
}
DESIGN_KEYS = {"sparse": "beltagy2020", "late": "yao2021", "cross": "li2021", "self": "radford2021"}


def entries_for(plan: Plan, data: CaptionedImages) -> list[dict[str, str]]:
    """The bibliography's entries that a study needs, each once.

    Args:
        plan: Its plan.
        data: Its data set.

    Returns:
        Each with its BibTeX.
    """
    models = [trial.config.model for trial in trials_of(plan, Path("study"))]
    # A pretrained model takes the place of both towers.
    towers = name_words(
        name for model in models
        for name in ([model.pretrained] if model.pretrained else [model.image_tower.name, model.text_tower.name])
    )  # fmt: skip
    # A file with the splits is named by the data set that they are of.
    split_files = [file.name for file in data.source.glob("dataset_*.json")] if data.source.is_dir() else []
    data_words = name_words([data.layout, data.source.name, *split_files])
    keys = [key for word, key in DATA_SET_KEYS.items() if word in data_words]
    keys += [key for word, key in TOWER_KEYS.items() if word in towers]
    keys += [key for design, key in DESIGN_KEYS.items() if design in {model.design for model in models}]
    entries = read_entries()
    return [entries[key] for key in dict.fromkeys(keys)]


def name_words(names: Iterable[str]) -> set[str]:
    """The words in the last part of names and paths, without case and without a number at their end.

    Args:
        names: Names of data sets and towers, or paths.

    Returns:
        The words.

    >>> sorted(name_words(["/data/coco/Flickr8k", "resnet50.a1_in1k", "COCO-2017", "coconut"]))
    ['a', 'coco', 'coconut', 'flickr8k', 'in1k', 'resnet']
    """
    words = {
        word for name in names for word in re.findall(r"[a-z0-9]+", name.lower().replace("\\", "/").rpartition("/")[2])
    }
    return {word.rstrip("0123456789") for word in words} - {""}


def read_entries() -> dict[str, dict[str, str]]:
    """references.bib: key -> its fields, and the entry as it stands there."""
    text = files("clipvisionalign.study.report").joinpath("references.bib").read_text(encoding="utf-8")
    entries = {}
    for entry in re.split(r"\n(?=@)", text):
        key = entry.partition("{")[2].partition(",")[0]
        fields = dict(re.findall(r"(\w+) = \{(.*)\}", entry))
        entries[key] = {"key": key, **fields, "bibtex": entry.strip()}
    return entries
