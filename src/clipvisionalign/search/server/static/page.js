// The page: what the form, the address and the keys ask for is searched for and shown.
import { ask, button, by, element, plural, setStatus } from "./dom.js";
import { Duplicates } from "./duplicates.js";
import { Facets } from "./facets.js";
import { Judging } from "./judging.js";
import { setUpKeys, singleKeys } from "./keys.js";
import { emptyQuery, kindOf, plainWords, queryName, readQuery, writeQuery } from "./query.js";
import { Column } from "./results.js";
import { setUpSaved } from "./saved.js";
import { Selection } from "./selection.js";
import { TermField } from "./terms.js";
import { Viewer } from "./viewer.js";

//: Images that are passed over at most, as the service allows; and how many are re-ranked.
const MAX_OFFSET = 2000, RERANKED = 32;
const about = { indexes: [] };
const words = new TermField(by("words"), by("chips"), by("add-word"), "term");
const minus = new TermField(by("minus"), by("minus-chips"), by("add-minus"), "unwanted term");
const selection = new Selection(about);
const actions = { open, similar, singleKeys };
const facets = new Facets((where) => run({ ...query, where }));
const viewer = new Viewer(about, actions, selection);
const judging = new Judging(about, selection, (q) => run({ ...emptyQuery(), q }));
//: Files that were searched with, which no address can hold: by the number in the history.
const uploads = [];
let query = emptyQuery(), columns = [], runs = 0;
selection.listeners.push(() => columns.forEach((column) => column.mark()));

function open(column, position, why = false) {
  const terms = kindOf(query) === "words" ? query.q.map(plainWords).join(" and ") : by("why-words").value;
  viewer.open(column, position, terms, why);
}

function similar(column, position) {
  const { id, path } = column.hits[position];
  run({ ...emptyQuery(), where: query.where, count: query.count, like: id, index: column.index, likeName: path });
}

// --- the form and the address -----------------------------------------------------------------------------------------

function writeForm() {
  words.terms = query.q;
  minus.terms = query.minus;
  by("where").value = query.where;
  by("count").value = query.count;
  if (query.promise && ![...by("promise").options].some((each) => each.value === query.promise)) by("promise").append(element("option", { value: query.promise }, `${Math.round(1000 * query.promise) / 10} %`));
  by("promise").value = query.promise;
  by("promise-label").hidden &&= !query.promise;
  by("rerank").checked = query.rerank;
  by("late").checked = query.late;
  by("compare").checked = query.compare;
  by("picture").value = "";
  facets.show(query.where);
  document.querySelector(".chips .example")?.remove();
  if (query.upload || query.like !== null) {
    const image = element("img", { alt: "", src: query.upload ? URL.createObjectURL(query.upload) : `/image/${query.like}?index=${query.index}` });
    const name = query.upload?.name ?? "this image";
    by("chips").append(element("li", { class: "example" }, image, element("span", {}, `like ${name}`), button("×", () => run({ ...query, upload: null, like: null }), { "aria-label": "Remove the image from the query" })));
    by("chips").hidden = false;
  }
  const active = [query.minus.length && "without", query.where && "filter", query.promise && "promise", query.rerank && "re-ranked", query.late && about.indexes.some((each) => each.late) && "word by word", query.compare && "compared"].filter(Boolean);
  by("active-options").textContent = active.length ? `: ${active.join(", ")}` : "";
}

function readForm() {
  return {
    ...emptyQuery(), q: words.terms, minus: minus.terms, where: by("where").value.trim(),
    count: Math.min(100, Math.max(1, Math.round(Number(by("count").value)) || emptyQuery().count)),
    promise: by("promise").value, rerank: by("rerank").checked, late: by("late").checked, compare: by("compare").checked,
  };
}

/** What the form asks for: its words; without any, the image that is searched with already. */
function submit() {
  const asked = readForm();
  if (!asked.q.length) Object.assign(asked, { upload: query.upload, like: query.like, index: query.index, likeName: query.likeName });
  run(asked);
}

function searchWithFile(file) {
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) { setStatus(`${file.name}: not an image`, true); return; }
  run({ ...readForm(), q: [], minus: [], upload: file });
}

// --- searching -----------------------------------------------------------------------------------------------------

