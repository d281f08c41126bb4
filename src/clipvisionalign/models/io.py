"""Reading an aligner from a run folder, and fetching what its towers need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.device import best_device
from clipvisionalign.models.packed_linear import pack_linears
from clipvisionalign.models.run_files import CONFIG_FILE, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.models.weights import find_image_weights, find_text_weights
from clipvisionalign.plain_yaml import safe_load
from clipvisionalign.settings import config_from_dict


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's model.safetensors, under the names and in the shapes that an aligner has them."""
    from safetensors.torch import load_file

    state = load_file(path)
    # Runs from before the temperature had an axis.
    return state | {"log_scale": state["log_scale"].reshape(1)} if "log_scale" in state else state


def pin_revisions(config: AlignerConfig) -> AlignerConfig:
    """Fetch what the towers need and is not on this machine; returns the config with the hub's commits that have it.

    Raises WeightsNotFound, and ValueError for an unknown backbone.
    """
    image, text = config.image_tower, config.text_tower
    image_weights = find_image_weights(image.name, image.weights, image.revision)
    if image_weights is not None:
        image = replace(image, revision=image_weights.origin.revision or image.revision)
    revision = find_text_weights(text.name, text.weights, text.revision).origin.revision
    return replace(config, image_tower=image, text_tower=replace(text, revision=revision or text.revision))


def load_aligner(folder: str | Path, device: str = "auto", packed: bool = True) -> Aligner:
    """Load the aligner of a run folder, ready to encode and score; no network is required.

    Args:
        folder: A run folder, or a folder that `export --huggingface` wrote.
        device: "auto", "cpu", "cuda" and so on.
        packed: Whether weights are packed for the CPU's kernels; packed weights cannot be exported.

    Returns:
        The aligner in evaluation mode.

    Raises:
        FileNotFoundError: The folder is not a run folder.
        ValueError: A file in it does not fit.
    """
    import yaml

    source = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, TEXT_FOLDER) if not (source / name).exists()]
    if missing:
        reason = "no such folder" if not source.is_dir() else f"it lacks {', '.join(missing)}"
        raise FileNotFoundError(f"{source}: not a run folder: {reason}; 'clipvisionalign train' writes one")
    try:
        settings = safe_load((source / CONFIG_FILE).read_text())["model"]
        config = config_from_dict(AlignerConfig, settings)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source / CONFIG_FILE}: no settings of an aligner: {error}") from None
    aligner = Aligner(config, run=source, load_weights=False)
    try:
        aligner.load_state_dict(read_weights(source / WEIGHTS_FILE))
    except Exception as error:
        raise ValueError(f"{source / WEIGHTS_FILE}: not this aligner's weights: {error}") from None
    if packed:
        pack_linears(aligner)
    return aligner.to(best_device(device)).eval()
