"""Answers that are continued, and maps as numbers: what the search page asks of the service."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from asked import FORM, ask, form
from odd_images import encoded, noise

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.explain.heatmaps import Explanation
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.server.limits import Limits

IMAGES = 57
LIMITS = Limits(offset=50)


class Stub:
    """A `Searcher` over `IMAGES` images, which notes its queries."""

    manifest = SimpleNamespace(kind="exact", recall=1.0, folder="/images")
    aligner = SimpleNamespace(config=SimpleNamespace(design="late"), late=object())
    table = SimpleNamespace(count_rows=lambda: IMAGES)
    caption_table, metadata, index = None, {}, "/an index"
    reader = None

    def __init__(self):
        self.queries = []

    def search_batch(self, queries):
        return [self.search_one(query) for query in queries]

    def search_one(self, query):
        self.queries.append(query)
        return [Hit(each, f"{each}.jpg", 1 - each / 100, 2, 3, 4) for each in range(IMAGES)][: query.count]

    def vector_of(self, number):
        return np.ones(4, dtype=np.float32)

    def image_source(self, number):
        return encoded(noise(), "PNG")


def asked_ids(app, path: str, query: str, offset: int, **more) -> list[int]:
    response = ask(app, path, f"{query}&offset={offset}", **more)
    assert response.status == 200, response
    return [hit["id"] for hit in json.loads(response.body)["found"]]


@pytest.mark.parametrize("count", [1, 7, 20, 50])
def test_an_answer_is_continued_where_it_ended(count):
    app = create_app([Stub()], limits=LIMITS)
    upload = {"method": "POST", "headers": FORM, "pieces": [form(encoded(noise(), "PNG"))]}
    for path, query, more in (("/search", "q=a", {}), ("/similar", "id=5", {}), ("/similar", "", upload)):
        expected = [each for each in range(IMAGES) if (path, query) != ("/similar", "id=5") or each != 5]
        ids: list[int] = []
        while len(ids) <= LIMITS.offset and (page := asked_ids(app, path, f"{query}&count={count}", len(ids), **more)):
            ids += page
        assert ids == expected[: len(ids)]
        assert len(ids) > min(LIMITS.offset, len(expected) - 1)
        assert ask(app, path, f"{query}&offset={LIMITS.offset + 1}", **more).status == 422


def test_images_after_the_re_ranked_are_not_re_ranked_again():
    stub = Stub()
    app = create_app([stub], limits=LIMITS)
    for offset in (0, 10, 31, 32, 40):
        asked_ids(app, "/search", "q=a&count=10&rerank=32", offset)
    assert [(query.rerank, query.count) for query in stub.queries] == [(32, 10), (32, 20), (32, 41), (0, 42), (0, 50)]


def test_the_maps_of_an_explanation_are_numbers(monkeypatch):
    grids = np.linspace(0, 1, 2 * 49).reshape(2, 7, 7)
    explanation = Explanation("a dog", 0.25, grids[0], [("dog", grids[1])], "late interaction", ["cut"])
    monkeypatch.setattr("clipvisionalign.explain.heatmaps.explain", lambda *_: explanation)
    app = create_app([Stub()], limits=LIMITS)
    answer = json.loads(ask(app, "/explanation", "id=1&caption=a+dog").body)
    np.testing.assert_allclose(answer["map"], grids[0], atol=1e-3)
    assert [each["word"] for each in answer["words"]] == ["dog"]
    np.testing.assert_allclose(answer["words"][0]["map"], grids[1], atol=1e-3)
    assert (answer["score"], answer["method"], answer["ignored"]) == (0.25, "late interaction", ["cut"])
    assert ask(app, "/explanation", "id=1&caption=+").status == 422
    grids[1, 3, 3] = np.nan
    assert ask(app, "/explanation", "id=1&caption=a+dog").status == 422


def test_the_colours_of_a_map_grow_lighter_evenly():
    from clipvisionalign.explain.colours import colour_map

    colours = colour_map(np.linspace(-0.5, 1.5, 201)) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)
    steps = np.diff(lightness[50:151])
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.mean()
    assert (np.diff(lightness)[:50] == 0).all()
    assert lightness[-1] - lightness[0] > 70
