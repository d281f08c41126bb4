"""Freed memory is kept for the next arrays while a command computes, and given back afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from clipvisionalign import allocator

pytestmark = pytest.mark.skipif(allocator._libc() is None, reason="the C library is not glibc")

PROBE = """
import json, resource
import torch
from clipvisionalign.allocator import reused_memory

def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def arrays():
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

arrays()
seen = {"before": faults(arrays), "resident before": resident()}
with reused_memory():
    arrays()
    seen["within"] = faults(arrays)
    with reused_memory():
        seen["within both"] = faults(arrays)
    seen["after the inner one"] = faults(arrays)
seen |= {"after": faults(arrays), "resident after": resident()}
print(json.dumps(seen))
"""


def probe(**environment: str) -> dict[str, float]:
    variables = {name: value for name, value in os.environ.items() if name not in allocator._VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=variables | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_arrays_within_take_no_new_pages_and_all_is_given_back():
    seen = probe()
    # Pages of 4 KiB, or fewer larger ones.
    assert seen["before"] >= 100
    for name in ("within", "within both", "after the inner one"):
        assert seen[name] < seen["before"] / 10, (name, seen)
    # The same arrays may come in larger pages by then: as many new ones as before is not asked, but far more than within.
    assert seen["after"] >= max(100, 10 * max(seen[name] for name in ("within", "within both", "after the inner one")))
    assert seen["resident after"] < seen["resident before"] + 100


@pytest.mark.parametrize("variable", allocator._VARIABLES)
def test_a_users_own_settings_of_the_allocator_count(variable):
    seen = probe(**{variable: "65536"})
    assert seen["within"] > seen["before"] / 2, seen


def test_an_error_within_ends_it_too(monkeypatch):
    class Library:
        def __init__(self) -> None:
            self.settings: dict[int, int] = {}

        def mallopt(self, setting: int, value: int) -> int:
            self.settings[setting] = value
            return 1

        def malloc_trim(self, pad: int) -> int:
            self.settings["trimmed"] = pad
            return 1

    library = Library()
    monkeypatch.setattr(allocator, "_libc", lambda: library)
    monkeypatch.setattr(allocator, "_VARIABLES", ())

    @allocator.reused_memory()
    def fail() -> None:
        assert library.settings == allocator._REUSING
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        fail()
    assert library.settings == allocator._USUAL | {"trimmed": 0}
    monkeypatch.setattr(allocator, "_libc", lambda: None)
    library.settings.clear()
    with allocator.reused_memory():
        pass
    assert library.settings == {}
