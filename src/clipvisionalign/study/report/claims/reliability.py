"""Sentences about what limits the figures: equal and truncated captions, audits, missing trials and parts."""

from __future__ import annotations

from clipvisionalign.models.pretrained.known_checkpoints import DATA_SETS
from clipvisionalign.retrieval.equal_captions import describe_equal_captions
from clipvisionalign.study.gaps import NOT_MEASURED, NOT_TRAINED, UNFINISHED
from clipvisionalign.study.report.claims.claim import Claim, as_code, join_words, list_names
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import TrialReason
from clipvisionalign.study.report.states import trials_without_results


def equal_caption_claims(report: StudyReport) -> list[Claim]:
    """Equal captions of different images, where they lower the highest rsum.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    # Reports from before they were counted have none.
    equal = report.data.equal_captions
    if not equal or not equal.cost:
        return []
    claim = Claim(report, "belief")
    path = "data/equal_captions"
    captions, texts, images = (claim.cite_with_noun(f"{path}/{noun}s", noun) for noun in ("caption", "text", "image"))
    best, cost = claim.cite(f"{path}/best_rsum"), claim.cite(f"{path}/cost")
    way_out = "`identity: caption` in the plan"
    if report.data.texts == "joined":
        way_out = f"`captions: each` with {way_out}"
    claim.text = f"{describe_equal_captions(captions, texts, images, best, cost, way_out)}."
    return [claim]


def near_duplicate_claims(report: StudyReport) -> list[Claim]:
    """Images of the gallery that are nearly the same, and how they count.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    if report.results.near_duplicates is None:
        return []
    claim = Claim(report, "belief")
    images, groups = (claim.cite_with_noun(f"results/near_duplicates/{noun}s", noun) for noun in ("image", "group"))
    claim.text = f"{images} of the gallery are near-duplicates, in {groups}: a group counts as one in intervals and p."
    return [claim]


def pretraining_claims(report: StudyReport) -> list[Claim]:
    """Whether public sets are in what a variant's model was pretrained on, as far as it is known.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for model in report.pretraining:
        claim = Claim(report, "belief")
        by_status: dict[str, list[str]] = {}
        for name, label in DATA_SETS.items():
            by_status.setdefault(getattr(model, name), []).append(label)
        sets = "; ".join(f"{status}: {list_names(labels)}" for status, labels in by_status.items())
        known = "" if model.known else "what it was trained on is not known; "
        claim.text = (
            f"{list_names(model.variants)} {'starts' if len(model.variants) == 1 else 'start'} from the pretrained "
            f"{as_code(model.model)}, and a figure on images of its pretraining data is no zero-shot figure: {known}"
            f"of the public sets, {sets}."
        )
        claims.append(claim)
    return claims


def seal_claims(report: StudyReport) -> list[Claim]:
    """When a sealed plan was sealed, and how often its split was looked at.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    if report.seal is None:
        return []
    claim = Claim(report, "belief")
    seal = report.seal
    sealed = f"The plan was sealed before its first training ({as_code(seal.at)}, SHA-256 {as_code(seal.plan)})"
    if not seal.looks:
        unopened = f"its {seal.split} split has not been opened"
        if report.results.variants:
            unopened = f"no look at its {seal.split} split is written down, and there are figures of it"
        claim.text = f"{sealed}; {unopened}."
        return [claim]
    opened = f"its {seal.split} split was opened at {as_code(seal.looks[0].at)}"
    if not seal.further:
        each = (
            "for the one run" if len(seal.runs) == 1 else f"once for each of {claim.cite_with_noun('seal/runs', 'run')}"
        )
        claim.text = f"{sealed}, and {opened}, {each}."
        return [claim]
    runs = list_names(list(dict.fromkeys(entry.run for entry in seal.further)))
    claim.text = (
        f"{sealed}; {opened}, and there {'was' if len(seal.further) == 1 else 'were'} "
        f"{claim.cite_with_noun('seal/further', 'further look')} at it, after which figures may have been chosen: "
        f"of {runs}."
    )
    return [claim]


def truncation_claims(report: StudyReport) -> list[Claim]:
    """Captions that a variant truncates.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for name, truncation in report.cut_captions.items():
        cut = {split: counts for split, counts in truncation.splits.items() if counts.cut}
        if not cut:
            continue
        claim = Claim(report, "belief")
        path = f"cut_captions/{name}"
        limit = claim.cite_with_noun(f"{path}/max_tokens", "token")
        split_counts = ", ".join(
            f"{claim.cite(f'{path}/splits/{split}/cut', ',d')} of the {split} split "
            f"({claim.cite(f'{path}/splits/{split}/share', factor=100.0)} %)"
            for split in cut
        )
        claim.text = (
            f"{as_code(name)} reads the first {limit} of a caption; longer ones, which are cut: {split_counts}."
        )
        claims.append(claim)
    return claims


def audit_claims(report: StudyReport) -> list[Claim]:
    """Audits, and trials that were refused or failed.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claim = Claim(report, "belief")
    refused, failed = report.results.refused, report.failed
    variants = report.results.variants
    runs = sum(len(variant.runs) for variant in variants.values())
    sentences = ["No run has a result." if not runs else "The one run in the results passed its audit."]
    if runs > 1:
        sentences = ["Every run in the results passed its audit."]
    if refused:
        sentences.append(f"Refused, as the audit failed: {list_names([_trial_name(row) for row in refused])}.")
    if failed:
        sentences.append(f"Failed, and in no figure: {list_names([_trial_name(row) for row in failed])}.")
    if any(len(variant.seeds) == 1 for variant in variants.values()):
        sentences.append("A variant of one seed is no evidence of what another seed would have given.")
    claim.text = " ".join(sentences)
    return [claim]


def missing_claims(report: StudyReport) -> list[Claim]:
    """What is not there that the plan asks for, beside what failed or was refused.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    trials = trials_without_results(report)
    sentences = [
        f"{intro}: {list_names([_trial_name(trial) for trial in trials if trial.state == state])}."
        for state, intro in STATE_SENTENCES.items()
        if any(trial.state == state for trial in trials)
    ]
    parts = list(dict.fromkeys(gap.part for gap in report.missing_parts))
    if parts:
        sentences.append(f"Not made, or not for all: {join_words(parts)}.")
    if not sentences:
        return []
    claim = Claim(report, "belief")
    claim.text = " ".join([*sentences, "The table below has the reasons."])
    return [claim]


#: How the summary describes cells that have no figures and did not fail.
STATE_SENTENCES = {
    UNFINISHED: "Stopped in its training, and in no figure",
    NOT_MEASURED: "Trained, but not measured, and in no figure",
    NOT_TRAINED: "Not begun",
}


def _trial_name(row: TrialReason) -> str:
    return f"{as_code(row.variant)} seed {row.seed}"
