"""What a study should cite: the data set, the towers, the designs; from references.bib."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.study.plan import DESIGNS, Plan, cells_of

#: A word in a data set's name or layout, a tower's name, or a design -> the entry's key.
KEYS = {
    "flickr8k": "hodosh2013",
    "flickr30k": "young2014",
    "karpathy": "karpathy2015",
    "coco": "lin2014",
    "rstpreid": "zhu2021",
    "efficientnet": "tan2019",
    "resnet": "he2016",
    "vit": "dosovitskiy2021",
    "minilm": "wang2020",
    "distilbert": "sanh2019",
    "longformer": "beltagy2020",
    "sparse": "beltagy2020",
    "late": "yao2021",
    "cross": "li2021",
    "self": "radford2021",
}


def entries_for(plan: Plan, data: CaptionedImages) -> list[dict[str, str]]:
    """The entries that this study needs, each once, with their BibTeX."""
    names = [data.layout.lower(), str(data.source).lower()]
    designs = set()
    for cell in cells_of(plan, Path("study")):
        model = cell.config.model
        names += [model.image_tower.name.lower(), model.text_tower.name.lower()]
        designs.add(model.design)
    wanted = [word for word in KEYS if (word in designs if word in DESIGNS else any(word in name for name in names))]
    known = read_entries()
    return [known[key] for key in dict.fromkeys(KEYS[word] for word in wanted)]


def read_entries() -> dict[str, dict[str, str]]:
    """references.bib: key -> its fields, and the entry as it stands there."""
    text = files("clipvisionalign.study").joinpath("references.bib").read_text(encoding="utf-8")
    found = {}
    for entry in re.split(r"\n(?=@)", text):
        key = entry.partition("{")[2].partition(",")[0]
        fields = dict(re.findall(r"(\w+) = \{(.*)\}", entry))
        found[key] = {"key": key, **fields, "bibtex": entry.strip()}
    return found
