"""Whether a fine-tuning was worth it: what was gained over the base, what was lost elsewhere, and what is between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.adaptation.comparison import ComparisonRequest, compare_with_base
from clipvisionalign.adaptation.curve_trainings import plan_trainings
from clipvisionalign.adaptation.learning_curve import learning_curve
from clipvisionalign.adaptation.worth_claims import worth_claims, worth_verdict
from clipvisionalign.data.formats.classes import read_classes
from clipvisionalign.json_io import write_json
from clipvisionalign.models.pretrained.known_checkpoints import pretraining_of
from clipvisionalign.models.run_names import display_name, is_of_publisher
from clipvisionalign.training.opened_classes import compare_classification

#: Where the answer is kept in a run folder.
WORTH_FILE = "worth.json"


def worth(
    request: ComparisonRequest, out: str | Path = "", overwrite: bool = False, with_blend: bool = True,
    class_folders: Sequence[str] = (), with_curve: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare a run with what it started from, on its own data and on data that it was not tuned on.

    >>> from clipvisionalign.adaptation.comparison import ComparisonRequest
    >>> worth(ComparisonRequest("runs/tuned", split="test"))["claims"]    # doctest: +SKIP

    Args:
        request: the run, its base, the data sets and the split.
        out: the file to write; "" for worth.json in the run folder.
        overwrite: whether a file that is there is replaced.
        with_blend: whether the best model between the two is looked for, which measures each of `request.alphas`.
        class_folders: folders of classes, on which the zero-shot classification of run and base is compared.
        with_curve: whether the run is trained again on 1/8, 1/4 and 1/2 of its captions, for what twice as many would
            bring; see `learning_curve`.

    Returns:
        What the file holds: a verdict, figures, paired differences, and sentences whose numbers are cited from them.

    Raises:
        FileExistsError: the file is there.
        ValueError, FileNotFoundError, DataError: as `compare_with_base`, and `learning_curve`.
    """
    request = request if with_blend else replace(request, alphas=())
    request.check()
    if not str(out) and is_of_publisher(request.run):
        raise ValueError(f"{display_name(request.run)}: its folder is its publisher's: give --out FILE")
    target = Path(out) if str(out) else Path(request.run) / WORTH_FILE
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: is there already; give another --out, or --overwrite to replace it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out {target}: there is no folder {target.parent}")
    for folder in class_folders:
        # Its faults are found before a model is loaded.
        read_classes(Path(folder))
    if with_curve:
        plan_trainings(request.run)
    document = compare_with_base(request).document
    if class_folders:
        base = request.base_name()
        document["classes"] = [
            compare_classification(request.run, base, folder, device=request.device) for folder in class_folders
        ]
    if with_curve:
        document["learning_curve"] = learning_curve(request.run).to_dict()
    pretraining = pretraining_of(request.base_name())
    if pretraining is not None:
        document["pretraining"] = pretraining.to_dict()
    document["claims"] = [claim.to_dict() for claim in worth_claims(document)]
    document = {"verdict": worth_verdict(document).to_dict(), **document}
    write_json(target, document)
    return document
