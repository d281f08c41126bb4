"""The search page in a real browser, over a real service in a process of its own."""

from __future__ import annotations

import csv
import io
import json
import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from forked import Forked, command, free_port, wait_until
from PIL import Image

pytest.importorskip("playwright", reason="no playwright: pip install 'clipvisionalign[pdf]'")
pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.explain.colours import COLOUR_ANCHORS
from clipvisionalign.explain.heatmaps import MAP_OPACITY, overlay
from clipvisionalign.search.browse import Browser
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.judgement_store import JUDGEMENTS_FILE
from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.tables import read_image_table


@contextmanager
def served(*indexes: Path, token: str = "", arguments: tuple[str, ...] = ()):
    """The address of a service over some indexes, in a process of its own."""
    port = free_port()
    out = indexes[0].with_name(f"{port}.txt")
    environment = {"CLIPVISIONALIGN_TOKEN": token}
    process = Forked(
        command, "serve", *map(str, indexes), "--port", str(port), *arguments, out=out, environment=environment
    )
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return bool(urllib.request.urlopen(f"{address}/health", timeout=30).read())
        except OSError:
            return False

    try:
        wait_until(is_up, process)
        yield address
        process.signal(signal.SIGTERM)
        # Pages that are still open do not keep it.
        assert process.wait(25) is not None, process.said
    finally:
        process.kill()


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, scenes_folder, tiny_runs):
    folder = tmp_path_factory.mktemp("served")
    for design in ("late", "self"):
        build_index(tiny_runs[design], scenes_folder, folder / design, captions=design == "late", late=design == "late")
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
        "request",
        lambda asked: None if asked.url.startswith((service, "data:", f"blob:{service}")) else said.append(asked.url),
    )
    browser_page.goto(service)
    until(browser_page, "document.getElementById('status').textContent.includes('images')")
    yield browser_page
    context.close()
    # Chromium itself writes a line about an answer such as 422, which the page tells its user.
    assert [line for line in said if "status of 422" not in line] == []


