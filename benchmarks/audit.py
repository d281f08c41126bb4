"""Does the audit fail models that leak, and pass those that do not? Twelve leaks, and a thousand honest models.

    python benchmarks/audit.py [--models 1000] [--seed 0] [--json]

Images are vectors that a few words add up to; captions are some of those words, so that a model that knows the words is
good at captions that nobody has written yet. Every leaking model has words that mean nothing: what it finds it finds by
the leak alone. It is evaluated first, as a user would do, so that a model that keeps what it answered has kept the true
partners; then the same model is audited.

Of the honest models an equal share is of each of eight kinds, each with words, gallery and seed of its own. `TOO_MANY`
of a thousand may fail, by chance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from leaking_models import LEAKS
from worlds import WIDTH, Encoder, Scorer, World, unit, world

from clipvisionalign.progress import progress
from clipvisionalign.retrieval import audit, evaluate
from clipvisionalign.retrieval.audit import AuditReport

TOO_MANY = 2


def audited_leak(name: str, seed: int = 0, **options: Any) -> tuple[float, AuditReport]:
    """A leaking model's rsum, which comes first, and its audit."""
    data, model = world(seed), LEAKS[name](seed + 1)
    rsum = data.ask(evaluate, model, resamples=0).metrics.rsum.value
    return rsum, data.ask(audit, model, seed=seed, **options)


class Constant(Encoder):
    """Says the same of every caption, but for float32's rounding, which is another in each call."""

    def encode_captions(self, captions: Any) -> Any:
        noise = np.random.default_rng(len(captions)).standard_normal((len(captions), WIDTH))
        return (unit(np.ones((len(captions), WIDTH))) * (1 + 1e-7 * noise)).astype(np.float32)


class Ties(Scorer):
    """Scores of a few steps: most pairs tie."""

    def score(self, images: Any, captions: Any) -> Any:
        return np.round(3 * super().score(images, captions))


class BFloat16(Encoder):
    """Computed in bfloat16, which rounds otherwise in every batch. given: "bfloat16", "widened" to float32, or "unit"
    length, to which it is brought in float32."""

    calls, given = 0, "bfloat16"

    def rounded(self, vectors: np.ndarray) -> Any:
        import torch

        self.calls += 1
        noise = np.random.default_rng((self.seed, self.calls)).uniform(-1, 1, vectors.shape)
        noisy = torch.from_numpy(vectors * (1 + 2.0**-8 * noise)).to(torch.bfloat16)
        if self.given == "unit":
            return torch.nn.functional.normalize(noisy.float(), dim=-1)
        return noisy.float() if self.given == "widened" else noisy

    def encode_images(self, images: Any) -> Any:
        return self.rounded(self.see(images))

    def encode_captions(self, captions: Any) -> Any:
        return self.rounded(self.read(captions))


class CrossScorer(Scorer):
    """Every pair through a small network of its own."""

    def score(self, images: Any, captions: Any) -> Any:
        image_vectors, read = self.see(images), self.read(captions)
        mix = np.random.default_rng(self.seed).standard_normal((WIDTH, WIDTH)) / WIDTH
        hidden = np.tanh(3 * image_vectors[:, None] * read[None, :] @ mix)
        return 5 * image_vectors @ read.T + hidden.sum(axis=2)


class Int8(Encoder):
    """Captions rounded to 8 bits of the batch's own range: honest, but a vector depends on its batch."""

    def encode_captions(self, captions: Any) -> Any:
        read = self.read(captions)
        step = np.abs(read).max() / 127
        return (np.round(read / step) * step).astype(np.float32)


