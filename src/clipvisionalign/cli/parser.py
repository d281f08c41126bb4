"""What every command's parser has: the program's name, how help is laid out, flags that several commands take."""

from __future__ import annotations

import argparse
from typing import Any

PROGRAM = "clipvisionalign"


#: Takes towers' weights from the cache alone; set before anything is imported that might ask the hub.
OFFLINE = "--offline"


OFFLINE_HELP = "never ask the hub for a tower's weights: what is not on this machine is an error (as HF_HUB_OFFLINE=1)"


def _parser(name: str, **options: Any) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    # A shortened flag would pass by what looks for the whole word, such as --offline before anything is imported.
    return argparse.ArgumentParser(f"{PROGRAM} {name}", formatter_class=kind, allow_abbrev=False, **options)
