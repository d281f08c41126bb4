// Saved searches, in this browser's storage: a name and an address each.
import { button, by, element } from "./dom.js";

const KEY = "clipvisionalign-saved-searches";

export function readSaved() {
  try {
    const saved = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(saved) ? saved.filter((each) => typeof each?.name === "string" && typeof each?.address === "string") : [];
  } catch { return []; }
}

function writeSaved(saved) {
  try { localStorage.setItem(KEY, JSON.stringify(saved)); return true; } catch { return false; }
}

/** `current()` gives the name and address of the search that is shown; `go(address)` shows another. */
export function setUpSaved(current, go) {
  const draw = () => {
    const saved = readSaved();
    by("saved-list").replaceChildren(...saved.map(({ name, address }, position) => {
      const link = element("a", { href: `/${address}` }, name);
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        by("saved").close();
        go(address);
      });
      const row = element("li", {}, link);
      row.append(
        button("Rename", () => rename(row, position), { "aria-label": `Rename ${name}` }),
        button("Delete", () => { writeSaved(readSaved().filter((_, each) => each !== position)); draw(); by("saved").querySelector("button").focus(); }, { "aria-label": `Delete ${name}` }));
      return row;
    }));
    if (!saved.length) by("saved-list").replaceChildren(element("li", {}, "None yet."));
  };
  const rename = (row, position) => {
    const saved = readSaved(), input = element("input", { value: saved[position].name, maxLength: 100, required: true, "aria-label": "New name" });
    const form = element("form", { class: "bar" }, input, element("button", {}, "Rename"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!input.value.trim()) return;
      saved[position].name = input.value.trim();
      writeSaved(saved);
      draw();
      by("saved-list").children[position]?.querySelector("a")?.focus();
    });
    input.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); draw(); } });
    row.replaceChildren(form);
    input.focus();
    input.select();
  };
  const open = () => {
    const { name, address } = current();
    by("save-form").hidden = !address;
    by("save-name").value = name;
    draw();
    by("saved").showModal();
  };
  by("open-saved").addEventListener("click", open);
  by("save").addEventListener("click", () => { open(); by("save-name").focus(); by("save-name").select(); });
  by("save-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { address } = current(), name = by("save-name").value.trim();
    if (!name) return;
    const kept = writeSaved([{ name, address }, ...readSaved().filter((each) => each.name !== name)]);
    draw();
    if (kept) by("saved-list").querySelector("a")?.focus();
    else by("saved-list").replaceChildren(element("li", {}, "This browser stores nothing for this page."));
  });
}
