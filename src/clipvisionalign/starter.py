"""The starter model: a small trained aligner in a distribution of its own, by the name `starter`.

It lies in the folder `starter/` of the repository, with its own terms. Nothing here needs it: where it is asked for and
not installed, the error has the command that installs it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

#: The name that stands for it where a run folder can stand.
STARTER = "starter"

#: The package that holds it, and the folder in there.
PACKAGE, MODEL_FOLDER = "clipvisionalign_starter", "model"

#: What installs it.
INSTALL_HINT = "in a clone of the repository, pip install ./starter"


class StarterNotInstalled(FileNotFoundError):
    """The starter model is asked for, and its package is not installed."""


def is_starter(name: str | Path) -> bool:
    """Whether a name stands for the starter model.

    Args:
        name: A name where a run folder can stand.

    Returns:
        Whether it is `starter`, and no run folder of that name is here.

    >>> is_starter("starter"), is_starter("runs/starter"), is_starter("./starter")
    (True, False, False)
    """
    return isinstance(name, str) and name == STARTER and not (Path(name) / "config.yaml").is_file()


def starter_folder() -> Path:
    """The folder of the starter model: a run folder, with adapters in the place of whole weights.

    Returns:
        Its absolute path, in the installed package.

    Raises:
        StarterNotInstalled: The package is not installed.
    """
    spec = find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(location) / MODEL_FOLDER
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise StarterNotInstalled(f"{STARTER}: the starter model is not installed: {INSTALL_HINT}")


def is_installed() -> bool:
    """Whether the starter model is installed."""
    try:
        starter_folder()
    except StarterNotInstalled:
        return False
    return True


def resolve_run(name: str | Path) -> str:
    """The folder that a name of a run stands for.

    Args:
        name: A run folder, a pretrained model, or `starter`.

    Returns:
        The starter model's folder for `starter`; every other name as it is.

    Raises:
        StarterNotInstalled: It is `starter`, and the package is not installed.

    >>> resolve_run("runs/self")
    'runs/self'
    """
    return str(starter_folder()) if is_starter(name) else str(name)


def display_name(run: str | Path) -> str:
    """A run as messages and files name it, on any machine: `starter` for the starter model's folder.

    Args:
        run: A run folder, or a pretrained model.

    Returns:
        The name.

    >>> display_name("runs/self")
    'runs/self'
    """
    path = Path(run)
    if path.parent.name == PACKAGE and path.is_absolute() and is_installed() and path.resolve() == starter_folder():
        return STARTER
    return str(run)
