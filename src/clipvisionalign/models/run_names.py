"""Names that stand for a run folder: its path, `starter`, or a repository of the hub that holds a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from clipvisionalign import starter
from clipvisionalign.models.hub import (
    WeightsNotFound,
    is_commit,
    is_hub_name,
    repository_folder,
    snapshot,
    split_revision,
)
from clipvisionalign.models.hub.errors import hub_endpoint
from clipvisionalign.models.run_files import ADAPTERS_FILE, CONFIG_FILE, MODEL_FOLDERS, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.models.weights import OPEN_CLIP_CONFIG

#: What is taken of a repository with a run beside its weights and its towers' folders, where it is there.
_SMALL_FILES = (CONFIG_FILE, "results.json", "environment.json", "weights.json", "data.json", "trained_on.npz",
                "calibration.json")  # fmt: skip

#: Of the towers' folders: configurations, vocabularies and merges.
_TOWER_SUFFIXES = (".json", ".txt", ".model", ".codes")


#: One of them is in the top folder of every pretrained dual encoder.
_DUAL_ENCODER_CONFIGS = {"config.json", OPEN_CLIP_CONFIG}

#: Hub, name and revision of what this process has found to be no run.
_NO_RUNS: set[tuple[str, str, str]] = set()

_REMEDY = "'clipvisionalign export RUN --huggingface' writes all that is needed"


class IncompleteRun(WeightsNotFound):
    """A repository has the settings of a run, and not all that opens it."""


class _HoldsNoRun(Exception):
    """A repository is not of a run."""


def resolve_run(name: str | Path) -> str:
    """The folder that a name of a run stands for; a run of the hub is fetched where it is not on this machine.

    Args:
        name: A run folder, a pretrained model, `starter`, or OWNER/NAME of a repository with a run (as `export
            --huggingface` writes it), also with @REVISION.

    Returns:
        The folder of `starter` and of a run of the hub; every other name as it is.

    Raises:
        StarterNotInstalled: It is `starter`, and the package is not installed.
        IncompleteRun: The repository has settings of a run, and not all that opens it.
        WeightsNotFound: There is no such folder here, and no such repository on the hub, or it cannot be asked.
        OSError: A download failed; see `hub.snapshot`.

    >>> resolve_run("./runs/self")
    './runs/self'
    """
    folder = starter.resolve_run(name)
    if folder != str(name) or Path(folder).exists() or not is_hub_name(folder):
        return folder
    from clipvisionalign.models.pretrained.names import hint_for_name
    from clipvisionalign.models.pretrained.sources import explain_missing

    plain, revision = split_revision(folder.removeprefix("hf-hub:"), "")
    if hint_for_name(folder) or (hub_endpoint(), plain, revision) in _NO_RUNS:
        return folder
    try:
        return str(snapshot(plain, revision, _choose_run_files, nested=True).folder)
    except _HoldsNoRun:
        _NO_RUNS.add((hub_endpoint(), plain, revision))
        return folder
    except IncompleteRun as error:
        raise IncompleteRun(f"{plain}: {error}") from None
    except WeightsNotFound as error:
        raise explain_missing(plain, error) from None


def display_name(run: str | Path) -> str:
    """A run as messages and files name it, on any machine: `starter`, or a run of the hub with its commit.

    Args:
        run: A run folder, or a pretrained model.

    Returns:
        The name, by which `resolve_run` finds the same folder.

    >>> display_name("runs/self")
    'runs/self'
    """
    path = Path(run).resolve()
    name = snapshot_name(path)
    if name and repository_folder(name.partition("@")[0]).resolve() == path.parents[1]:
        return name
    return starter.display_name(run)


def snapshot_name(path: Path) -> str:
    """The name of the hub that a folder of its cache has, by the folder's path alone.

    Args:
        path: The folder, which need not exist.

    Returns:
        OWNER/NAME@COMMIT; "" for any other path.

    >>> snapshot_name(Path("hub/models--someone--run/snapshots") / ("0" * 40)) == "someone/run@" + "0" * 40
    True
    """
    storage = path.parents[1].name.split("--", 2) if path.parent.name == "snapshots" and is_commit(path.name) else []
    return f"{storage[1]}/{storage[2]}@{path.name}" if len(storage) == 3 and storage[0] == "models" else ""


def is_of_publisher(run: str | Path) -> bool:
    """Whether a run folder is not the user's own, so that nothing is written into it.

    Args:
        run: A folder as `resolve_run` has it.

    Returns:
        Whether it is in the hub's cache, or that of the starter model.

    >>> is_of_publisher("runs/self")
    False
    """
    return display_name(run) != str(run)


def _holds_run(names: Collection[str]) -> bool:
    """Whether a repository is of a run; with the settings of a dual encoder too, by the other files of a run."""
    of_run = any(name == ADAPTERS_FILE or name.partition("/")[0] in MODEL_FOLDERS for name in names)
    return CONFIG_FILE in names and (of_run or not _DUAL_ENCODER_CONFIGS & set(names))


def _choose_run_files(names: Collection[str]) -> list[str]:
    """The files of a run, by a repository's names, the weights last. Raises _HoldsNoRun, IncompleteRun."""
    if not _holds_run(names):
        raise _HoldsNoRun
    weights = next((file for file in (WEIGHTS_FILE, ADAPTERS_FILE) if file in names), None)
    if weights is None:
        raise IncompleteRun(
            f"has the {CONFIG_FILE} of a run, and neither {WEIGHTS_FILE} nor {ADAPTERS_FILE}; {_REMEDY}"
        )
    of_towers = [
        name for name in sorted(names) if name.partition("/")[0] in MODEL_FOLDERS and name.endswith(_TOWER_SUFFIXES)
    ]
    if not of_towers and weights == WEIGHTS_FILE:
        raise IncompleteRun(
            f"has the weights of a run, and no folder {TEXT_FOLDER} with its text tower's settings; {_REMEDY}"
        )
    return [*(name for name in _SMALL_FILES if name in names), *of_towers, weights]
