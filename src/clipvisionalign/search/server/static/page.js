"use strict";
const by = (id) => document.getElementById(id);
const status = (text, bad = false) => { by("status").textContent = text; by("status").classList.toggle("bad", bad); };
let about = { indexes: [] };
let asked = 0;

async function ask(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) {
    const told = Array.isArray(answer.detail) ? answer.detail.map((one) => `${one.loc.at(-1)}: ${one.msg}`).join("; ") : answer.detail;
    throw new Error(told || `the service answered ${response.status}`);
  }
  return answer;
}

function terms(text) { return text.split(",").map((part) => part.trim()).filter(Boolean); }

function parameters(index) {
  const found = new URLSearchParams({ count: by("count").value || "20", index });
  if (by("where").value.trim()) found.set("where", by("where").value);
  return found;
}

async function search() {
  const words = terms(by("words").value), picture = by("picture").files[0];
  if (!words.length && !picture) { status("Enter words, or choose an image.", true); by("words").focus(); return; }
  const which = by("compare").checked ? about.indexes.map((_, i) => i) : [0];
  await show(picture && !words.length ? `images like ${picture.name}` : words.join(" + "), which, (index) => {
    const query = parameters(index);
    if (picture && !words.length) {
      const form = new FormData();
      form.append("picture", picture);
      return ask(`/similar?${query}`, { method: "POST", body: form });
    }
    for (const word of words) query.append("q", word);
    for (const word of terms(by("minus").value)) query.append("minus", word);
    if (by("rerank").checked && about.indexes[index].reranks) query.set("rerank", "32");
    return ask(`/search?${query}`);
  }, words.map((word) => word.replace(/^\^\d+(\.\d+)?\s+/, "").replace(/^\d+(\.\d+)?:(?=[^\d\s])/, "")).join(" and "));
}

async function show(title, which, answer, words = "") {
  const mine = ++asked;
  status("Searching …");
  const start = performance.now();
  try {
    const answers = await Promise.all(which.map(answer));
    if (mine !== asked) return;
    const columns = document.createElement("div");
    columns.className = which.length > 1 ? "columns two" : "columns";
    answers.forEach(({ found }, place) => columns.append(column(found, which[place], words, which.length > 1)));
    by("results").replaceChildren(columns);
    const count = answers.reduce((sum, { found }) => sum + found.length, 0);
    const notes = [...new Set(answers.flatMap((answer) => answer.notes || []))].map((note) => `; ${note}`).join("");
    status(`${count} ${count === 1 ? "image" : "images"} for ${title}, ${Math.round(performance.now() - start)} ms${notes}`);
  } catch (error) { if (mine === asked) { by("results").replaceChildren(); status(error.message, true); } }
}

function column(found, index, words, named) {
  const section = document.createElement("section");
  const title = `Index ${index + 1}, design ${about.indexes[index].design}`;
  section.setAttribute("aria-label", named ? title : "Images found");
  if (named) { const head = document.createElement("h2"); head.textContent = title; section.append(head); }
  const list = document.createElement("ul");
  list.className = "found";
  found.forEach((one) => list.append(card(one, index, words)));
  section.append(list);
  return section;
}

function card(one, index, words) {
  const item = document.createElement("li");
  const open = button("", () => enlarge(one.path, `/image/${one.id}?large=true&index=${index}`, one.path));
  open.className = "open";
  open.setAttribute("aria-label", `Show ${one.path} large`);
  const picture = document.createElement("img");
  picture.src = `/image/${one.id}?index=${index}`;
  picture.alt = "";
  picture.loading = "lazy";
  open.append(picture);
  const line = document.createElement("div");
  line.className = "about";
  const known = Object.entries(one.metadata || {}).filter(([, value]) => value !== null).map(([name, value]) => ` · ${name} ${value}`).join("");
  line.textContent = `${one.score.toFixed(3)}${one.pair_score === undefined ? "" : ` / ${one.pair_score.toFixed(2)}`} · ${one.path}${known}`;
  const acts = document.createElement("div");
  acts.className = "acts";
  const similar = button("Similar", () => show(`images like ${one.path}`, [index], () => ask(`/similar?id=${one.id}&${parameters(index)}`)));
  similar.setAttribute("aria-label", `Images similar to ${one.path}`);
  acts.append(similar);
  if (about.indexes[index].captions) {
    const captions = button("Captions", () => describe(one, index));
    captions.setAttribute("aria-label", `Captions near ${one.path}`);
    acts.append(captions);
  }
  if (words) {
    const why = button("Why", () => enlarge(`Why ${one.path}`, `/explain?${new URLSearchParams({ id: one.id, caption: words, index })}`, `What the model looks at in ${one.path} for: ${words}`));
    why.setAttribute("aria-label", `Why ${one.path} was found`);
    acts.append(why);
  }
  item.append(open, line, acts);
  return item;
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

async function describe(one, index) {
  const told = document.createElement("p");
  told.textContent = "Loading …";
  by("large-title").textContent = `Captions near ${one.path}`;
  by("large-body").replaceChildren(told);
  by("large").showModal();
  try {
    const list = document.createElement("ol");
    const { found } = await ask(`/captions?${new URLSearchParams({ id: one.id, index, count: 10 })}`);
    for (const caption of found) {
      const item = document.createElement("li");
      item.textContent = `${caption.score.toFixed(3)} · ${caption.text}`;
      list.append(item);
    }
    told.replaceWith(list);
  } catch (error) { told.textContent = error.message; }
}

function enlarge(title, source, alt) {
  by("large-title").textContent = title;
  const picture = document.createElement("img");
  picture.alt = alt;
  const told = document.createElement("p");
  told.textContent = "Loading …";
  picture.addEventListener("load", () => told.remove());
  picture.addEventListener("error", () => { told.textContent = "This image cannot be shown: it may have moved."; picture.remove(); });
  picture.src = source;
  by("large-body").replaceChildren(told, picture);
  by("large").showModal();
}

by("query").addEventListener("submit", (event) => { event.preventDefault(); search(); });
by("words").addEventListener("input", () => { by("picture").value = ""; });
by("picture").addEventListener("change", () => { by("words").value = ""; search(); });
fetch("/health").then((response) => response.json()).then((answer) => {
  about = answer;
  by("compare-label").hidden = about.indexes.length < 2;
  by("columns").textContent = `Filter by ${about.indexes[0].filters.join(", ")}.`;
  by("rerank-label").hidden = !about.indexes.some((one) => one.reranks);
  status(about.indexes.map((one) => `${one.pictures.toLocaleString("en")} ${one.pictures === 1 ? "image" : "images"}, design ${one.design}`).join(" · "));
});