def test_the_service_ends_although_a_client_never_sends_the_rest_of_its_request(indexes):
    with served(indexes / "self") as address:
        client = socket.create_connection(("127.0.0.1", urlsplit(address).port))
        client.sendall(
            b"POST /judgements HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert urllib.request.urlopen(f"{address}/health", timeout=30).read()
    client.close()


def until(page, expression: str, *arguments) -> None:
    """Wait for an expression to be true; asked from outside, since the page's policy lets nothing be evaluated in it."""
    for _ in range(200):
        if page.evaluate(expression, *arguments):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def until_answered(page, query: str = "") -> None:
    """Wait for the images of a query; whether the small models of these tests know anything of it is left open."""
    for_query = f"for {query}"
    until(
        page,
        "(end) => /^(Images|Nothing) for /.test(document.getElementById('status').textContent)"
        " && document.getElementById('status').textContent.includes(end)",
        for_query,
    )


def search_for(page, query: str) -> list[str]:
    """Search by keyboard; the paths of the first page, best first."""
    page.get_by_label("Words").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    until_answered(page)
    page.wait_for_selector(".found li img")
    return paths(page)


def paths(page) -> list[str]:
    return page.eval_on_selector_all(".found .name", "names => names.map(name => name.title)")


def address(page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def open_options(page) -> None:
    if not page.get_by_label("Filter").is_visible():
        page.get_by_text("Options").click()


# --- what is searched for, and the address --------------------------------------------------------------------------


def test_the_first_view_has_all_images_newest_first(page, indexes):
    assert page.locator("#status").inner_text() == "120 images, newest first"
    rows = Browser(read_image_table(indexes / "late")).page(40).images
    assert paths(page)[:40] == [row["path"] for row in rows]


def test_escape_leaves_the_field_of_words_and_keeps_them(page):
    page.keyboard.press("/")
    page.keyboard.type("a ring")
    page.keyboard.press("Escape")
    assert page.locator("#words").input_value() == "a ring"
    page.keyboard.press("?")
    assert "Shift Space" in page.locator("dialog[open]").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#words").input_value() == "a ring"


def test_names_are_shown_as_they_are_written(browser, tmp_path, tiny_runs):
    """A character that turns the order of letters around makes an image of what is none, and the other way round."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / "photo\u202egnp.exe.png")
    build_index(tiny_runs["self"], tmp_path / "images", tmp_path / "index")
    with served(tmp_path / "index") as address, browser.new_context() as context:
        shown = context.new_page()
        shown.goto(address)
        until(shown, "document.getElementById('status').textContent.includes('image')")
        assert shown.locator("#results .name").inner_text().replace("\n", "") == "photo\\u202egnp.exe.png"
        assert "\u202e" not in shown.locator("#results").evaluate("(results) => results.outerHTML")


def test_the_address_holds_the_query_and_going_back_returns_to_it(page, service):
    open_options(page)
    page.get_by_label("Filter").fill('path like "0*"')
    page.get_by_label("Without").fill("blue, or green")
    page.get_by_label("Images at a time").fill("7")
    first = search_for(page, "a red circle, left of a star")
    assert address(page) == {"q": ["a red circle, left of a star"], "minus": ["blue, or green"],
                             "where": ['path like "0*"'], "count": ["7"]}  # fmt: skip
    second = search_for(page, "a blue square")
    assert first != second
    page.go_back()
    until(page, "(first) => document.querySelector('.found .name')?.title === first", first[0])
    assert page.get_by_label("Words").input_value() == "a red circle, left of a star"
    page.go_forward()
    until(page, "(first) => document.querySelector('.found .name')?.title === first", second[0])
    # A link that is opened anew, with a term beside another.
    page.goto(f"{service}/?q=a+red+circle&q=%5E2+star&count=5")
    until_answered(page, "a red circle + ")
    assert page.locator("#chips li").all_inner_texts() == ["a red circle\n×"]
    assert page.get_by_label("Words").input_value() == "^2 star"


def test_the_token_leaves_the_address(browser, indexes):
    with served(indexes / "self", token="a secret") as where:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{where}/?token=a%20secret&q=a+star")
        page.wait_for_selector(".found li")
        assert address(page) == {"q": ["a star"]}
        page.reload()
        page.wait_for_selector(".found li")
        context.close()


def test_a_text_with_commas_is_one_term_and_the_button_adds_others(page):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/search?" in request.url else None)
    search_for(page, "a star, a ring, and a circle")
    assert parse_qs(urlsplit(asked[0]).query)["q"] == ["a star, a ring, and a circle"]
    page.get_by_role("button", name="+ term").first.click()
    page.keyboard.type("blue")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a square")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.includes('blue + a square')")
    assert address(page)["q"] == ["a star, a ring, and a circle", "blue", "a square"]
    page.get_by_role("button", name="Remove term blue").click()
    page.keyboard.press("Enter")
    until(page, "!document.getElementById('status').textContent.includes('blue')")
    assert address(page)["q"] == ["a star, a ring, and a circle", "a square"]


def test_a_weight_in_its_former_form_is_told(page):
    search_for(page, "2:red circle")
    assert "write '^2 red circle'" in page.locator("#status").inner_text()


def test_an_error_is_told_and_the_next_search_works(page):
    open_options(page)
    page.get_by_label("Filter").fill("nothing = 3")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    assert "nothing" in page.locator("#status").inner_text()
    page.get_by_label("Filter").fill('path like "none*"')
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.startsWith('0 images')")
    page.get_by_label("Filter").fill("")
    search_for(page, "a star")


def test_words_and_without(page):
    plain = search_for(page, "a red circle")
    open_options(page)
    page.get_by_label("Without").fill("blue")
    page.keyboard.press("Enter")
    until(page, "(before) => document.querySelector('.found .name').title !== before", plain[0])
    until(page, "[...document.querySelectorAll('.found img')].slice(0, 4).every(i => i.complete && i.naturalWidth)")


def test_a_filter(page):
    open_options(page)
    assert "split" in page.locator("#columns").inner_text()
    page.get_by_label("Filter").fill('path like "00000*" and split = "train"')
    assert all(path.startswith("00000") for path in search_for(page, "a star"))
    page.locator(".found .open").first.press("Enter")
    assert "split\ntrain" in page.locator("#details").inner_text()


def test_further_images_are_loaded_at_the_end_of_the_page_in_the_order_of_one_search(page, service):
    with urllib.request.urlopen(f"{service}/search?q=a+star&count=100") as response:
        whole = [hit["path"] for hit in json.load(response)["found"]]
    page.set_viewport_size({"width": 500, "height": 300})
    page.goto(f"{service}/?q=a+star&count=9")
    page.wait_for_selector(".found li")
    page.wait_for_timeout(500)
    assert 9 <= len(paths(page)) < 100
    page.mouse.move(200, 200)
    for _ in range(100):
        page.mouse.wheel(0, 3000)
        if len(paths(page)) == 120:
            break
        page.wait_for_timeout(50)
    assert paths(page)[:100] == whole
    assert len(set(paths(page))) == len(paths(page)) == 120
    until(page, "document.getElementById('more').hidden")


# --- images that are searched with -------------------------------------------------------------------------------------


def test_an_image_finds_its_like(page, scenes_folder: Path):
    path = sorted((scenes_folder / "images").glob("*.png"))[3]
    page.get_by_label("An image").set_input_files(str(path))
    until(page, "document.getElementById('status').textContent.includes('like')")
    assert path.name in paths(page)[0]
    page.get_by_label("An image").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status.bad")
    assert "not an image" in page.locator("#status").inner_text()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(page, scenes_folder: Path, way):
    path = sorted((scenes_folder / "images").glob("*.png"))[5]
    page.evaluate(
        """([way, name, bytes]) => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            if (way === "paste") document.body.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: held }));
            else for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, { ...options, dataTransfer: held }));
        }""",
        [way, path.name, list(path.read_bytes())],
    )
    until(page, "document.getElementById('status').textContent.includes('like')")
    assert path.name in paths(page)[0]
    assert page.locator("#drop").is_hidden()
    page.get_by_role("button", name="Remove the image").click()
    until(page, "document.getElementById('status').textContent.includes('newest')")


# --- keys ------------------------------------------------------------------------------------------------------------


def focused(page) -> str:
    return page.evaluate(
        "document.activeElement.closest('.card')?.querySelector('.name').title ?? document.activeElement.id"
    )


def test_all_by_keyboard(page):
    page.keyboard.press("/")
    assert focused(page) == "words"
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    until_answered(page)
    listed = paths(page)
    page.locator("#results").focus()
    page.keyboard.press("Tab")
    assert focused(page) == listed[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page) == listed[2]
    page.keyboard.press("ArrowDown")
    below = focused(page)
    assert listed.index(below) > 2
    page.keyboard.press("ArrowUp")
    assert focused(page) == listed[2]
    page.keyboard.press("End")
    assert focused(page) in paths(page)[len(listed) - 1 :]
    page.keyboard.press("Home")
    # The large view, its neighbours, and back to the image that was seen last.
    page.keyboard.press("Enter")
    until(page, "document.querySelector('dialog[open] img')?.naturalWidth > 30")
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-title").inner_text() == Path(listed[1]).name
    page.keyboard.press("Escape")
    assert not page.locator("dialog[open]").count()
    assert focused(page) == listed[1]
    page.keyboard.press("s")
    until(page, "document.getElementById('status').textContent.includes('like')")
    assert listed[1] not in paths(page)
    page.keyboard.press("?")
    assert "Shift Space" in page.locator("dialog[open]").inner_text()
    page.get_by_label("keys of a single character work").uncheck()
    page.keyboard.press("Escape")
    page.locator("#results").focus()
    page.keyboard.press("/")
    assert focused(page) == "results"


def test_selected_images_are_copied_and_exported(page, indexes):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    listed = search_for(page, "a red circle")
    page.locator(".found .open").first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Space")
    page.locator(".card").nth(5).hover()
    page.locator(".card .pick").nth(5).click()
    chosen = [*listed[:3], listed[5]]
    assert page.locator(".card.chosen .name").evaluate_all("names => names.map(name => name.title)") == chosen
    assert page.locator("#selected-count").inner_text() == "4 images selected"
    page.get_by_role("button", name="Copy paths").click()
    until(page, "document.getElementById('selected-count').textContent.includes('copied')")
    folder = read_manifest(indexes / "late").folder
    copied = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert copied == [f"{folder}/{path}" for path in chosen]
    assert all(Path(path).is_file() for path in copied)
    contents = {}
    for name in ("Paths", "CSV", "JSON"):
        with page.expect_download() as download:
            page.locator("#selected").get_by_role("button", name=name, exact=True).click()
        contents[name] = Path(download.value.path()).read_text(encoding="utf-8")
    assert contents["Paths"].splitlines() == copied
    rows = list(csv.DictReader(io.StringIO(contents["CSV"])))
    assert [row["path"] for row in rows] == [row["path"] for row in json.loads(contents["JSON"])] == chosen
    assert {row["split"] for row in rows} <= {"train", "dev", "test"}
    page.keyboard.press("Escape")
    assert page.locator("#selected").is_hidden()


def test_a_search_is_saved_renamed_opened_and_deleted(page):
    listed = search_for(page, "a red circle")
    page.get_by_role("button", name="Save this search").click()
    page.get_by_label("Name of this search").fill("red")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    search_for(page, "a blue star")
    page.reload()
    page.wait_for_selector(".found li")
    page.get_by_role("button", name="Saved searches").click()
    page.get_by_role("button", name="Rename red").click()
    page.keyboard.type("red circles")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="red circles").click()
    until_answered(page, "a red circle")
    assert paths(page) == listed
    page.get_by_role("button", name="Saved searches").click()
    page.get_by_role("button", name="Delete red circles").click()
    assert "None yet" in page.locator("#saved-list").inner_text()


# --- one image, and why ------------------------------------------------------------------------------------------------


def test_why_by_keyboard_with_a_map_of_each_word(page):
    search_for(page, "2:a red circle")
    page.locator(".found .open").first.focus()
    page.keyboard.press("w")
    until(page, "document.querySelectorAll('#why-maps button').length === 4")
    words = page.locator("#why-maps button").all_inner_texts()
    assert words == ["all words", "a", "red", "circle"]
    maps = []
    for word in words:
        choice = page.get_by_role("button", name=word, exact=True)
        choice.press("Enter")
        assert choice.get_attribute("aria-pressed") == "true"
        assert page.locator("#why-maps [aria-pressed=true]").count() == 1
        maps.append(page.evaluate("document.getElementById('map').toDataURL()"))
    assert len(set(maps)) > 1
    # Without its colour a map is the image in grey.
    page.get_by_role("slider", name="Colour").fill("0")
    pixels = "[...document.getElementById('map').getContext('2d').getImageData(0, 0, 60, 60).data]"
    grey = page.evaluate(pixels)
    assert grey[0::4] == grey[1::4] == grey[2::4]
    assert "late interaction" in page.locator("#why-note").inner_text()
    # Other words, without a search.
    page.get_by_label("Where in the image").fill("a star")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#why-maps button').length === 3")
    page.keyboard.press("Escape")
    assert not page.locator("dialog[open]").count()


def test_the_map_of_the_page_is_that_of_the_sheet(page):
    """The same colours, enlarged the same way, as `overlay` gives."""
    rng = np.random.default_rng(0)
    grid = rng.random((7, 7)).round(3)
    image = rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)
    drawn = page.evaluate(
        """async ([pixels, grid, anchors, opacity]) => {
            const { drawMap } = await import("/page/heatmap.js");
            const image = document.createElement("canvas"), drawn = document.createElement("canvas");
            Object.assign(image, { width: 90, height: 60 });
            const data = new ImageData(90, 60);
            pixels.forEach((value, at) => { data.data[4 * Math.floor(at / 3) + at % 3] = value; data.data[4 * Math.floor(at / 3) + 3] = 255; });
            image.getContext("2d").putImageData(data, 0, 0);
            drawMap(drawn, image, grid, anchors, opacity, 90, 60);
            return [...drawn.getContext("2d").getImageData(0, 0, 90, 60).data];
        }""",
        [image.flatten().tolist(), grid.tolist(), COLOUR_ANCHORS, MAP_OPACITY],
    )
    page_map = np.array(drawn).reshape(60, 90, 4)[..., :3]
    assert np.abs(page_map - overlay(Image.fromarray(image), grid, 90).astype(int)).max() <= 3


def test_captions_of_an_image(page):
    search_for(page, "a red circle")
    page.locator(".found .open").first.press("Enter")
    page.get_by_role("button", name="Captions").click()
    until(page, "document.querySelectorAll('#captions li').length === 10")


# --- several indexes -------------------------------------------------------------------------------------------------


def test_compare_and_re_rank(page):
    open_options(page)
    page.get_by_label("compare both indexes").check()
    page.get_by_label("re-rank the first 32").check()
    page.get_by_label("Images at a time").fill("10")
    search_for(page, "a star")
    assert page.locator(".columns.two section").count() == 2
    assert page.get_by_role("heading", name="Index 2, design self").count() == 1
    assert " / " in page.locator("section").first.locator(".value").first.inner_text()
    # Read at one moment: further images may arrive between two calls.
    left, right, badges = page.evaluate(
        """() => {
            const texts = (column, selector, text) =>
                Array.from(column.querySelectorAll(selector), text);
            const [first, second] = document.querySelectorAll(".columns section");
            const titles = (column) => texts(column, ".name", (name) => name.title);
            return [titles(first), titles(second), texts(first, ".rank", (rank) => rank.innerText)];
        }"""
    )
    expected = [
        "here only"
        if path not in right
        else "same rank"
        if right.index(path) == rank
        else f"there {right.index(path) + 1}."
        for rank, path in enumerate(left)
    ]
    assert badges == expected
    assert address(page) == {"q": ["a star"], "rerank": ["1"], "compare": ["1"], "count": ["10"]}


def test_all_images_are_ranked_word_by_word(page, service):
    plain = search_for(page, "a star")
    with urllib.request.urlopen(f"{service}/search?q=a+star&count=40&late=true") as response:
        whole = [hit["path"] for hit in json.load(response)["found"]]
    assert plain[:40] != whole
    open_options(page)
    rerank, late = page.get_by_label("re-rank the first 32"), page.get_by_label("rank all images word by word")
    rerank.check()
    late.check()
    assert not rerank.is_checked()
    assert search_for(page, "a star")[:40] == whole
    assert address(page) == {"q": ["a star"], "late": ["1"]}
    page.reload()
    until_answered(page, "a star")
    assert paths(page)[:40] == whole
    open_options(page)
    # The other index has no files for it, and gives what it gives without.
    page.get_by_label("compare both indexes").check()
    search_for(page, "a star")
    with urllib.request.urlopen(f"{service}/search?q=a+star&count=40&index=1") as response:
        other = [hit["path"] for hit in json.load(response)["found"]]
    sections = page.locator(".columns section")
    assert sections.nth(1).locator(".name").evaluate_all("names => names.map(name => name.title)")[:40] == other
    rerank.check()
    assert not late.is_checked()
    for value, on in (("0", False), ("false", False), ("1", True), ("true", True)):
        page.goto(f"{service}/?q=a+star&late={value}")
        until_answered(page, "a star")
        assert late.is_checked() == on
        assert paths(page)[:40] == (whole if on else plain[:40])


def test_what_an_index_cannot_do_is_not_offered(browser, served_alone):
    context = browser.new_context()
    page = context.new_page()
    page.goto(served_alone)
    until(page, "document.getElementById('status').textContent.includes('images')")
    open_options(page)
    assert page.get_by_label("Filter").is_visible()
    for label in ("compare both indexes", "re-rank the first 32", "rank all images word by word", "Promise"):
        assert not page.get_by_label(label).is_visible()
    page.locator(".found .open").first.press("Enter")
    assert not page.get_by_role("button", name="Captions").is_visible()
    context.close()


# --- what is promised --------------------------------------------------------------------------------------------------


@pytest.fixture
def promising(page):
    """The service's answers as those of a calibrated index in which `promised` images reach a level; what was asked."""
    state = {"promised": 5, "nothing": False, "known": True}
    return page, state, answer_as_calibrated(page, state)


