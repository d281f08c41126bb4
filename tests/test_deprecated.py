"""Old names of public objects work for one release, and warn."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

#: The public functions and classes of version 0.1, by module; of the command line's module `main`.
NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "v0.1" / "public_names.json").read_text())


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_of_version_0_1_leads_to_an_object(module, recwarn):
    table = json.loads((Path(import_module("clipvisionalign").__file__).parent / "deprecated_names.json").read_text())
    for name in NAMES[module]:
        replacement = getattr(import_module(module), name)
        if name in table.get(module, {}):
            home, _, new_name = table[module][name].partition(":")
            assert replacement is getattr(import_module(home), new_name)
            warning = recwarn.pop(DeprecationWarning)
            assert str(warning.message).startswith(f"{module}.{name} is deprecated")
            assert str(warning.message).endswith(f"use {home}.{new_name}")
            assert warning.filename == __file__
        assert replacement.__module__.startswith("clipvisionalign.")
    assert not [each for each in recwarn if issubclass(each.category, DeprecationWarning)]


def test_an_old_module_is_imported_from_with_a_warning_at_the_line_that_does_it():
    with pytest.warns(DeprecationWarning, match="open_picture") as caught:
        from clipvisionalign.pictures import open_picture
    assert open_picture is import_module("clipvisionalign.images").open_image
    assert [each.filename for each in caught] == [__file__]


def test_no_other_name_is_made_up():
    former = import_module("clipvisionalign.pictures")
    with pytest.raises(AttributeError, match=r"module 'clipvisionalign\.pictures' has no attribute 'paint'"):
        former.paint  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'clipvisionalign' has no attribute 'paint'"):
        import_module("clipvisionalign").paint  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import_module("clipvisionalign.paintings")


@pytest.mark.slow
def test_the_project_uses_no_old_name_of_its_own():
    """Every module is imported with the warnings as errors."""
    program = (
        "import pkgutil, importlib, warnings, clipvisionalign\n"
        "warnings.filterwarnings('error', message=r'clipvisionalign\\.', category=DeprecationWarning)\n"
        "for each in pkgutil.walk_packages(clipvisionalign.__path__, 'clipvisionalign.'):\n"
        "    if not each.name.endswith('__main__'):\n"
        "        importlib.import_module(each.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
