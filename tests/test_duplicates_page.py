"""Duplicates on the search page, in a real browser over a real service."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_duplicates import photograph

pytest.importorskip("playwright", reason="no playwright: pip install 'clipvisionalign[pdf]'")
pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from test_search_page import served, until

from clipvisionalign.search.duplicate_decisions import read_decisions, read_keepers
from clipvisionalign.search.indexer import build_index

#: Pairs of equal files: more groups than one answer has.
PAIRS = 25
LONG_NAME = "averylongnamewithoutanyseparator" * 6


@pytest.fixture(scope="module")
def root(tiny_runs, tmp_path_factory) -> Path:
    """A folder with an index of photographs with copies of each kind, one of different images, and one whose images
    are gone."""
    root = tmp_path_factory.mktemp("duplicates_page")
    images = root / "images"
    images.mkdir()
    for seed in range(2):
        photograph(seed).save(images / f"{seed}.png")
        photograph(seed).save(images / f"{seed} {LONG_NAME if seed else 'recompressed'}.jpg", quality=70)
    for number in range(PAIRS):
        noise = np.random.default_rng(number).integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"noise {number:02}.png")
        shutil.copy(images / f"noise {number:02}.png", images / f"noise {number:02} again.png")
    for number in range(14):
        shutil.copy(images / "noise 00.png", images / f"noise 00 burst {number}.png")
    build_index(tiny_runs["self"], images, root / "index")
    (root / "different").mkdir()
    for seed in range(3):
        photograph(seed + 50).save(root / "different" / f"{seed}.png")
    build_index(tiny_runs["self"], root / "different", root / "none")
    shutil.copytree(root / "index", root / "gone")
    manifest = json.loads((root / "gone" / "index.json").read_text())
    (root / "gone" / "index.json").write_text(json.dumps(manifest | {"folder": str(root / "moved")}))
    return root


@pytest.fixture(scope="module")
def service(root):
    with served(root / "index") as address:
        yield address


@pytest.fixture
def page(browser, service, request):
    """The page with the dialog open; whatever is written to the console fails the test."""
    width, scheme = getattr(request, "param", (1280, "light"))
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        context.set_default_timeout(60_000)
        browser_page = context.new_page()
        messages: list[str] = []
        browser_page.on("console", lambda message: messages.append(message.text))
        browser_page.on("pageerror", lambda error: messages.append(str(error)))
        browser_page.goto(service)
        browser_page.get_by_role("button", name="Duplicates").press("Enter")
        browser_page.wait_for_selector("#duplicates .group")
        yield browser_page
    assert [message for message in messages if "status of 409" not in message] == []


def note(page) -> str:
    return page.locator("#duplicates-note").inner_text()


def until_note(page, part: str) -> None:
    until(page, "(part) => document.getElementById('duplicates-note').textContent.includes(part)", part)


def focused(page) -> str:
    return page.evaluate("document.activeElement.className || document.activeElement.textContent")


def test_all_by_keyboard(page, root):
    index = root / "index"
    assert "2 groups" in note(page)
    page.get_by_role("button", name="Nearly the same (2)").focus()
    page.keyboard.press("ArrowDown")
    assert focused(page) == "group"
    page.keyboard.press("n")
    until_note(page, "Remembered: these are no duplicates.")
    assert len(read_decisions(index)) == 1
    page.keyboard.press("Enter")
    until_note(page, "Taken back.")
    assert read_decisions(index) == []
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "large"
    page.keyboard.press("k")
    until_note(page, "Remembered: this image is kept.")
    (keeper,) = read_keepers(index)
    group = page.locator("#duplicates .group").nth(1)
    assert group.locator(".member.kept .path").inner_text() == keeper.path
    assert group.locator(".mark").all_inner_texts() == ["", "Keep: chosen by hand"]
    # What was decided is listed, and taken back there.
    page.get_by_role("button", name="Decided").press("Enter")
    page.get_by_role("button", name=f"Take back the decision on {keeper.path}").press("Enter")
    until_note(page, "Taken back.")
    assert read_keepers(index) == []
    page.keyboard.press("Escape")
    assert not page.locator("#duplicates").is_visible()


def test_groups_are_loaded_page_by_page_and_paths_are_copied_and_saved(page, root):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Same bytes (25)").press("Enter")
    until(page, "document.querySelectorAll('#duplicates .group').length === 20")
    page.get_by_role("button", name="and 4 other images").press("Enter")
    assert page.locator("#duplicates .group").first.locator(".member").count() == 16
    page.get_by_role("button", name="More groups").press("Enter")
    until(page, "document.querySelectorAll('#duplicates .group').length === 25")
    until(page, "document.activeElement === document.querySelectorAll('#duplicates .group')[20]")
    assert not page.get_by_role("button", name="More groups").is_visible()
    page.get_by_role("button", name="Copy paths").press("Enter")
    until_note(page, "copied")
    copied = page.evaluate("navigator.clipboard.readText()").splitlines()
    # All but the best of each group: of 25 pairs with 14 further files, and of two photographs.
    assert len(copied) == len(set(copied)) == PAIRS + 14 + 2
    assert all(Path(each).is_file() for each in copied)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save paths").press("Enter")
    assert Path(download.value.path()).read_text().splitlines() == copied


def test_of_two_people_the_second_is_told(page, root, service, browser):
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(service)
        other.get_by_role("button", name="Duplicates").press("Enter")
        other.wait_for_selector("#duplicates .group")
        page.locator(".group .keep").nth(1).press("Enter")
        until_note(page, "Remembered")
        other.locator(".group .keep").nth(0).press("Enter")
        until_note(other, "has been chosen meanwhile")
        (keeper,) = read_keepers(root / "index")
        other.get_by_role("button", name="Load the groups again").press("Enter")
        other.wait_for_selector("#duplicates .group")
        assert other.locator(".group .member.kept .path").first.inner_text() == keeper.path
        other.get_by_role("button", name="Take back").press("Enter")
        until_note(other, "Taken back")
    assert read_keepers(root / "index") == []


def test_a_service_that_is_read_only_shows_what_there_is_and_offers_no_decision(browser, root):
    with served(root / "gone", root / "none", arguments=("--read-only",)) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button", name="Duplicates").press("Enter")
        until_note(page, "No duplicates among 68 images")
        details = page.locator("#duplicates details")
        assert "68 images could not be compared" in details.inner_text()
        details.locator("summary").press("Enter")
        assert "cannot be read" in details.inner_text()
        page.get_by_label("Index", exact=True).select_option("1")
        until_note(page, "No duplicates among 3 images")
        assert not details.is_visible()
        assert not page.locator("#duplicates .exports").is_visible()
    with served(root / "index", arguments=("--read-only",)) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button", name="Duplicates").press("Enter")
        page.wait_for_selector("#duplicates .group")
        assert page.locator("#duplicates .keep, #duplicates .decide").count() == 0
        page.get_by_role("button", name="Nearly the same").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("n")
        page.keyboard.press("k")
    assert not (root / "gone" / "duplicates").exists()


def test_an_answer_that_comes_late_moves_no_focus_and_changes_no_other_view(page, root):
    waiting: list = []
    page.locator(".group .decide").first.press("Enter")
    until_note(page, "Remembered")
    page.get_by_role("button", name="Decided").press("Enter")
    page.wait_for_selector("#duplicates .group")
    page.route("**/duplicates/forgotten*", lambda route: waiting.append(route))
    page.locator(".group button").first.press("Enter")
    while not waiting:
        page.wait_for_timeout(20)
    same_bytes = page.get_by_role("button", name="Same bytes")
    # Still in the same view, the focus elsewhere; then in another view.
    same_bytes.focus()
    waiting.pop().continue_()
    until(page, "document.querySelectorAll('#duplicates .group').length === 0")
    assert focused(page).startswith("Same bytes")
    page.unroute("**/duplicates/forgotten*")
    page.get_by_role("button", name="Nearly the same").press("Enter")
    page.wait_for_selector("#duplicates .group")
    page.route("**/duplicates/decisions*", lambda route: waiting.append(route))
    # A group stores one thing at a time; the focus stays where it went meanwhile, in the group too.
    group = page.locator(".group").first
    for control in (group.locator(".decide"), group.locator(".decide"), group.locator(".keep").last):
        control.press("Enter")
        while not waiting:
            page.wait_for_timeout(20)
    page.wait_for_timeout(200)
    assert len(waiting) == 1
    waiting.pop().continue_()
    until_note(page, "Remembered: these are no duplicates.")
    until(page, "document.activeElement.closest('.group') !== null")
    assert page.evaluate("document.activeElement.className") == "group decided"
    group.locator(".decide").press("Enter")
    until_note(page, "Taken back.")
    group.locator(".decide").press("Enter")
    while not waiting:
        page.wait_for_timeout(20)
    same_bytes.press("Enter")
    until_note(page, "25 groups")
    waiting.pop().fulfill(status=409, json={"detail": "an index that has changed"})
    until_note(page, "What was decided before is not stored: an index that has changed")
    assert not page.get_by_role("button", name="Load the groups again").is_visible()
    page.get_by_role("button", name="Nearly the same").press("Enter")
    page.wait_for_selector("#duplicates .group")
    page.locator(".group .decide").first.press("Enter")
    while not waiting:
        page.wait_for_timeout(20)
    same_bytes.press("Enter")
    until_note(page, "25 groups")
    with page.expect_response("**/duplicates/decisions*"):
        waiting.pop().continue_()
    page.wait_for_timeout(100)
    assert "25 groups" in note(page)
    assert focused(page).startswith("Same bytes")
    assert len(read_decisions(root / "index")) == 1
    # As other tests want it.
    page.unroute("**/duplicates/decisions*")
    page.get_by_role("button", name="Decided").press("Enter")
    page.wait_for_selector("#duplicates .group")
    page.locator(".group button").first.press("Enter")
    until_note(page, "Taken back.")
    assert read_decisions(root / "index") == []


@pytest.mark.parametrize("page", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], indirect=True)
def test_axe_finds_no_fault_and_it_fits(page):
    from axe_playwright_python.sync_playwright import Axe

    def check(view: str) -> None:
        violations = Axe().run(page).response["violations"]
        assert violations == [], [(view, each["id"], each["nodes"][0]["html"][:200]) for each in violations]
        dialog = "document.getElementById('duplicates')"
        for each in ("document.documentElement", dialog):
            assert page.evaluate(f"{each}.scrollWidth <= {each}.clientWidth"), view

    check("groups")
    page.locator(".group .decide").first.press("Enter")
    until_note(page, "Remembered")
    page.locator(".group .keep").first.press("Enter")
    until_note(page, "kept")
    check("decided groups")
    page.get_by_role("button", name="Decided").press("Enter")
    page.wait_for_selector("#duplicates .group")
    check("decisions")
    for left in (1, 0):
        page.locator(".group button").first.press("Enter")
        until(page, f"document.querySelectorAll('#duplicates .group').length === {left}")
    until_note(page, "Taken back.")
    computing = {
        "state": "computing",
        "step": "comparing pairs of images",
        "done": 3,
        "of": 9,
        "seconds": 4,
        "groups": [],
    }
    page.route("**/duplicates?*", lambda route: route.fulfill(status=202, json=computing))
    page.get_by_role("button", name="Same bytes").press("Enter")
    until_note(page, "Comparing pairs of images 3 of 9")
    check("progress")
