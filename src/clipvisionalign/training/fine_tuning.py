"""Fine-tuning: frozen parameters, LoRA, layer-wise learning rates."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from clipvisionalign.models.aligner import PAIR_SCORER_PREFIXES, Aligner
from clipvisionalign.models.image_tower import ImageTower
from clipvisionalign.models.longformer import Longformer
from clipvisionalign.models.pretrained import PretrainedImageTower

#: A layer's number in the names of transformers' encoders and of ours.
LAYER = re.compile(r"\.(?:layer|layers|block|blocks|resblocks|h)\.(\d+)\.")

#: What `freeze` keeps the image tower as it is.
IMAGE_FROZEN = ("image", "both", "all")

#: And the text tower.
TEXT_FROZEN = ("text", "both", "all")

#: Classes of open_clip that hand the weights of their inner layers to a function.
FUNCTIONAL_ATTENTION = ("AttentionPool2d",)

#: Longformer multiplies with these weights themselves, not through the modules that an adapter replaces.
LORA_EXCLUDED = ("key_global", "value_global")


@dataclass
class LoraConfig:
    """Low-rank adapters beside a tower's frozen weights (Hu et al., "LoRA", arXiv:2106.09685), merged on export.

    Args:
        towers: which towers have them.
        rank: rank of each adapter.
        alpha: an adapter counts alpha / rank.
        dropout: dropout before an adapter, while training.
    """

    towers: Literal["text", "image", "both"] = "text"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0


def freeze(aligner: Aligner, mode: str, patterns: list[str], blocks: int = 0) -> list[str]:
    """Freeze towers, and parameters by name; what a tower had is replaced.

    The embeddings of tokens stay frozen in a text tower that is trained: words that no training caption holds should
    keep their position beside those that some hold.

    Args:
        aligner: The model; it is changed itself.
        mode: "image", "text", "both", "none", or "all" for everything but a fusion.
        patterns: Names of parameters, with *.
        blocks: Number of the image tower's first blocks that stay as they are, with all that comes before them.

    Returns:
        The patterns that froze nothing more.

    Raises:
        ValueError: No parameter has a name that fits a pattern, or the image tower has not so many blocks.
    """
    if mode == "all":
        aligner.requires_grad_(False)
        if aligner.fusion is not None:
            aligner.fusion.requires_grad_(True)
    else:
        aligner.image_tower.requires_grad_(mode not in IMAGE_FROZEN)
        aligner.text_tower.requires_grad_(mode not in TEXT_FROZEN)
        if mode not in TEXT_FROZEN:
            # Words that no training caption holds should keep their place beside those that some hold.
            aligner.text_tower.input_embeddings().requires_grad_(False)
    if blocks:
        parts = divided_tower(aligner, blocks).parts()
        for parameter in parts.early_parameters(blocks):
            parameter.requires_grad_(False)
    names = dict(aligner.named_parameters())
    redundant_patterns = []
    for pattern in patterns:
        matching = [parameter for name, parameter in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            inside = [name for name in names if fnmatchcase(name, f"{pattern}.*")]
            near = difflib.get_close_matches(pattern, names, 4, 0.5) or list(names)[:: max(1, len(names) // 4)][:4]
            hint = f"{pattern}.* are {len(inside)}" if inside else f"there are {', '.join(near)}, ..."
            raise ValueError(f"--freeze_layers {pattern}: no parameter has such a name; {hint}")
        if not any(parameter.requires_grad for parameter in matching):
            redundant_patterns.append(pattern)
        for parameter in matching:
            parameter.requires_grad_(False)
    return redundant_patterns


def divided_tower(aligner: Aligner, blocks: int) -> ImageTower:
    """The image tower of a model, of which some blocks are frozen.

    Args:
        aligner: The model.
        blocks: Their number.

    Returns:
        The tower.

    Raises:
        ValueError: It is not divided into blocks, or into fewer.
    """
    tower = aligner.image_tower
    assert not isinstance(tower, PretrainedImageTower), "settings are refused before (check_settings)"
    count = len(tower.parts().blocks)
    if blocks > count:
        raise ValueError(f"--freeze_blocks {blocks}: {tower.config.name} has {count}; --freeze image freezes all")
    return tower


def set_train_mode(aligner: Aligner, freeze: str, blocks: int = 0) -> None:
    """Put an aligner into the mode in which a step is taken: training, what is frozen as it encodes.

    Args:
        aligner: The model.
        freeze: As `RunConfig.freeze`.
        blocks: As `RunConfig.freeze_blocks`.
    """
    aligner.train()
    set_frozen_eval(aligner, freeze)
    if blocks:
        for module in divided_tower(aligner, blocks).parts().early_modules(blocks):
            module.eval()


def set_frozen_eval(aligner: Aligner, mode: str) -> None:
    """Put frozen towers, and the batch norms of a pretrained image tower, into evaluation mode.

    A frozen tower drops nothing out; with statistics of its own a vector depends on its image alone, in training too,
    and a batch in chunks is the batch. Adapters in a frozen tower are trained, and drop out.

    Args:
        aligner: The model; it is changed itself.
        mode: As `RunConfig.freeze`.
    """
    if mode in IMAGE_FROZEN:
        aligner.image_tower.eval()
    if mode in TEXT_FROZEN:
        aligner.text_tower.eval()
    if mode == "all":
        aligner.image_head.eval()
    if aligner.config.image_tower.weights != "random":
        for module in image_batch_norms(aligner):
            module.eval()
    for name, module in aligner.named_modules():
        # An adapter in a frozen tower is trained, and drops out what it should.
        if name.endswith("lora_dropout"):
            module.train()


def image_batch_norms(aligner: Aligner) -> Iterator[nn.Module]:
    """The batch norms of the image tower.

    Args:
        aligner: The model.

    Yields:
        The modules.
    """
    for module in aligner.image_tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield module


# --- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(aligner: Aligner, config: LoraConfig, frozen_patterns: Sequence[str] = ()) -> None:
    """Freeze towers and put adapters beside their linear and convolution layers.

    Args:
        aligner: The model; it is changed itself.
        config: Which towers, and the adapters' settings.
        frozen_patterns: Names of parameters, with *, whose layers get no adapters.

    Raises:
        ValueError: No layer of a tower is left to be adapted.

    Source: Hu et al., "LoRA", arXiv:2106.09685.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    towers = {"text": aligner.text_tower.encoder, "image": aligner.image_tower.backbone}
    prefixes = {"text": "text_tower.encoder", "image": "image_tower.backbone"}
    for name, tower in towers.items():
        if config.towers not in (name, "both"):
            continue
        targets = [
            path
            for path, weights in adaptable_layers(tower).items()
            if not any(
                fnmatchcase(f"{prefixes[name]}.{weight}", pattern) for pattern in frozen_patterns for weight in weights
            )
        ]
        if not targets:
            raise ValueError(
                f"--peft lora: no layer of the {name} tower is left to be adapted by --freeze_layers "
                f"{' '.join(frozen_patterns)}"
            )
        tower.requires_grad_(False)
        # As a pattern of whole paths: of names, peft adapts every layer that ends with one.
        paths = "|".join(map(re.escape, targets))
        settings = PeftConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=f"(?:{paths})"  # type: ignore[arg-type]
        )  # fmt: skip
        inject_adapter_in_model(settings, tower)