def answer_as_calibrated(page, state: dict[str, int]) -> list[dict[str, list[str]]]:
    """Let a page's searches be answered as of a calibrated index; the list of what is asked of it."""
    asked: list[dict[str, list[str]]] = []

    def answer(route) -> None:
        values = parse_qs(urlsplit(route.request.url).query)
        asked.append(values)
        offset, count = int(values.get("offset", ["0"])[0]), int(values["count"][0])
        level = float(values.get("promise", ["0.9"])[0])
        promised = min(state["promised"], 30 if "promise" in values else offset + count)
        end = promised if "promise" in values else 30
        hits = [{"id": each, "path": f"{each}.png", "score": 1 - each / 100, "width": 9, "height": 9, "size": 9}
                for each in range(offset, min(offset + count, end))]  # fmt: skip
        promise = {"level": level, "threshold": 0.5, "promised": promised, "more": promised == offset + count < 30,
                   "calibrated_on": "drawn scenes"}  # fmt: skip
        verdict = {"promise": promise if state["known"] else None, "nothing": state["nothing"],
                   "reason": "No word is known" if state["nothing"] else ""}  # fmt: skip
        route.fulfill(json={"found": hits if state["known"] else [], "notes": [], **verdict})

    page.route("**/search?*", answer)
    return asked


