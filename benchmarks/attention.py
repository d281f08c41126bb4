"""What attention costs: text encoders by caption length, and the ways to score pairs; against rivals, in one run.

    python benchmarks/attention.py [--only linear,exact,encode,twins,memory,pairs] [--json] [--plot attention.png]

Same random weights, same inputs, float32, no gradients. The contestants of a row take turns; each figure is the median
of five turns after a warm-up, with the fastest and the slowest. A ratio is the median of the turns' own ratios. Memory
is the peak of a fresh process above what it held with its model loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_plot import plot
from encoders import WINDOW, rival_longformer, save_encoder, tokens, tower
from timing import TURNS, peak, ratio, spread, summary, take_turns

ENCODE = ((8, 8), (8, 20), (8, 64), (8, 250), (1, 512), (1, 1024), (1, 2048), (1, 4096))
EDGES = (1, 20, 257, 258, 511, 512, 513, 1023, 1025, 4096)
MEMORY = (512, 1024, 2048, 4096)
WORDS = ("dog", "grass", "two", "children", "in", "red", "shirts", "look", "on", "from", "a", "wooden", "bench")
SECTIONS = ("linear", "exact", "encode", "twins", "memory", "pairs")


def linear(folder: Path) -> list[dict[str, Any]]:
    """A linear layer as PyTorch has it against one with packed weights, by tokens."""
    from clipvisionalign.models.packed_linear import pack_linears

    rows = []
    for width, wide in ((384, 1536), (768, 3072)):
        plain, packed = (torch.nn.Sequential(torch.nn.Linear(width, wide)).eval() for _ in range(2))
        pack_linears(packed)
        for count in (8, 64, 512, 4096):
            x = torch.randn(count, width)
            repeats = max(1, 4096 // count)
            seconds = take_turns(
                {
                    "plain": lambda x=x, work=plain, n=repeats: [work(x) for _ in range(n)],  # type: ignore[misc]
                    "packed": lambda x=x, work=packed, n=repeats: [work(x) for _ in range(n)],  # type: ignore[misc]
                }
            )
            speedup = ratio(seconds["plain"], seconds["packed"])
            rows.append({"width": width, "wide": wide, "tokens": count, "plain over packed": speedup})
    return rows


def exact(folder: Path) -> dict[str, Any]:
    """Longformer here against transformers': the greatest differences of outputs and gradients, by length."""
    from clipvisionalign.models.longformer import Longformer

    rival = rival_longformer(folder)
    ours = Longformer.from_pretrained(save_encoder("longformer", folder)).eval()
    rows = []
    for length in EDGES:
        # The first token global without padding, none and several with padding.
        for global_positions, padded in (([0], False), ([], True), ([0, length // 3, length - 1], True)):
            lengths = [length, max(1, length * 2 // 3)] if padded else None
            ids, mask, global_attention_mask = tokens(2 if padded else 1, length, lengths)
            global_attention_mask.zero_()
            global_attention_mask[:, global_positions] = 1
            with torch.no_grad():
                theirs = rival(ids, attention_mask=mask, global_attention_mask=global_attention_mask)
                hidden_states = ours(ids, mask, global_attention_mask)
                first = ours(ids, mask, global_attention_mask, first_only=True)
                pooled = ours.pool(hidden_states)
            rows.append(
                {
                    "length": length, "global": len(global_positions), "padded": padded,
                    "states": float((hidden_states - theirs.last_hidden_state).abs().max()),
                    "first": float((first - theirs.last_hidden_state[:, :1]).abs().max()),
                    "pooled": float((pooled - theirs.pooler_output).abs().max()),
                }
            )  # fmt: skip
    gradients = []
    for length in (20, 300, 513, 1025):
        ids, mask, global_attention_mask = tokens(1, length)
        weights = torch.randn(1, length, 768, generator=torch.Generator().manual_seed(0))
        rival.zero_grad()
        ours.zero_grad()
        (
            rival(ids, attention_mask=mask, global_attention_mask=global_attention_mask).last_hidden_state * weights
        ).sum().backward()
        (ours(ids, mask, global_attention_mask) * weights).sum().backward()
        worst = 0.0
        for number, layer in enumerate(rival.encoder.layer):
            own, published = ours.layers[number], layer.attention.self
            joined = torch.cat([getattr(published, name).weight.grad for name in ("query", "key", "value")])
            pairs = [
                (own.attention.query_key_value.weight.grad, joined),
                (own.attention.query_global.weight.grad, published.query_global.weight.grad),
                (own.attention.key_global.weight.grad, published.key_global.weight.grad),
                (own.attention.value_global.weight.grad, published.value_global.weight.grad),
                (own.up.weight.grad, layer.intermediate.dense.weight.grad),
                (own.down.weight.grad, layer.output.dense.weight.grad),
            ]
            worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in pairs))
        gradients.append({"length": length, "relative": worst})
    return {"outputs": rows, "gradients": gradients}


def encode(folder: Path) -> list[dict[str, Any]]:
    """Encode times by caption length."""
    theirs, ours, distil = rival_longformer(folder), tower("longformer", folder), tower("distilbert", folder)
    rows = []
    for batch, length in ENCODE:
        ids, mask, first = tokens(batch, length)
        contestants: dict[str, Callable[[], Any]] = {
            "transformers": partial(theirs, ids, attention_mask=mask, global_attention_mask=first),
            "here, all tokens": partial(ours, ids, mask, want_tokens=True),
            "here, first token": partial(ours, ids, mask, want_tokens=False),
        }
        if length <= 512:
            contestants["DistilBERT"] = partial(distil, ids, mask, want_tokens=False)
        seconds = take_turns(contestants)
        row = {
            "batch": batch, "length": length, "ms": {name: summary(times) for name, times in seconds.items()},
            "transformers over here, all tokens": ratio(seconds["transformers"], seconds["here, all tokens"]),
            "transformers over here, first token": ratio(seconds["transformers"], seconds["here, first token"]),
        }  # fmt: skip
        if length <= 512:
            row["here, first token over DistilBERT"] = ratio(seconds["here, first token"], seconds["DistilBERT"])
        rows.append(row)
    return rows


def sliding_window_variants(folder: Path) -> list[dict[str, Any]]:
    """Dense encoders against their sliding twins at window 64: the attention alone, and the whole encoder."""
    from clipvisionalign.models.attention import attention

    rows = []
    for kind, heads, head in (("minilm", 12, 32), ("distilbert", 12, 64)):
        from clipvisionalign.models.sliding_window import extend_positions

        dense, sliding = tower(kind, folder), tower(kind, folder, "sliding")
        # The dense rival needs positions of the same number, or it could not read 4,096 tokens at all.
        extend_positions(dense.encoder)
        for length in (64, 512, 1024, 2048, 4096):
            q, k, v = (torch.randn(1, length, heads, head).transpose(1, 2) for _ in range(3))
            global_positions = torch.zeros(1, 1, dtype=torch.long)
            ids, mask, _ = tokens(1, length)
            alone = take_turns(
                {
                    "dense": partial(attention, q, k, v),
                    "sliding": partial(attention, q, k, v, window=WINDOW, global_positions=global_positions),
                }
            )
            encoder_seconds = take_turns(
                {
                    "dense": partial(dense, ids, mask, want_tokens=False),
                    "sliding": partial(sliding, ids, mask, want_tokens=False),
                }
            )
            rows.append(
                {
                    "encoder": kind, "length": length,
                    "ms": {name: summary(times) for name, times in encoder_seconds.items()},
                    "attention ms": {name: summary(times) for name, times in alone.items()},
                    "dense over sliding": ratio(encoder_seconds["dense"], encoder_seconds["sliding"]),
                    "attention, dense over sliding": ratio(alone["dense"], alone["sliding"]),
                }
            )  # fmt: skip
    return rows


def one_memory(kind: str, length: int, folder: Path) -> float:
    """MiB above the loaded model that one encoding takes in this process."""
    from clipvisionalign.models.sliding_window import extend_positions

    ids, mask, first = tokens(1, length)
    if kind == "transformers Longformer":
        theirs = rival_longformer(folder)
        work: Callable[[], Any] = partial(theirs, ids, attention_mask=mask, global_attention_mask=first)
    else:
        name, _, attention = kind.partition(", ")
        ours = tower(name, folder, attention or "dense")
        if name != "longformer":
            extend_positions(ours.encoder)
        work = partial(ours, ids, mask, want_tokens=False)
    with torch.inference_mode():
        if kind == "transformers Longformer":
            theirs(*(x[:, :8] for x in (ids, mask)))
        else:
            ours(ids[:, :8], mask[:, :8])
        # The kernel forgets the peak of the loading.
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        work()
    return (peak() - before) / 2**20


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of one encoding by length, each in a fresh process."""
    rows = []
    for kind in ("transformers Longformer", "longformer", "minilm, dense", "minilm, sliding", "distilbert, sliding"):
        save_encoder("longformer" if "ongformer" in kind else kind.partition(",")[0], folder)
        peaks = []
        for length in MEMORY:
            command = [sys.executable, __file__, "--one", kind, str(length), str(folder)]
            peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        growth = [b / a for a, b in itertools.pairwise(peaks)]
        rows.append({"encoder": kind, "lengths": list(MEMORY), "mib": peaks, "growth per doubling": growth})
    return rows


def pairs(folder: Path) -> dict[str, Any]:
    """Milliseconds per 1,000 pairs, and the memory of the late interaction over 5,000 x 1,000."""
    from clipvisionalign.models.aligner import Aligner, AlignerConfig
    from clipvisionalign.models.image_tower import ImageFeatures
    from clipvisionalign.models.pair_scorer import PairScorer

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, size=rng.integers(5, 18))) for _ in range(1000)]
    result: dict[str, Any] = {}
    scorers = {}
    for design in ("late", "cross"):
        aligner = Aligner(AlignerConfig(design=design)).eval()  # type: ignore[arg-type]
        if aligner.fusion is not None:
            torch.nn.init.normal_(aligner.fusion.correction.weight)
        # Images are not what is measured: their features are drawn, not encoded.
        width, count = aligner.image_tower.width, aligner.image_tower.num_patches
        features = ImageFeatures(torch.randn(1000, width), torch.randn(1000, count, width))
        with torch.inference_mode():
            images = aligner.encode_images_for_pairs([aligner.embed_image_features(features)])
            scorers[design] = PairScorer(aligner, images, aligner.encode_captions_for_pairs(captions))
    # 32 candidates for each of 1,000 captions.
    index = rng.integers(1000, size=32_000), np.repeat(np.arange(1000), 32)
    for design, scorer in scorers.items():
        seconds = take_turns({design: partial(scorer, *index)})[design]
        result[f"{design}, candidates"] = summary([turn / 32 for turn in seconds])
    result["cross, projections of 1,000 pictures for 32,000 pairs"] = scorers["cross"].projection_count
    late = scorers["late"]
    seconds = take_turns({"late": late.score_matrix})["late"]
    result["late, whole table"] = summary([turn / 1000 for turn in seconds])
    result["dual encoder, whole table"] = summary(
        [turn / 1000 for turn in take_turns({"dual": lambda: late.image_vectors @ late.caption_vectors.T})["dual"]]
    )
    large = PairScorer(late.aligner, late.images, late.captions * 5)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with torch.inference_mode():
        table = large.score_matrix()
    result["late, 5,000 x 1,000, MiB above inputs"] = (peak() - before) / 2**20
    assert table.shape == (1000, 5000)
    return result


def tell(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; float32; medians [fastest, slowest] of {TURNS} turns")
    if "linear" in result:
        print("\nlinear layers, plain over packed weights")
        for row in result["linear"]:
            text = spread(row["plain over packed"], 2)
            print(f"  {row['width']} to {row['wide']}, {row['tokens']:>5} tokens: {text}")
    if "exact" in result:
        rows, gradients = result["exact"]["outputs"], result["exact"]["gradients"]
        print(
            f"\nLongformer here against transformers', base size, {len(rows)} cases, lengths {EDGES[0]} to {EDGES[-1]}"
        )
        for name in ("states", "first", "pooled"):
            worst = max(rows, key=lambda row: row[name])
            print(f"  {name:<8} differ by at most {worst[name]:.1e} (length {worst['length']})")
        print(
            "  gradients " + ", ".join(f"{row['relative']:.1e} at {row['length']}" for row in gradients) + " relative"
        )
    if "encode" in result:
        print("\nencoding, milliseconds a batch                transformers   here, all tokens  here, first token")
        for row in result["encode"]:
            ms = row["ms"]
            cells = [
                f"{ms[name]['median']:>17.1f}" for name in ("transformers", "here, all tokens", "here, first token")
            ]
            print(f"  Longformer, {row['batch']} x {row['length']:>5} tokens     {''.join(cells)}")
            for name in ("transformers over here, all tokens", "transformers over here, first token"):
                print(f"      {name:<38} {spread(row[name])}")
            if "DistilBERT" in ms:
                text = spread(row["here, first token over DistilBERT"], 2)
                print(f"      here, first token over DistilBERT      {text} ({ms['DistilBERT']['median']:.1f} ms)")
    if "twins" in result:
        print(f"\nsliding twins, window {WINDOW}, first token global: dense over sliding")
        for row in result["twins"]:
            encoder_ratio, alone = spread(row["dense over sliding"]), spread(row["attention, dense over sliding"])
            print(f"  {row['encoder']:<10} {row['length']:>5} tokens: encoder {encoder_ratio}, attention alone {alone}")
    if "memory" in result:
        print("\npeak memory above the loaded model, MiB, at " + ", ".join(f"{length:,}" for length in MEMORY))
        for row in result["memory"]:
            growth = ", ".join(f"{value:.2f}" for value in row["growth per doubling"])
            print(f"  {row['encoder']:<25} {', '.join(f'{value:.0f}' for value in row['mib'])} (times {growth})")
    if "pairs" in result:
        print("\nmilliseconds per 1,000 pairs")
        for name, value in result["pairs"].items():
            print(f"  {name:<55} {spread(value, 3) if isinstance(value, dict) else f'{value:,.0f}'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", help="draw time and memory by length into this file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, length, folder = given.one
        print(one_memory(kind, int(length), Path(folder)))
        return
    from clipvisionalign.models.device import machine_info

    chosen = given.only.split(",")
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        parser.error(f"no section '{', '.join(sorted(unknown))}'; there are {', '.join(SECTIONS)}")
    where = machine_info()
    sections: dict[str, Callable[[Path], Any]] = {
        "linear": linear,
        "exact": exact,
        "encode": encode,
        "twins": sliding_window_variants,
        "memory": memory,
        "pairs": pairs,
    }
    result: dict[str, Any] = {"machine": f"{where['processor']}, {where['threads']} threads, {where['instructions']}"}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            result[name] = sections[name](Path(folder))
    if given.plot:
        plot(result, given.plot)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        tell(result)


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/attention.py", in_terminal=False):
        main()
