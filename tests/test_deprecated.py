"""Old names of public objects work for one release, and warn."""

from __future__ import annotations

from importlib import import_module

import pytest

from clipvisionalign import images, pictures


def test_every_old_name_leads_to_the_object_that_replaces_it():
    for old, new in pictures.PRESENT_NAMES.items():
        with pytest.warns(DeprecationWarning, match=rf"pictures\.{old} is deprecated .*images\.{new}") as caught:
            assert getattr(pictures, old) is getattr(images, new)
        assert caught[0].filename == __file__


def test_an_old_module_is_imported_from_with_a_warning_at_the_line_that_does_it():
    with pytest.warns(DeprecationWarning, match="open_picture") as caught:
        from clipvisionalign.pictures import open_picture
    assert open_picture is import_module("clipvisionalign.images").open_picture
    assert [each.filename for each in caught] == [__file__]


def test_no_other_name_is_made_up():
    with pytest.raises(AttributeError, match=r"module 'clipvisionalign\.pictures' has no attribute 'paint'"):
        pictures.paint  # noqa: B018