@pytest.mark.parametrize("level", ["", "0.8", "0.95"])
@pytest.mark.parametrize("promised", [0, 1, 5, 8, 10, 29, 30])
def test_the_line_stands_after_the_last_promised_image(promising, level, promised):
    page, state, asked = promising
    state.update(promised=promised, nothing=promised == 0)
    page.goto(
        f"{urlsplit(page.url)._replace(query='', path='/').geturl()}?q=a+star&count=5{level and '&promise='}{level}"
    )
    until(page, "document.querySelectorAll('.card').length === 30")
    assert paths(page) == [f"{each}.png" for each in range(30)]
    assert page.locator(".promise-line").count() == 1
    position = page.evaluate(
        "[...document.querySelectorAll('.found > :not(.filler)')].indexOf(document.querySelector('.promise-line'))"
    )
    assert position == promised
    assert page.locator(".card.below").count() == 30 - promised
    text = page.locator(".promise-line").inner_text()
    assert f"{100 * float(level or 0.9):g} % probability" in text
    assert "drawn scenes" in text
    assert page.locator(".nothing").count() == (promised == 0)
    assert {values["promise"][0] for values in asked if "promise" in values} == ({level} if level else set())
    open_options(page)
    assert page.get_by_label("Promise").input_value() == level


def test_a_query_without_a_known_word_is_told_so(promising):
    page, state, _ = promising
    state.update(nothing=True, known=False)
    page.get_by_label("Words").fill("犬犬")
    page.keyboard.press("Enter")
    page.wait_for_selector(".nothing")
    assert "Nothing here fits 犬犬" in page.locator(".nothing").inner_text()
    assert "No word is known" in page.locator(".nothing").inner_text()
    assert page.locator("#status").inner_text().startswith("Nothing for 犬犬")


