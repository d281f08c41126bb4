"""Pages of odd reports in a real browser: on a GPU, of one seed, of two images, of a refused variant, of four equal designs."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_reports import cost_round, made_report

pytest.importorskip("playwright", reason="no playwright: pip install 'clipvisionalign[pdf]'")

from clipvisionalign.study.report.build import write_report

FOUR = ("self", "sparse", "late", "cross")


def rounds(*about: float | None) -> list[dict]:
    return [cost_round(*about)] * 2


def report_of(kind: str) -> dict:
    if kind == "gpu":
        costs = dict(zip(FOUR, (rounds(2, 2040, 700), rounds(2.5, 2043, 690), rounds(2.1, 2041, 900, 3.0),
                                rounds(2.1, 2044, 12_400, 700.0)), strict=True))  # fmt: skip
        return made_report(dict(zip(FOUR, (0.4, 0.41, 0.6, 0.8), strict=True)), (0, 1, 2), 40, (4, 9, 14), costs=costs,
                           pairs={"count": 20, "relation": 30}, bases={"cross": "late"})  # fmt: skip
    if kind == "one seed":
        return made_report(seeds=[0], costs={"self": rounds(), "late": rounds()}, pairs={"count": 20})
    if kind == "two images":
        return made_report(images=2, costs={"self": rounds(), "late": rounds()}, pairs={"count": 2})
    if kind == "refused":
        return made_report(dict.fromkeys(FOUR, 0.5), refused=[("cross", 0), ("cross", 1)], missing=[("late", 0)])
    return made_report(
        dict.fromkeys(FOUR, 0.5), alike=True, costs={name: rounds() for name in FOUR}, pairs={"count": 20}
    )


#: What runs out of the page, or out of its figure.
OUTSIDE = """() => {
  const found = document.documentElement.scrollWidth > document.documentElement.clientWidth ? ["the page"] : [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 2 || at.right > box.right + 2 || at.top < box.top - 2 || at.bottom > box.bottom + 2)
        found.push(`${text.textContent} in ${svg.getAttribute("aria-labelledby")}`);
    }
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpu", "one seed", "two images", "refused", "equal"])
def test_nothing_runs_out_of_the_page(browser, kind, tmp_path: Path):
    report = report_of(kind)
    write_report(tmp_path, report)
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    for width in (1400, 1100, 390):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, media="screen")
            assert page.evaluate(OUTSIDE) == []
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate(OUTSIDE) == []
    page_text = page.locator("main").inner_text()
    for claim in report["claims"]:
        assert claim["text"].replace("`", "") in page_text
    if kind == "gpu":
        assert "Its memory on the GPU peaks at 690 MiB with sparse and 12,400 MiB with cross." in page_text
        assert "peak GPU MiB" in page_text
        assert any("peak memory, GPU, MiB" in text for text in page.locator("figure svg").all_text_contents())
    context.close()