def adaptable_layers(tower: nn.Module) -> dict[str, list[str]]:
    """The layers of a tower that can have an adapter.

    An attention that multiplies with the weights of its inner layers itself would bypass their adapters: it is adapted
    as a whole, packed projections included, where peft can (`nn.MultiheadAttention`), else not at all.

    Args:
        tower: The tower.

    Returns:
        By the path of each layer the names of the weights that an adapter changes.

    >>> adaptable_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    {'0': ['0.weight']}
    """
    layers: dict[str, list[str]] = {}
    skipped: tuple[str, ...] = ()
    for path, module in tower.named_modules():
        if path.startswith(skipped) and skipped:
            continue
        if isinstance(module, nn.MultiheadAttention):
            skipped += (f"{path}.",)
            if module.in_proj_weight is not None:
                layers[path] = [f"{path}.in_proj_weight", f"{path}.out_proj.weight"]
        elif type(module).__name__ in FUNCTIONAL_ATTENTION:
            skipped += (f"{path}.",)
        elif isinstance(tower, Longformer) and path.endswith(LORA_EXCLUDED):
            continue
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            layers[path] = [f"{path}.weight"]
    return layers


def merge_lora(aligner: Aligner) -> Aligner:
    """A copy of a model whose adapters are merged into the weights beside them.

    Args:
        aligner: The model, which is left as it is.

    Returns:
        An aligner without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(aligner)
    merged: tuple[str, ...] = ()
    for name, module in list(result.named_modules()):
        if not isinstance(module, BaseTunerLayer) or (merged and name.startswith(merged)):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):
            # An attention as a whole, with the adapter of its output projection inside.
            base = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            merged += (f"{name}.",)
        else:
            module.merge()
            base = module.get_base_layer()
        parent, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(parent), attribute, base)
    return result


# --- learning rates --------------------------------------------------------------------------------------------------


def layer_indices(aligner: Aligner) -> dict[str, tuple[int, int]]:
    """The layer of each parameter of both towers.

    Args:
        aligner: The model.

    Returns:
        By name the number of the layer, from the input on, and the number of the last one.
    """
    indices: dict[str, tuple[int, int]] = {}
    backbone: Any = aligner.image_tower.backbone
    if isinstance(aligner.image_tower, PretrainedImageTower):
        image_names = [name for name, _ in aligner.named_parameters() if name.startswith("image_tower.")]
        indices |= text_layer_indices(image_names)
    elif hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
        last = max(layers.values(), default=0)
        indices |= {f"image_tower.backbone.{name}": (layer, last) for name, layer in layers.items()}
    names = [name for name, _ in aligner.named_parameters() if name.startswith("text_tower.")]
    return indices | text_layer_indices(names)


def text_layer_indices(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The layer of each parameter of a text tower.

    Args:
        names: Names in the order in which the tower defines them.

    Returns:
        By name the number of the layer and of the last one: 0 for embeddings before the layers, the last one for what
            follows
        them, such as a final norm.

    >>> text_layer_indices(["embeddings.weight", "layer.0.bias", "layer.1.bias", "norm.weight"])["norm.weight"]
    (2, 2)
    """
    numbers = [int(match[1]) + 1 if (match := LAYER.search(f".{name}")) else 0 for name in names]
    last = max(numbers, default=0)
    first_layer_position = numbers.index(1) if 1 in numbers else len(names)
    return {
        name: (number if number or position < first_layer_position else last, last)
        for position, (name, number) in enumerate(zip(names, numbers, strict=True))
    }