def test_where_nothing_fits_nothing_is_promised(promising):
    page, state, _ = promising
    state.update(promised=2, nothing=True)
    page.get_by_label("Words").fill("zorb")
    page.keyboard.press("Enter")
    page.wait_for_selector(".nothing")
    assert page.locator(".promise-line").count() == 0


# --- judged queries ----------------------------------------------------------------------------------------------------


def judgements_of(index: Path) -> dict[tuple[str, ...], dict]:
    """The judgements of an index's file, the last of each query."""
    lines = (index / JUDGEMENTS_FILE).read_text(encoding="utf-8").splitlines()
    return {tuple(line["query"]): line for line in map(json.loads, lines)}


def until_judged(page) -> None:
    until(page, "document.getElementById('status').textContent.startsWith('Judged ')")


def test_a_query_is_judged_by_keyboard_with_images_that_other_words_find(page, indexes):
    listed = search_for(page, "a red circle")
    page.locator(".found .open").first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("j")
    assert focused(page) == "judging-title"
    assert page.locator("#judging").inner_text().startswith("Judging “a red circle”")
    assert page.locator("#judging-count").inner_text() == "1 image selected"
    # Escape, which clears a selection otherwise, loses nothing here.
    page.keyboard.press("Escape")
    others = search_for(page, "a blue star")
    other = next(path for path in others if path != listed[0])
    page.locator(".found .open").nth(others.index(other)).focus()
    page.keyboard.press("Space")
    page.keyboard.press("j")
    page.keyboard.press("Tab")
    assert focused(page) == "judge-store"
    page.keyboard.press("Enter")
    until_judged(page)
    assert focused(page) == "words"
    stored = judgements_of(indexes / "late")["a red circle",]
    assert stored["relevant"] == [listed[0], other]
    assert stored["searched"] == ["a blue star"]
    assert page.locator("#judging").is_hidden()
    assert page.locator(".card.chosen").count() == 0
    # It is judged again from what was selected; and nothing is offered for what is not a search of the whole index.
    search_for(page, "a red circle")
    page.get_by_role("button", name="Judged: 2 images – judge again").press("Enter")
    assert page.locator("#judging-count").inner_text() == "2 images selected"
    assert page.locator(".card.chosen .name").first.get_attribute("title") == listed[0]
    page.get_by_role("button", name="Clear").last.press("Enter")
    page.get_by_role("button", name="Nothing here holds it").press("Enter")
    until_judged(page)
    assert judgements_of(indexes / "late")["a red circle",]["relevant"] == []
    open_options(page)
    page.get_by_label("Filter").fill("width > 1")
    search_for(page, "a red circle")
    assert page.locator("#judge").is_hidden()


