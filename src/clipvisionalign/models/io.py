"""Reading an aligner from a run folder, and fetching what its towers need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from clipvisionalign.models.adapters import load_adapters
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.aligner_config import read_recorded_settings
from clipvisionalign.models.device import best_device
from clipvisionalign.models.file_pages import copy_and_release
from clipvisionalign.models.hub import is_hub_name
from clipvisionalign.models.image_weights import find_image_weights
from clipvisionalign.models.packed_linear import align_weights, pack_linears
from clipvisionalign.models.pretrained import (
    as_given,
    describe_missing,
    find_pretrained,
    is_model_folder,
)
from clipvisionalign.models.run_files import (
    ADAPTERS_FILE,
    CONFIG_FILE,
    PRETRAINED_FOLDER,
    TEXT_FOLDER,
    WEIGHTS_FILE,
    weights_file,
)
from clipvisionalign.models.run_names import display_name, resolve_run
from clipvisionalign.models.text_weights import find_text_weights
from clipvisionalign.plain_yaml import safe_load
from clipvisionalign.settings import config_from_dict


def read_weights(run: str | Path) -> dict[str, Tensor]:
    """The weights of a run, under the names and in the shapes that an aligner has them.

    Args:
        run: The run folder, of which model.safetensors is read, or the towers with the adapters; or such a file.

    Returns:
        Tensors by name, on the CPU.
    """
    from safetensors.torch import load_file

    folder = Path(run).parent if Path(run).is_file() else Path(run)
    path = weights_file(folder)
    if path is not None and path.name == ADAPTERS_FILE:
        return _load_run(folder).state_dict()
    state = load_file(Path(run) if folder != Path(run) else folder / WEIGHTS_FILE)
    # Runs from before the temperature had an axis.
    return state | {"log_scale": state["log_scale"].reshape(1)} if "log_scale" in state else state


def pin_revisions(config: AlignerConfig) -> AlignerConfig:
    """Fetch what the towers need and is not on this machine.

    Args:
        config: The settings of a model.

    Returns:
        The settings with the hub's commits that the towers come from.

    Raises:
        WeightsNotFound: There are no weights of that name here or on the hub.
        ValueError: A backbone is unknown.
    """
    if config.pretrained:
        return replace(config, pretrained=find_pretrained(config.pretrained)[1])
    image, text = config.image_tower, config.text_tower
    image_weights = find_image_weights(image.name, image.weights, image.revision)
    if image_weights is not None:
        image = replace(image, revision=image_weights.origin.revision or image.revision)
    revision = find_text_weights(text.name, text.weights, text.revision).origin.revision
    return replace(config, image_tower=image, text_tower=replace(text, revision=revision or text.revision))


def load_aligner(folder: str | Path, device: str = "auto", packed: bool = True) -> Aligner:
    """Load a run folder's aligner, or a pretrained dual encoder, ready to encode and score.

    Args:
        folder: A run folder, which needs nothing else, and no network; `starter` for the starter model; or a pretrained
            dual encoder: a folder in transformers' or open_clip's layout, or a hub name. What a hub name stands for, a
            run or a dual encoder, is fetched where it is not on this machine.
        device: "auto", "cpu", "cuda" and so on.
        packed: Whether weights are packed for the CPU's kernels, except those of pretrained dual encoders; packed
            weights cannot be exported.

    Returns:
        The aligner in evaluation mode.

    Raises:
        FileNotFoundError: The folder is not a run folder, or the starter model is not installed.
        ValueError: A file in it does not fit, or this machine has no such device.
        WeightsNotFound: There is no such pretrained model here or on the hub.

    >>> Aligner(AlignerConfig()).save("untrained")
    >>> aligner = load_aligner("untrained", device="cpu")
    >>> aligner.training, aligner.encode_captions(["a dog on the grass"]).shape
    (False, torch.Size([1, 256]))
    >>> aligner = load_aligner("openai/clip-vit-base-patch32")                # doctest: +SKIP
    """
    run = resolve_run(folder)
    aligner = Aligner(AlignerConfig(pretrained=run)) if is_pretrained(run) else _load_run(Path(run))
    align_weights(aligner)
    # A pretrained dual encoder is as quick without (docs/results.md), and packed weights are a second copy of them.
    if packed and not aligner.config.pretrained:
        pack_linears(aligner)
    return aligner.to(best_device(device)).eval()


def is_pretrained(name: str | Path) -> bool:
    """Whether a name stands for a pretrained dual encoder, by folder or hub name, and not for a run folder.

    Args:
        name: A folder or a hub name.

    Returns:
        Whether it does; the hub is not asked.
    """
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file():
        return False
    return is_model_folder(folder) or (not folder.exists() and is_hub_name(str(name)))


def model_files(name: str | Path) -> list[Path]:
    """The files that hold a model's weights; a pretrained model is fetched if it is not on this machine.

    Args:
        name: A run folder, or a pretrained dual encoder.

    Returns:
        The files.

    Raises:
        FileNotFoundError: The folder has no weights.
        WeightsNotFound: There is no such pretrained model here or on the hub.
    """
    run = resolve_run(name)
    if is_pretrained(run):
        return list(find_pretrained(run)[2].files)
    file = weights_file(run)
    if file is None:
        raise FileNotFoundError(f"{name}: holds no model: it has no {WEIGHTS_FILE}")
    return [file]


def resolve_model(name: str | Path) -> str:
    """A name by which a model is found again from any directory.

    Args:
        name: A folder or a hub name.

    Returns:
        A folder's absolute path, a hub name with its commit, or `starter`.
    """
    run = resolve_run(name)
    if is_pretrained(run) and not Path(run).is_dir():
        return find_pretrained(run)[1]
    display = display_name(Path(run).resolve())
    # With its prefix the name is the hub's wherever it is read again, whatever folders are there.
    return f"hf-hub:{display}" if str(name).startswith("hf-hub:") and run != str(name) else display


def _load_run(source: Path) -> Aligner:
    """The aligner that a run folder holds, on the CPU."""
    if (source / CONFIG_FILE).is_file() and (file := weights_file(source)) and file.name == ADAPTERS_FILE:
        return _load_with_adapters(source)
    tower_folder = PRETRAINED_FOLDER if (source / PRETRAINED_FOLDER).is_dir() else TEXT_FOLDER
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, tower_folder) if not (source / name).exists()]
    if not source.is_dir():
        reason, name = "a file" if source.exists() else "no such folder", as_given(str(source))
        raise FileNotFoundError(
            f"{name}: not a run folder: {reason}; 'clipvisionalign train' writes one; {describe_missing(name)}"
        )
    if missing:
        raise FileNotFoundError(
            f"{source}: not a run folder: it lacks {', '.join(missing)}; 'clipvisionalign train' writes one; and no "
            "pretrained model, which has a config.json or an open_clip_config.json"
        )
    aligner = Aligner(_read_config(source), run=source, load_weights=False)
    try:
        _copy_weights(aligner, read_weights(source))
    except Exception as error:
        raise ValueError(f"{source / WEIGHTS_FILE}: not this aligner's weights: {error}") from None
    return aligner


def _copy_weights(aligner: Aligner, state: dict[str, Tensor]) -> None:
    """`load_state_dict`, with no more than one tensor in memory twice."""
    own = aligner.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.items()}:
        # It names what is missing, and what does not fit.
        aligner.load_state_dict(state)
        return
    for name, tensor in own.items():
        copy_and_release(tensor, state[name])


def _load_with_adapters(source: Path) -> Aligner:
    """The aligner of a run folder that holds adapters: its towers by name, with the adapters merged, on the CPU."""
    aligner = Aligner(_read_config(source))
    aligner.load_state_dict(load_adapters(source, aligner.state_dict()))
    return aligner


def _read_config(source: Path) -> AlignerConfig:
    """The settings of a run's model."""
    import yaml

    try:
        settings = safe_load((source / CONFIG_FILE).read_text())["model"]
        return config_from_dict(AlignerConfig, read_recorded_settings(settings))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source / CONFIG_FILE}: no settings of an aligner: {error}") from None