def optimizer_groups(
    named: Iterator[tuple[str, nn.Parameter]],
    aligner: Aligner,
    rates: dict[str, float],
    head_rate: float,
    weight_decay: float,
    layer_decay: float,
) -> list[dict[str, Any]]:
    """Groups of parameters with their learning rate and weight decay, as AdamW takes them.

    Biases, norms and temperatures have no weight decay; frozen parameters are left out.

    Args:
        named: Parameters by name.
        aligner: The model that they are of.
        rates: Learning rates by the first part of a name.
        head_rate: Learning rate of all others.
        weight_decay: Weight decay of matrices.
        layer_decay: The last layer of a tower learns at its rate, the one before at `layer_decay` times that, and so
            on.

    Returns:
        The groups.

    Source: Howard and Ruder, arXiv:1801.06146, section 3.2, for the rates by layer.
    """
    layers = layer_indices(aligner) if layer_decay != 1 else {}
    # What scores pairs is never sharded, and does not go into one fused step with what may be. The groups are the same
    # either way: a run that is begun on many processes may resume on one.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        parameter_name = name.removeprefix("aligner.")
        layer, last = layers.get(parameter_name, (0, 0))
        rate = rates.get(parameter_name.split(".")[0], head_rate) * layer_decay ** (last - layer)
        kind = rate, weight_decay if parameter.ndim > 1 else 0.0, parameter_name.startswith(PAIR_SCORER_PREFIXES)
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay, _), parameters in groups.items()
    ]
