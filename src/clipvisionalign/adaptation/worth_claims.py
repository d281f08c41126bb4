"""Sentences about a fine-tuning, whose numbers are cited from the figures: each claims what its interval carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipvisionalign.study.report.claims.claim import CitedSentence, as_code


def worth_claims(document: Mapping[str, Any]) -> list[CitedSentence]:
    """What was gained on the run's own data and what was lost on others, over the base and over the best blend.

    Args:
        document: of worth.json.

    Returns:
        The sentences.
    """
    claims = []
    for number, gallery in enumerate(document["galleries"]):
        for position, row in enumerate(gallery["differences"]):
            # Blend and base are told apart by the two other differences, and in the table.
            if row["same_model"] or (row["a"], row["b"]) == ("blend", "base"):
                continue
            claims.append(_difference_claim(document, number, position))
        claims.append(_kept_claim(document, number))
    claims += [_classes_claim(document, number) for number in range(len(document.get("classes", ())))]
    if "alpha" in document:
        claims.append(_blend_claim(document))
    if "learning_curve" in document:
        claims.append(_curve_claim(document))
    return claims


def worth_verdict(document: Mapping[str, Any]) -> CitedSentence:
    """The answer in one sentence: what the run gained over its base on its own data and lost on others.

    Args:
        document: of worth.json.

    Returns:
        A sentence that claims of each data set what its interval carries.
    """
    claim = CitedSentence(document, "verdict")
    parts = []
    for number, gallery in enumerate(document["galleries"]):
        position = next(i for i, row in enumerate(gallery["differences"]) if (row["a"], row["b"]) == ("run", "base"))
        row, path = gallery["differences"][position], f"galleries/{number}/differences/{position}"
        change = "lost" if row["value"] < 0 else "gained"
        interval = claim.cite_interval(path, -1.0 if row["shown"] and change == "lost" else 1.0)
        if row["shown"]:
            what = f"the run {change} {interval} rsum"
        elif row["p"] is None and not row["same_model"]:
            what = f"too few images to tell: {interval} rsum"
        else:
            what = f"no {'loss or gain' if gallery['foreign'] else 'gain'} was shown: {interval} rsum"
        parts.append(f"on {as_code(Path(gallery['data']).name)} ({_kind(gallery)}) {what}")
    claim.text = "; ".join(parts)
    claim.text = claim.text[0].upper() + claim.text[1:]
    alpha = document.get("alpha")
    if alpha is not None and not alpha["given"]:
        which = {0.0: " (the base itself)", 1.0: " (the run itself)"}.get(alpha["model"], "")
        chosen = f"{claim.cite('alpha/model', 'g')}{which}"
        claim.text += f"; of the models between the two, alpha {chosen} was chosen on dev"
    claim.text += "."
    return claim


def _kind(gallery: Mapping[str, Any]) -> str:
    """What a data set is to the run, in a word or two."""
    return "own data" if gallery["own"] else "other data" if gallery["foreign"] else "not its own data"


def _where(claim: CitedSentence, number: int) -> str:
    """The gallery that a sentence is about, and what is known of it."""
    gallery = claim.document["galleries"][number]
    if gallery["own"]:
        kind = "the data that it was tuned on"
    elif not gallery["foreign"]:
        kind = "another data set than it was tuned on"
    elif gallery["own_images"]:
        own, images = (claim.cite(f"galleries/{number}/{name}", ",d") for name in ("own_images", "images"))
        kind = f"of whose {images} images {own} are of the data that it was tuned on"
    else:
        kind = "data that it was not tuned on"
    return f"On the {gallery['split']} split of {as_code(Path(gallery['data']).name)}, {kind},"


def _difference_claim(document: Mapping[str, Any], number: int, position: int) -> CitedSentence:
    gallery = document["galleries"][number]
    row, path = gallery["differences"][position], f"galleries/{number}/differences/{position}"
    claim = CitedSentence(document, "loss" if gallery["foreign"] else "gain")
    other = "the base" if row["b"] == "base" else "the blend"
    if row["p"] is None:
        claim.text = (
            f"{_where(claim, number)} the run was not tested against {other}, as there are too few images: "
            f"{claim.cite_interval(path)} in rsum."
        )
    elif not row["shown"]:
        claim.text = (
            f"{_where(claim, number)} no difference between the run and {other} was shown: {claim.cite_interval(path)} "
            f"in rsum (p = {claim.cite_p_value(f'{path}/p_holm')} after Holm's correction)."
        )
    else:
        sign = 1.0 if row["value"] > 0 else -1.0
        word = "more" if sign > 0 else "less"
        claim.text = (
            f"{_where(claim, number)} the run finds {word} than {other}: {claim.cite_interval(path, sign)} in rsum "
            f"(p = {claim.cite_p_value(f'{path}/p_holm')} after Holm's correction)."
        )
    return claim


def _kept_claim(document: Mapping[str, Any], number: int) -> CitedSentence:
    """The rsum of run and blend as shares of the base's."""
    gallery = document["galleries"][number]
    claim = CitedSentence(document, "share of the base")
    parts = []
    for name, kept in gallery["kept"].items():
        if kept["value"] is not None:
            parts.append(f"the {name} has {_cite_share(claim, f'galleries/{number}/kept/{name}')}")
    base = claim.cite(f"galleries/{number}/base/rsum/value")
    chance = claim.cite(f"galleries/{number}/chance")
    shares = f", of which {' and '.join(parts)}" if parts else ""
    claim.text = f"{_where(claim, number)} the base has an rsum of {base} (a random ranking: {chance}){shares}."
    return claim


