"""Every family of timm's backbones as an image tower, at its own size and at another: built, or refused in one line.

    python benchmarks/towers.py [FAMILY ...]

Takes one small backbone of each of timm's modules, without memory for its weights (PyTorch's meta device). Ends with
status 1 if one of them ends in anything but a tower or a ValueError of one line. About two minutes.
"""

from __future__ import annotations

import re
import sys
import warnings

import torch

from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig

#: Parts of names that small backbones have, the smallest first.
_SMALL = (
    "test_", "atto", "femto", "pico", "zepto", "nano", "xxs", "xx_small", "_xs", "extra_tiny", "tiny", "_t0", "_s0",
    "_b0", "_m1", "_ti", "_t", "mini", "small", "_s", "18", "10", "14", "050",
)  # fmt: skip


def smallest(names: list[str]) -> str:
    """The backbone whose name promises the fewest parameters and pixels."""

    def rank(name: str) -> tuple[int, int, str]:
        size = re.search(r"_(\d{3})$", name)
        index = next((index for index, part in enumerate(_SMALL) if part in name), len(_SMALL))
        return index, int(size[1]) if size else 224, name

    return min(names, key=rank)


def another_size(own: int) -> int:
    """A size that most backbones can take beside their own: a multiple of 32."""
    return 192 if own != 192 else 160


def outcome(name: str, size: int) -> tuple[str, bool]:
    """What becomes of a backbone at a size (0 for its own), in a line, and whether that is as it should be."""
    try:
        with torch.device("meta"):
            tower = ImageTower(ImageTowerConfig(name, weights="random", size=size))
    except ValueError as error:
        return f"refused: {error}", "\n" not in str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}", False
    return (
        f"{tower.image_transform.size}: {tower.num_patches} patches of {tower.patch_width}, pooled {tower.width}",
        True,
    )


def main(families: list[str]) -> int:
    """Print a line for each family and size."""
    import timm

    warnings.filterwarnings("ignore")
    good = True
    for family in families or timm.list_modules():
        names = [name for name in timm.list_models(module=family, exclude_filters="") if timm.is_model(name)]
        if not names:
            continue
        name = smallest(names)
        own = timm.get_pretrained_cfg(name).input_size[-1]
        for size in (0, another_size(own)):
            line, well = outcome(name, size)
            good &= well
            print(f"{family:24}{name:36}{'' if well else 'WRONG '}{line}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
