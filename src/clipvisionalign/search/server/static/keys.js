// Keys of the whole page, and their list.
import { by, element } from "./dom.js";

const KEYS = [
  ["/", "to the search field"], ["Enter", "in the field: search; on an image: show it large"],
  ["Shift Enter", "in the field: add what is written as a term, for another beside it"],
  ["← → ↑ ↓", "from image to image; Home and End: the first and the last"], ["Space", "select an image"],
  ["Shift Space, Shift ← →", "select all from the last one"], ["s", "on an image: images similar to it"],
  ["w", "on an image: why it matches the words"], ["j", "judge this query; then: to the buttons of the judgement"], ["← →", "in the large view: the image before and after"],
  ["Escape", "close; then clear the selection"], ["?", "this list"],
];
const STORED = "clipvisionalign-single-keys";

export const singleKeys = () => by("single-keys").checked;

export function setUpKeys(escape, judge) {
  by("keys").replaceChildren(...KEYS.map(([keys, meaning]) => element("tr", {}, element("th", { scope: "row" }, ...keys.split(", ").flatMap((each) => [element("kbd", {}, each), " "])), element("td", {}, meaning))));
  try { by("single-keys").checked = localStorage.getItem(STORED) !== "off"; } catch { /* nothing is stored here */ }
  by("single-keys").addEventListener("change", () => { try { localStorage.setItem(STORED, singleKeys() ? "on" : "off"); } catch { /* nor now */ } });
  by("open-help").addEventListener("click", () => by("help").showModal());
  document.addEventListener("keydown", (event) => {
    const writing = event.target.matches?.("input:not([type=checkbox], [type=range]), textarea, select");
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && writing) {
      // The words stay, and the keys are the page's again.
      event.preventDefault();
      event.target.blur();
      return;
    }
    if (event.key === "Escape") escape();
    if (writing || !singleKeys()) return;
    if (event.key === "/") { event.preventDefault(); by("words").focus(); by("words").select(); }
    if (event.key === "j") { event.preventDefault(); judge(); }
    if (event.key === "?") { event.preventDefault(); by("help").showModal(); }
  });
}