def test_two_people_who_judge_one_query_at_once_lose_nothing(page, service, indexes, browser):
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(service)
        until(other, "document.getElementById('status').textContent.includes('images')")
        chosen = []
        for number, each in enumerate((page, other)):
            listed = search_for(each, "a green ring")
            each.locator(".found .open").nth(number).focus()
            each.keyboard.press("Space")
            each.keyboard.press("j")
            chosen.append(listed[number])
        page.locator("#judge-store").press("Enter")
        until_judged(page)
        other.locator("#judge-store").press("Enter")
        until(other, "document.getElementById('judging-note').textContent.includes('1 are new here')")
        assert judgements_of(indexes / "late")["a green ring",]["relevant"] == chosen[:1]
        other.locator("#judge-store").press("Enter")
        until_judged(other)
    assert set(judgements_of(indexes / "late")["a green ring",]["relevant"]) == set(chosen)


def test_judged_queries_are_listed_opened_and_taken_back(page, indexes):
    listed = search_for(page, "a yellow star")
    page.keyboard.press("Escape")
    page.locator("#judge").press("Enter")
    page.locator("#judge-nothing").press("Enter")
    until_judged(page)
    page.get_by_role("button", name="Judged queries").press("Enter")
    page.wait_for_selector("#judged[open]")
    dialog = page.locator("#judged")
    assert "of 50 queries with images" in dialog.inner_text()
    assert not page.locator("#judged-calibrate").is_visible()
    dialog.get_by_role("link", name="a yellow star").press("Enter")
    until_answered(page, "a yellow star")
    assert paths(page)[:20] == listed[:20]
    page.get_by_role("button", name="Judged queries").press("Enter")
    dialog.get_by_role("button", name="Take back the judgement of a yellow star").press("Enter")
    until(page, "!document.getElementById('judged-list').textContent.includes('a yellow star')")
    assert judgements_of(indexes / "late")["a yellow star",]["relevant"] is None
    page.keyboard.press("Escape")
    assert page.locator("#judge").inner_text() == "Judge this query"


