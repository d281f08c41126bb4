"""What a test needs that pip does not bring: a browser and a C++ compiler. Run as a script, it installs what is missing.

    python tests/optional_parts.py        # `make test` does so before the tests

Each part is looked for on the system, then fetched in the ways of its `ways`, in their order. What no way brings is named
with the line that does; the tests that need it are skipped and named again at the end (`conftest.py`).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

#: Seconds after which a way is given up; a download of 110 MB, or of Debian's package and what it needs, takes less.
LIMIT = 600


@functools.cache
def browser_error() -> str | None:
    """Why no browser starts here, None if one does. Needs Playwright."""
    from playwright.sync_api import Error, sync_playwright

    from clipvisionalign.study.report.html import browser_path

    try:
        with sync_playwright() as playwright:
            playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"]).close()
    except Error as error:
        return str(error).strip().splitlines()[0]
    return None


def has_browser() -> bool:
    """Whether a Chromium is there, the system's or Playwright's own, and starts."""
    return browser_error() is None


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return shutil.which("g++") is not None


@dataclass(frozen=True)
class Part:
    """One thing that tests need. ways: commands that install it, tried in order; line: what a person types."""

    name: str
    is_there: Callable[[], bool]
    ways: tuple[list[str], ...]
    line: str

    @property
    def missing(self) -> str:
        """The reason of a skip: what is missing, and the line that brings it."""
        return f"no {self.name}: {self.line}"


def debian(*packages: str) -> list[str]:
    """The command that installs packages of Debian or Ubuntu, for root alone and without a question."""
    install = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    return ["sh", "-c", f"apt-get -qq update && {install}"]


PLAYWRIGHT = [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]
BROWSER = Part(
    "Chromium", has_browser, (PLAYWRIGHT, debian("chromium")),
    ".venv/bin/playwright install --only-shell --with-deps chromium, or: sudo apt-get install chromium",
)  # fmt: skip
COMPILER = Part("C++ compiler", has_compiler, (debian("g++"),), "sudo apt-get install g++")
PARTS = (BROWSER, COMPILER)


def can_run(command: list[str]) -> bool:
    """Debian's packages are for root on a system that has apt-get; all else is tried."""
    return "apt-get" not in command[-1] or (
        shutil.which("apt-get") is not None and getattr(os, "geteuid", lambda: 1)() == 0
    )


def install(part: Part) -> str | None:
    """Have a part there; None, or in words why it is not."""
    if part.is_there():
        return None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "10000"}
    tried = []
    for command in filter(can_run, part.ways):
        shown = command[-1] if command[0] == "sh" else "playwright " + " ".join(command[3:])
        print(f"{part.name} for the tests: {shown}", flush=True)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
            said = (done.stderr or done.stdout).strip().splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = [str(error)]
        browser_error.cache_clear()
        if part.is_there():
            return None
        tried.append(f"{shown}: {next((line for line in said if 'rror' in line), said[-1] if said else 'no effect')}")
    return "; ".join([part.missing, *tried])


def main() -> None:
    for part in PARTS:
        if missing := install(part):
            print(f"{missing}\nThe tests that need it will be skipped.", file=sys.stderr)


def needs(part: Part) -> pytest.MarkDecorator:
    """Skip a test where a part is missing; the reason holds the line that brings it."""
    return pytest.mark.skipif(not part.is_there(), reason=part.missing)


if __name__ == "__main__":
    main()