def _cite_share(claim: CitedSentence, path: str) -> str:
    """A share in percent with its interval, where it has one."""
    value = claim.cite(f"{path}/value", factor=100.0)
    name, number = path.rsplit("/", 1)[1], int(path.split("/")[1])
    if claim.document["galleries"][number]["kept"][name]["low"] is None:
        return f"{value} % (no interval)"
    low, high = (claim.cite(f"{path}/{end}", factor=100.0) for end in ("low", "high"))
    return f"{value} % [{low}, {high}]"


def _blend_claim(document: Mapping[str, Any]) -> CitedSentence:
    """Which model between the two was taken."""
    claim = CitedSentence(document, "blend")
    alpha = document["alpha"]
    which = {0.0: ", the base itself", 1.0: ", the run itself"}.get(alpha["model"], "")
    verb = "given" if alpha["given"] else "chosen on dev"
    claim.text = f"Of the models between the base and the run, alpha {claim.cite('alpha/model', 'g')} was {verb}{which}"
    if alpha["keep"] is not None:
        claim.text += f", of those that keep {claim.cite('alpha/keep', 'g', 100.0)} % of the base's rsum on other data"
    if alpha["halves"] and document["split"] == "dev" and not alpha["given"]:
        halves = " and ".join(claim.cite(f"alpha/halves/{half}", "g") for half in range(len(alpha["halves"])))
        claim.text += f" (by the halves of dev: {halves})"
    claim.text += "."
    return claim


def _classes_claim(document: Mapping[str, Any], number: int) -> CitedSentence:
    """The zero-shot accuracy of run and base on class folders; a difference where its interval is on one side of 0."""
    block, path = document["classes"][number], f"classes/{number}"
    claim = CitedSentence(document, "classification")
    gain = block["difference"]["top_1"]
    run, base = (claim.cite(f"{path}/{name}/top_1/value", factor=100.0) for name in ("run", "baseline"))
    chance = claim.cite(f"{path}/run/chance/top_1", factor=100.0)
    where = f"Of the images of {as_code(Path(block['run']['data']).name)} ({block['run']['split']})"
    claim.text = (
        f"{where} the run assigns {run} % to their class, zero-shot, and the base {base} % (chance: {chance} %): "
    )
    is_loss = gain["high"] is not None and gain["high"] < 0
    interval = claim.cite_interval(f"{path}/difference/top_1", -100.0 if is_loss else 100.0)
    if gain["low"] is None:
        claim.text += f"a difference of {interval} points, not tested, as there are too few images."
    elif gain["low"] > 0 or is_loss:
        claim.text += f"{interval} points {'less' if is_loss else 'more'}."
    else:
        claim.text += f"no difference was shown, {interval} points."
    return claim


def _curve_claim(document: Mapping[str, Any]) -> CitedSentence:
    """What twice the captions would bring; whether the curve predicts the run itself."""
    curve, claim = document["learning_curve"], CitedSentence(document, "learning curve")
    twice, test = curve["twice"], curve["test"]
    captions = f"{claim.cite('learning_curve/twice/captions', ',d')} in place of "
    last = len(curve["points"]) - 1
    captions += claim.cite(f"learning_curve/points/{last}/captions", ",d")
    gain, low, high = (claim.cite(f"learning_curve/twice/{name}", "+.1f") for name in ("gain", "gain_low", "gain_high"))
    figures = f"{gain} [{low}, {high}] in rsum, 90 % interval"
    if twice["gain_low"] > 0:
        claim.text = f"Twice the captions ({captions}) would bring {figures}"
    elif twice["gain_high"] < 0:
        claim.text = f"Twice the captions ({captions}) would cost rsum: {figures}"
    else:
        claim.text = f"That twice the captions ({captions}) would bring more is not shown: {figures}"
    if not test["holds"]:
        value, low, high = (claim.cite(f"learning_curve/test/{name}") for name in ("value", "low", "high"))
        claim.text += (
            f"; but fewer captions did not predict this run, {value} [{low}, {high}] in place of "
            f"{claim.cite('learning_curve/test/measured')}"
        )
    if curve["start"]:
        seen = claim.cite("learning_curve/start/images", ",d")
        images = claim.cite(f"learning_curve/points/{last}/images", ",d")
        claim.text += (
            f"; but the start of these trainings was trained on {seen} of the {images} images before, so that those on "
            "fewer captions have seen more than these, and a gain by more may be underestimated"
        )
    claim.text += "."
    return claim