def test_a_service_that_is_read_only_offers_no_judging(browser, indexes):
    with served(indexes / "self", arguments=("--read-only",)) as where:
        context = browser.new_context()
        page = context.new_page()
        page.goto(where)
        until(page, "document.getElementById('status').textContent.includes('images')")
        search_for(page, "a star")
        assert page.locator("#judge").is_hidden()
        assert page.locator("#open-judged").is_hidden()
        page.keyboard.press("Tab")
        page.keyboard.press("j")
        assert page.locator("#judging").is_hidden()
        context.close()
    assert not (indexes / "self" / JUDGEMENTS_FILE).exists()


# --- dates and places ------------------------------------------------------------------------------------------------

FACETS = {
    "months": [{"value": month, "count": count, "where": f"taken = {month}"}
               for month, count in (("2024-02", 1), ("2023-05", 40), ("2023-01", 3))],
    "places": [{"value": 'Saint "X"', "count": 7, "where": 'place = "Saint ""X"""'}, {"value": "Oslo", "count": 2, "where": 'place = "Oslo"'}],
    "cameras": [],
}  # fmt: skip


def health_with_facets(route) -> None:
    answer = route.fetch().json()
    answer["indexes"][0]["filters"] += ["taken", "place"]
    route.fulfill(json=answer)


def test_a_date_and_a_place_become_parts_of_the_filter(page, service):
    asked: list[str] = []

    def browse(route) -> None:
        asked.append(parse_qs(urlsplit(route.request.url).query).get("where", [""])[0])
        route.fulfill(json={"found": [], "total": 0, "next": None})

    page.route("**/health", health_with_facets)
    note = "shard-02 cannot be read: its 30 images are missing"
    page.route("**/facets", lambda route: route.fulfill(json=FACETS | {"notes": [note]}))
    page.route("**/browse?*", browse)
    page.goto(f"{service}/?where=width+%3E+3+or+height+%3E+3")
    page.locator("#facets").get_by_text(note).wait_for()
    page.get_by_text("Dates").click()
    for name, where in (
        ("May 2023: 40 images", "(width > 3 or height > 3) and taken = 2023-05"),
        ("2023 (43)", "(width > 3 or height > 3) and taken = 2023"),
    ):
        page.get_by_role("button", name=name).press("Enter")
        until(page, "(where) => new URLSearchParams(location.search).get('where') === where", where)
        assert page.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
        assert page.get_by_label("Filter").input_value() == where
    page.get_by_text("Places").click()
    page.get_by_role("button", name='Saint "X" (7)').click()
    until(page, "location.search.includes('Saint')")
    page.get_by_role("button", name="2023 (43)").click()
    until(page, "!location.search.includes('taken')")
    page.reload()
    page.get_by_text("Places").click()
    assert page.get_by_role("button", name='Saint "X" (7)').get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name='Saint "X" (7)').click()
    until(page, "!location.search.includes('Saint')")
    base = "width > 3 or height > 3"
    assert asked == [
        base, f"({base}) and taken = 2023-05", f"({base}) and taken = 2023",
        f'({base}) and taken = 2023 and place = "Saint ""X"""', f'({base}) and place = "Saint ""X"""',
        f'({base}) and place = "Saint ""X"""', f"({base})",
    ]  # fmt: skip
    assert not page.get_by_text("Cameras").count()