def uneven(rng: np.random.Generator, images: int) -> np.ndarray:
    """Numbers of captions of which some are much larger than most."""
    return np.minimum(1 + rng.geometric(0.45, images) ** 2 // 2, 30)


def with_identities(rng: np.random.Generator, seed: int) -> World:
    """Images of which some are one and some have no caption of their own; captions of which some are equal."""
    images = int(rng.integers(24, 70))
    data = world(seed, images, rng.integers(1, 5, images))
    identity = np.arange(images)
    duplicates = rng.choice(images, images // 4, replace=False)
    identity[duplicates] = rng.choice(np.setdiff1d(np.arange(images), duplicates), len(duplicates))
    bare = duplicates[: len(duplicates) // 2]
    kept = ~np.isin(data.owners, bare)
    captions = [caption for caption, keep in zip(data.captions, kept, strict=True) if keep]
    for caption in rng.choice(len(captions), 6, replace=False):
        captions[caption] = captions[0]
    group = np.unique(captions, return_inverse=True)[1] if seed % 2 else None
    return World(data.images, captions, data.owners[kept], identity, group)


def honest(kind: str, seed: int) -> tuple[Any, World]:
    """A model of a kind and what it is audited on."""
    rng = np.random.default_rng((seed, 7))
    images = int(rng.integers(10, 70))
    even = world(seed, images, int(rng.integers(1, 6)))
    one = [Encoder, Scorer][seed % 2]
    if kind == "random vectors":
        return one(seed + 1), even
    if kind == "good":
        return one(seed, float(rng.uniform(0, 4))), even
    if kind == "constant":
        return Constant(seed), world(seed, images, uneven(rng, images))
    if kind == "ties":
        return Ties(seed + seed % 3), world(seed, images, uneven(rng, images))
    if kind == "bfloat16":
        model = BFloat16(seed, float(rng.uniform(0, 4)))
        model.given = ("bfloat16", "widened", "unit")[seed % 3]
        return model, even
    if kind == "pair by pair":
        return CrossScorer(seed + seed % 2), even
    if kind == "uneven captions":
        return one(seed + seed % 3), world(seed, images, uneven(rng, images))
    if kind == "identities, equal captions":
        return one(seed + seed % 3), with_identities(rng, seed)
    raise ValueError(f"no kind '{kind}'")


KINDS = ("random vectors", "good", "constant", "ties", "bfloat16", "pair by pair", "uneven captions",
         "identities, equal captions")  # fmt: skip


def audited_honest(models: int, seed: int = 0) -> Iterator[tuple[str, int, AuditReport | Exception]]:
    """(kind, seed, its report) of an equal number of models of each kind; an error stands for its report."""
    for number in range(models):
        kind, own = KINDS[number % len(KINDS)], seed * 1_000_000 + number // len(KINDS)
        model, data = honest(kind, own)
        try:
            yield kind, own, data.ask(audit, model, seed=own, sample=(24, 48)[own % 2])
        except Exception as error:
            yield kind, own, error


def failed(report: AuditReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=1000, help="honest models")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    leaks = {}
    for name in LEAKS:
        rsum, report = audited_leak(name, given.seed)
        leaks[name] = {"rsum": round(rsum, 1), "failed": failed(report)}
    kinds = {kind: {"models": 0, "failed": []} for kind in KINDS}
    for kind, seed, report in progress(audited_honest(given.models, given.seed), "honest models", given.models, True):
        row: dict[str, Any] = kinds[kind]
        row["models"] += 1
        if isinstance(report, Exception):
            row["failed"].append({"seed": seed, "check": "error", "reason": f"{type(report).__name__}: {report}"})
            continue
        row["failed"] += [
            {"seed": seed, "check": check.name, "reason": check.meaning} for check in report.checks if not check.passed
        ]
    count = sum(len({each["seed"] for each in row["failed"]}) for row in kinds.values())
    int8 = world(given.seed).ask(audit, Int8(given.seed), seed=given.seed)
    reasons = {check.name: check.meaning for check in int8.checks if not check.passed}
    if given.json:
        results = {"leaks": leaks, "honest": kinds, "honest_failed": count, "int8": reasons}
        print(json.dumps(results, indent=2))
    else:
        print("| a model that leaks | rsum | failed |\n|---|---:|---|")
        for name, result in leaks.items():
            print(f"| {name} | {result['rsum']:.0f} | {', '.join(result['failed']) or 'none: PASSED'} |")
        print("\n| honest models | number | failed |\n|---|---:|---:|")
        for kind, row in kinds.items():
            print(f"| {kind} | {row['models']} | {len({each['seed'] for each in row['failed']})} |")
        for kind, row in kinds.items():
            for each in row["failed"]:
                print(f"\n{kind}, seed {each['seed']}, {each['check']}: {each['reason']}")
        print("\nint8 with the ranges of a batch fails:")
        for name, reason in reasons.items():
            print(f"- {name}: {reason}")
    missed = [name for name, result in leaks.items() if not result["failed"]]
    if missed or count > TOO_MANY:
        raise SystemExit(f"not detected: {', '.join(missed) or 'none'}; honest models that failed: {count}")


if __name__ == "__main__":
    main()