function pageLoader(asked, index) {
  const kind = kindOf(asked);
  let cursor = "";
  return async (column) => {
    const offset = column.hits.length, values = new URLSearchParams({ count: asked.count, index });
    if (asked.where) values.set("where", asked.where);
    if (kind === "browse") {
      if (cursor) values.set("cursor", cursor);
      const answer = await ask(`/browse?${values}`);
      cursor = answer.next;
      column.notes ??= answer.notes ?? [];
      Object.assign(column, { total: answer.total });
      return { hits: answer.found, done: !cursor };
    }
    if (offset) values.set("offset", offset);
    let path = "/search", options;
    // What is below the line of a promise: the same order, without re-ranking, which did not reach it.
    const above = !column.below;
    if (kind === "words") {
      for (const text of asked.q) values.append("q", text);
      for (const text of asked.minus) values.append("minus", text);
      // All images in one ranking, in which nothing is re-ranked or promised.
      const whole = asked.late && about.indexes[index].late;
      if (whole) values.set("late", "true");
      if (asked.rerank && about.indexes[index].reranks && above && !whole) values.set("rerank", RERANKED);
      if (asked.promise && above && !whole) values.set("promise", asked.promise);
    } else {
      path = "/similar";
      if (kind === "like") values.set("id", asked.like);
      else {
        options = { method: "POST", body: new FormData() };
        options.body.append("picture", asked.upload);
      }
    }
    const answer = await ask(`${path}?${values}`, options);
    const byVectors = asked.late && kind === "words" && !about.indexes[index].late;
    column.notes ??= [...(answer.notes ?? []), ...(byVectors ? [`index ${index + 1} is not ranked word by word: it has no files for it ('index --late')`] : [])];
    if (answer.nothing && !offset) column.reason = answer.reason || "no image fits better than chance";
    const end = offset + answer.found.length, done = answer.found.length < asked.count || offset + asked.count > MAX_OFFSET;
    if (!answer.promise || !above) return { hits: answer.found, done };
    by("promise-label").hidden = false;
    const { promise } = answer, reached = promise.promised <= end && !(promise.more && !done);
    // Re-ranked hits of a promise that was not asked for stand above and below its line.
    // Where nothing fits better than chance, nothing is promised either.
    const fits = !column.reason || !promise.promised;
    const line = fits && reached && (asked.promise || !asked.rerank || promise.promised >= RERANKED) ? promise : null;
    column.below = reached && Boolean(asked.promise);
    return { hits: answer.found, done: done && !column.below, line };
  };
}

/** Show a query: `history` is "push" for a new entry of the browser's history, "replace" for the one that is there. */
async function run(asked, { history: way = "push", loaded = 0, scroll = 0 } = {}) {
  const mine = ++runs, kind = kindOf(asked), start = performance.now();
  query = asked;
  writeForm();
  const state = { upload: asked.upload ? uploads.push(asked.upload) - 1 : null, likeName: asked.likeName ?? null };
  history[`${way}State`](state, "", `/${writeQuery(asked)}`);
  document.title = kind === "browse" && !asked.where ? "Search images" : `${subject()} – Search images`;
  by("more").hidden = true;
  by("save").hidden = by("judge").hidden = true;
  setStatus(kind === "browse" ? "Loading …" : "Searching …");
  const own = kind === "like" ? [asked.index] : asked.compare ? about.indexes.map((_, index) => index) : [0];
  const which = own.filter((index) => index < about.indexes.length);
  const made = which.map((index) => new Column(index, pageLoader(asked, index), actions, selection));
  try {
    await Promise.all(made.map((column) => column.more()));
    while (made[0] && made[0].hits.length < loaded && !made[0].done) await Promise.all(made.map((column) => column.more()));
    if (mine !== runs) return;
    columns = made;
    draw();
    const notes = [...new Set(made.flatMap((column) => column.notes ?? []))].map((note) => `; ${note}`).join("");
    setStatus(`${summary(made, kind)}${kind === "browse" ? "" : ` · ${Math.round(performance.now() - start)} ms`}${notes}`);
    by("save").hidden = kind === "upload" || !writeQuery(asked);
    judging.offer(asked);
    if (scroll) window.scrollTo(0, scroll);
    else if (way === "push") window.scrollTo(0, 0);
  } catch (error) {
    if (mine !== runs) return;
    columns = [];
    by("results").replaceChildren();
    setStatus(error.message, true);
  }
}

const subject = () => (query.likeName ? queryName(query).replace(`number ${query.like}`, query.likeName) : queryName(query));

