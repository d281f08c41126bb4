"""The search page in a real browser, over a real service in a process of its own."""

from __future__ import annotations

import signal
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forked, command, free_port

pytest.importorskip("playwright", reason="no playwright: pip install 'clipvisionalign[pdf]'")
pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.search.indexer import build_index


@contextmanager
def served(*indexes: Path):
    """The address of a service over some indexes, in a process of its own."""
    port = free_port()
    out = indexes[0].with_name(f"{port}.txt")
    process = Forked(command, "serve", *map(str, indexes), "--port", str(port), out=out)
    address = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        try:
            urllib.request.urlopen(f"{address}/health").read()
            break
        except OSError:
            assert process.poll() is None, process.said
            time.sleep(0.05)
    yield address
    process.signal(signal.SIGTERM)
    process.wait()


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, scenes_folder, tiny_runs):
    folder = tmp_path_factory.mktemp("served")
    for design in ("late", "self"):
        build_index(tiny_runs[design], scenes_folder, folder / design, captions=design == "late")
    return folder


@pytest.fixture(scope="module")
def service(indexes):
    """Two indexes, served."""
    with served(indexes / "late", indexes / "self") as address:
        yield address


@pytest.fixture
def served_alone(indexes):
    """One of them."""
    with served(indexes / "self") as address:
        yield address


@pytest.fixture
def page(browser, service, request):
    """The page; whatever it said to the console fails the test."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    browser_page = context.new_page()
    said: list[str] = []
    browser_page.on("console", lambda message: said.append(message.text))
    browser_page.on("pageerror", lambda error: said.append(str(error)))
    browser_page.on(
        "request", lambda asked: None if asked.url.startswith((service, "data:")) else said.append(asked.url)
    )
    browser_page.goto(service)
    until(browser_page, "document.getElementById('status').textContent.includes('images')")
    yield browser_page
    context.close()
    # Chromium itself writes a line about an answer such as 422, which the page tells its user.
    assert [line for line in said if "status of 422" not in line] == []


def until(page, expression: str, *arguments) -> None:
    """Wait for an expression to be true; asked from outside, since the page's policy lets nothing be evaluated in it."""
    for _ in range(200):
        if page.evaluate(expression, *arguments):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def search_for(page, query: str) -> list[str]:
    """Search by keyboard; the paths that are found."""
    page.get_by_label("Words").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.includes(' for ')")
    page.wait_for_selector(".found li img")
    return page.locator(".found .about").all_inner_texts()


def test_a_weight_in_its_former_form_is_told(page):
    search_for(page, "2:red circle")
    assert "write '^2 red circle'" in page.locator("#status").inner_text()


def test_words_and_without(page):
    plain = search_for(page, "a red circle")
    assert len(plain) == 20
    page.get_by_label("Without").fill("blue")
    page.keyboard.press("Enter")
    until(page, "(before) => document.querySelector('.found .about').textContent !== before", plain[0])
    until(page, "[...document.querySelectorAll('.found img')].slice(0, 4).every(i => i.complete && i.naturalWidth)")


def test_an_image_finds_its_like(page, scenes_folder: Path):
    path = sorted((scenes_folder / "images").glob("*.png"))[3]
    page.get_by_text("Image, filter, order").click()
    page.get_by_label("An image").set_input_files(str(path))
    page.wait_for_selector(".found li")
    assert path.name in page.locator(".found .about").first.inner_text()
    page.get_by_label("An image").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status.bad")
    assert "not an image" in page.locator("#status").inner_text()


def test_why_by_keyboard_alone(page):
    search_for(page, "2:a red circle")
    page.get_by_role("button", name="Why").first.focus()
    page.keyboard.press("Enter")
    until(page, "document.querySelector('dialog[open] img')?.naturalWidth > 300")
    assert page.evaluate("document.activeElement.textContent") == "Close"
    page.keyboard.press("Escape")
    assert not page.locator("dialog[open]").count()
    page.get_by_role("button", name="Images similar to").first.focus()
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.includes('like')")


def test_captions_of_an_image(page):
    search_for(page, "a red circle")
    page.get_by_role("button", name="Captions near").first.click()
    page.wait_for_selector("dialog[open] li")
    assert page.locator("dialog li").count() == 10


def test_compare_and_re_rank(page):
    page.get_by_text("Image, filter, order").click()
    page.get_by_label("compare both indexes").check()
    page.get_by_label("re-rank the first 32").check()
    search_for(page, "a star")
    assert page.locator(".columns.two section").count() == 2
    assert page.get_by_role("heading", name="Index 2, design self").count() == 1
    assert " / " in page.locator("section").first.locator(".about").first.inner_text()


def test_the_interface_is_described_and_tried(page, service):
    page.goto(f"{service}/docs")
    page.wait_for_selector("text=/Images by words/")
    assert page.locator(".opblock").count() >= 8
    page.locator("#operations-default-health_health_get").click()
    page.get_by_role("button", name="Execute").click()
    until(page, "document.querySelector('.responses-table .response .microlight')?.textContent.includes('pictures')")


def test_what_an_index_cannot_do_is_not_offered(browser, served_alone):
    context = browser.new_context()
    page = context.new_page()
    page.goto(served_alone)
    until(page, "document.getElementById('status').textContent.includes('images')")
    page.get_by_text("Image, filter, order").click()
    assert page.get_by_label("Filter").is_visible()
    assert not page.get_by_label("compare both indexes").is_visible()
    assert not page.get_by_label("re-rank the first 32").is_visible()
    context.close()


def test_a_filter(page):
    page.get_by_text("Image, filter, order").click()
    assert "split" in page.locator("#columns").inner_text()
    page.get_by_label("Filter").fill('path like "00000*" and split = "train"')
    assert all("00000" in text and "split train" in text for text in search_for(page, "a star"))


@pytest.mark.parametrize("page", [(1280, "light"), (1280, "dark"), (390, "light")], indirect=True)
def test_axe_finds_no_fault_and_it_fits(page):
    from axe_playwright_python.sync_playwright import Axe

    search_for(page, "a red circle")
    violations = Axe().run(page).response["violations"]
    assert violations == [], [(one["id"], one["nodes"][0]["html"][:200]) for one in violations]
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
