"""Whether requests to the hub are allowed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def offline() -> Iterator[None]:
    """Allow no request to the hub in a block, nor in a process that it starts.

    A context manager, and a decorator: HF_HUB_OFFLINE and its like are set in the environment, and restored at the end.

    Yields:
        Nothing.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    # It reads the variable when it is imported, which may have been before.
    constants: Any = sys.modules.get("huggingface_hub.constants")
    constant = constants is None or constants.HF_HUB_OFFLINE
    if constants is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        was_imported, constants = constants is not None, sys.modules.get("huggingface_hub.constants")
        if constants is not None:
            constants.HF_HUB_OFFLINE = constant if was_imported else _env_flag_set(*names[:2])


def _env_flag_set(*names: str) -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def is_offline() -> bool:
    """Whether no request may be made: `offline`, or HF_HUB_OFFLINE in the environment."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or _env_flag_set("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