function summary(made, kind) {
  const count = made.reduce((sum, column) => sum + column.hits.length, 0);
  if (kind === "browse") return `${plural(made[0]?.total ?? 0, "image")}${query.where ? ` for ${query.where}` : ""}, newest first`;
  if (made.every((column) => column.reason)) return `Nothing for ${subject()}`;
  if (!count) return query.where ? `No image for ${subject()}: none passes the filter` : "The index has no image";
  return `Images for ${kind === "words" ? subject() : subject().replace(/^images /, "those ")}, best first`;
}

function draw() {
  const compared = columns.length > 1, frame = element("div", { class: compared ? "columns two" : "columns" });
  for (const column of columns) {
    const name = `Index ${column.index + 1}, design ${about.indexes[column.index].design}`;
    const section = element("section", { "aria-label": compared ? name : "Result" });
    if (compared) section.append(element("h2", {}, name));
    if (column.reason) section.append(nothing(column));
    section.append(column.list);
    frame.append(section);
  }
  by("results").replaceChildren(frame);
  afterPage();
}

/** What stands above a result of which nothing fits the query. */
function nothing(column) {
  const below = column.hits.length ? "The images below are the nearest of those that do not fit." : "";
  return element("div", { class: "nothing", role: "note" },
    element("strong", {}, `Nothing here fits ${subject()}.`), element("p", {}, `${column.reason[0].toUpperCase()}${column.reason.slice(1)}. ${below}`.replace("..", ".")));
}

function afterPage() {
  if (columns.length === 2) { columns[0].compareWith(columns[1]); columns[1].compareWith(columns[0]); }
  by("more").hidden = columns.every((column) => column.done);
  // A page that does not fill the window never leaves and enters it: it is looked at again.
  watch.unobserve(by("end"));
  if (!by("more").hidden) watch.observe(by("end"));
}

async function more() {
  const mine = runs;
  try {
    await Promise.all(columns.map((column) => column.more()));
    if (mine === runs) afterPage();
  } catch (error) { if (mine === runs) setStatus(error.message, true); }
}

const watch = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting) && !by("more").hidden) more(); }, { rootMargin: "800px" });

// --- what is listened to -----------------------------------------------------------------------------------------------

by("query").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
by("picture").addEventListener("change", () => searchWithFile(by("picture").files[0]));
for (const [name, other] of [["rerank", "late"], ["late", "rerank"]]) by(name).addEventListener("change", () => { if (by(name).checked) by(other).checked = false; });
by("more").addEventListener("click", async () => {
  const [column] = columns, next = column.hits.length;
  await more();
  if (column.hits.length > next) column.focus(next);
});
by("home").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  run(emptyQuery());
});
addEventListener("popstate", (event) => {
  const { upload = null, likeName = null, loaded = 0, scroll = 0 } = event.state ?? {};
  run({ ...readQuery(location.search), upload: upload === null ? null : uploads[upload] ?? null, likeName }, { history: "replace", loaded, scroll });
});
// Where the page was, for when it is come back to.
let settled;
addEventListener("scroll", () => {
  clearTimeout(settled);
  settled = setTimeout(() => history.replaceState({ ...history.state, loaded: columns[0]?.hits.length ?? 0, scroll: Math.round(scrollY) }, ""), 200);
}, { passive: true });
history.scrollRestoration = "manual";

const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => { if (hasFile(event)) { event.preventDefault(); by("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) by("drop").hidden = true; });
addEventListener("drop", (event) => {
  by("drop").hidden = true;
  if (!hasFile(event)) return;
  event.preventDefault();
  searchWithFile(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
  if (file) { event.preventDefault(); searchWithFile(file); }
});
// What was selected to be judged is not lost by one key.
setUpKeys(() => { if (selection.items.size && !judging.active) selection.clear(); }, () => judging.start());
setUpSaved(() => ({ name: subject(), address: query.upload ? "" : writeQuery(query) }), (address) => run(readQuery(address)));

try {
  Object.assign(about, await ask("/health"));
  if (!about.indexes) throw new Error("The service asks for its token: open the link that 'serve' printed.");
  by("compare-label").hidden = about.indexes.length < 2;
  by("rerank-label").hidden = !about.indexes.some((each) => each.reranks);
  by("late-label").hidden = !about.indexes.some((each) => each.late);
  by("columns").textContent = `Filter by ${about.indexes[0].filters.join(", ")}.`;
  const state = history.state ?? {};
  await run(readQuery(location.search), { history: "replace", loaded: state.loaded, scroll: state.scroll });
  await facets.load(about.indexes[0].filters);
  await judging.load();
  new Duplicates(about, singleKeys);
} catch (error) { setStatus(error.message, true); }