#: Judged queries of an index that can be calibrated on them.
JUDGED = {
    "queries": [{"query": [f"a star and {each} rings"], "relevant": ["1.png"] * (each % 3), "time": str(each)} for each in range(75)],
    "judged": 75, "with_images": 51, "levels": [{"level": 0.9, "needed": 50}, {"level": 0.95, "needed": 100}],
    "command": "clipvisionalign calibrate /a/long/path/of/an/index --judged /a/long/path/of/an/index/judgements.jsonl",
    "calibrated_on": "flickr8k, dev: 500 images, 2,500 captions",
}  # fmt: skip


# --- for all -----------------------------------------------------------------------------------------------------------


def test_the_interface_is_described_and_tried(page, service):
    page.goto(f"{service}/docs")
    page.wait_for_selector("text=/Images by words/")
    assert page.locator(".opblock").count() >= 8
    page.locator("#operations-default-health_health_get").click()
    page.get_by_role("button", name="Execute").click()
    until(page, "document.querySelector('.responses-table .response .microlight')?.textContent.includes('pictures')")


@pytest.mark.slow
@pytest.mark.parametrize("page", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], indirect=True)
def test_axe_finds_no_fault_and_it_fits(page):
    from axe_playwright_python.sync_playwright import Axe

    def check(view: str) -> None:
        violations = Axe().run(page).response["violations"]
        assert violations == [], [(view, each["id"], each["nodes"][0]["html"][:200]) for each in violations]
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view

    check("newest")
    search_for(page, "a red circle")
    open_options(page)
    page.get_by_label("compare both indexes").check()
    page.get_by_role("button", name="+ term").first.click()
    search_for(page, "a star")
    page.locator(".found .open").first.press(" ")
    check("compared and selected")
    page.locator(".found .open").first.press("w")
    until(page, "document.querySelectorAll('#why-maps button').length > 3")
    check("large")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save this search").click()
    page.keyboard.press("Enter")
    check("saved")
    page.keyboard.press("Escape")
    page.locator("#results").focus()
    page.keyboard.press("?")
    check("keys")
    page.keyboard.press("Escape")
    for view in views_of_a_calibrated_index(page):
        check(view)


def views_of_a_calibrated_index(page) -> Iterator[str]:
    """The page over a calibrated index with dates and places and fifty judged queries: one view after the other."""
    state = {"promised": 5, "nothing": False, "known": True}
    answer_as_calibrated(page, state)
    page.route("**/health", health_with_facets)
    page.route("**/facets", lambda route: route.fulfill(json=FACETS))
    page.route("**/judgements", lambda route: route.fulfill(json=JUDGED))
    page.goto(f"{urlsplit(page.url)._replace(query='', path='/').geturl()}?q=a+star&count=5")
    page.wait_for_selector(".promise-line")
    yield "promise line"
    page.get_by_text("Dates").click()
    page.get_by_text("Places").click()
    page.locator(".month").first.hover()
    yield "facets"
    open_options(page)
    yield "options"
    page.locator(".found .open").first.press(" ")
    page.locator("#judge").press("Enter")
    yield "judging"
    page.get_by_role("button", name="Stop judging").press("Enter")
    page.get_by_role("button", name="Judged queries").press("Enter")
    page.wait_for_selector("#judged-command")
    yield "judged queries"
    page.keyboard.press("Escape")
    state.update(promised=0, nothing=True)
    search_for(page, "a square")
    yield "nothing, with the nearest"
    state.update(known=False)
    page.get_by_label("Words").fill("犬犬")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.startsWith('Nothing for 犬犬')")
    yield "nothing"
    page.unroute("**/search?*")
    page.get_by_label("Filter").fill("nothing = 3")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    yield "an error"
