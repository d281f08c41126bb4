// Judging a query: every image that holds what is meant is selected, whatever words find it, and stored by the service.
import { ask, button, by, copyText, element, plural, setStatus } from "./dom.js";
import { emptyQuery, writeQuery } from "./query.js";

const same = (first, second) => JSON.stringify(first) === JSON.stringify(second);
const nameOf = (terms) => terms.join(" + ");
const queries = (count) => `${count.toLocaleString("en")} ${count === 1 ? "query" : "queries"}`;
const percent = (level) => `${Math.round(1000 * level) / 10} %`;

export class Judging {
  /** `search(terms)` shows the images of a query. */
  constructor(about, selection, search) {
    Object.assign(this, { about, selection, search, state: null, terms: null, replaces: "", searched: new Set(), shown: emptyQuery(), busy: false });
    selection.listeners.push(() => this.draw());
    by("judge").addEventListener("click", () => this.start());
    by("judge-store").addEventListener("click", () => this.store(this.paths));
    by("judge-nothing").addEventListener("click", () => this.store([]));
    by("judge-clear").addEventListener("click", () => { selection.clear(); by("judging-title").focus(); });
    by("judge-stop").addEventListener("click", () => this.stop());
    by("open-judged").addEventListener("click", () => this.open());
    by("copy-command").addEventListener("click", () => this.copy());
  }

  get active() { return this.terms !== null; }

  get paths() { return [...new Set([...this.selection.items.values()].map(({ hit }) => hit.path))]; }

  get possible() { return Boolean(this.about.indexes[0]?.judging); }

  former(terms) { return this.state?.queries.find(({ query }) => same(query, terms)); }

  async load() {
    by("open-judged").hidden = !this.possible;
    // An error is shown where the queries are listed, and when one is stored.
    if (this.possible) this.state = await ask("/judgements").catch(() => null);
    this.offer(this.shown);
  }

  /** Offer to judge the query that is shown: words, and all images; while one is judged, note what else is tried. */
  offer(query) {
    this.shown = query;
    const words = query.q.length && !query.upload && query.like === null;
    if (this.active && words && !same(query.q, this.terms)) this.searched.add(nameOf(query.q));
    by("judge").hidden = !this.possible || this.active || !words || Boolean(query.minus.length || query.where);
    const former = this.former(query.q);
    by("judge").textContent = former ? `Judged: ${former.relevant.length ? plural(former.relevant.length, "image") : "nothing"} – judge again` : "Judge this query";
  }

  /** Begin, or return to what was begun. */
  start() {
    if (!this.active) {
      if (by("judge").hidden) return;
      const former = this.former(this.shown.q);
      Object.assign(this, { terms: this.shown.q, replaces: former?.time ?? "", searched: new Set(), busy: false });
      this.selection.exports = false;
      this.selection.addPaths(0, former?.relevant ?? []);
      by("judging-title").textContent = `Judging “${nameOf(this.terms)}”`;
      by("judging").hidden = false;
      by("judging-note").textContent = former ? "It was judged before: those images are selected." : "";
      this.offer(this.shown);
      this.draw();
    }
    by("judging-title").focus();
  }

  stop() {
    this.terms = null;
    by("judging").hidden = true;
    this.selection.exports = true;
    this.selection.clear();
    this.offer(this.shown);
    by("words").focus();
    by("words").select();
  }

  draw() {
    if (!this.active) return;
    const { size } = this.selection.items;
    by("judging-count").textContent = size ? `${plural(this.paths.length, "image")} selected` : "No image selected";
    by("judge-store").disabled = by("judge-nothing").disabled = this.busy;
    by("judge-store").hidden = by("judge-clear").hidden = !size;
    by("judge-nothing").hidden = size > 0;
  }

  async store(paths) {
    const { terms, replaces } = this;
    this.busy = true;
    this.draw();
    try {
      await this.send({ query: terms, relevant: paths, replaces, searched: [...this.searched].slice(-16) });
      this.stop();
      setStatus(`Judged “${nameOf(terms)}”: ${paths.length ? plural(paths.length, "image") : "nothing holds it"}. ${this.progress()}`);
    } catch (error) {
      this.busy = false;
      by("judging-note").textContent = error.status === 409 ? this.merge(error.answer.current) : error.message;
      this.draw();
      by("judging-title").focus();
    }
  }

  /** Someone else has judged the same query: their images are selected too, and nothing of either is lost. */
  merge(current) {
    this.replaces = current?.time ?? "";
    const before = this.paths.length;
    this.selection.addPaths(0, current?.relevant ?? []);
    return `Someone else has judged it meanwhile, with ${plural(current?.relevant.length ?? 0, "image")}, of which ${this.paths.length - before} are new here; they are selected as well. Check, and store again.`;
  }

  async send(judgement) {
    this.state = await ask("/judgements", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(judgement) });
  }

  /** How many queries are judged, and how many more a promise needs. */
  progress() {
    const { judged, with_images: usable, levels } = this.state;
    const next = levels.find(({ needed }) => usable < needed);
    const missing = next ? `; ${next.needed - usable} more with images for a promise of ${percent(next.level)}` : "";
    return `${queries(judged)} judged${missing}.`;
  }

  // --- the list ---------------------------------------------------------------------------------------------------------

  async open() {
    by("judged-note").textContent = "";
    try {
      this.state = await ask("/judgements");
      this.list();
    } catch (error) { by("judged-note").textContent = error.message; }
    if (!by("judged").open) by("judged").showModal();
  }

  list() {
    const { queries: judged, judged: count, with_images: usable, levels, command, calibrated_on: calibrated } = this.state;
    by("judged-count").textContent = `${queries(count)} judged, ${usable.toLocaleString("en")} of them with images.${calibrated ? ` The index is calibrated on ${calibrated}.` : ""}`;
    by("judged-levels").replaceChildren(...levels.map(({ level, needed }) => {
      const meter = element("meter", { max: needed, value: Math.min(usable, needed), "aria-label": `Queries with images, of those that ${percent(level)} needs` });
      const text = usable < needed ? `${usable} of ${needed} queries with images: ${needed - usable} more` : `can be calibrated, from ${needed} queries with images on`;
      return element("li", {}, element("span", {}, `${percent(level)}`), meter, element("span", {}, text));
    }));
    by("judged-calibrate").hidden = usable < levels[0].needed;
    by("judged-command").textContent = command;
    by("judged-list").replaceChildren(...judged.map((each) => this.row(each)));
    if (!judged.length) by("judged-list").replaceChildren(element("li", {}, "None yet: search, and press “Judge this query”."));
  }

  row({ query, relevant, time }) {
    const link = element("a", { href: `/${writeQuery({ ...emptyQuery(), q: query })}` }, nameOf(query));
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      by("judged").close();
      this.search(query);
    });
    const takeBack = button("Take back", async () => {
      try {
        await this.send({ query, relevant: null, replaces: time });
        const focused = by("judged-list").contains(document.activeElement);
        this.list();
        this.offer(this.shown);
        if (focused) (by("judged-list").querySelector("button") ?? by("judged").querySelector("form button")).focus();
      } catch (error) { by("judged-note").textContent = error.message; }
    }, { "aria-label": `Take back the judgement of ${nameOf(query)}` });
    return element("li", {}, link, element("span", { class: "value" }, relevant.length ? plural(relevant.length, "image") : "nothing"), takeBack);
  }

  async copy() {
    try { await copyText(this.state.command); by("copy-command").textContent = "Copied"; } catch { by("copy-command").textContent = "Not copied"; }
    setTimeout(() => { by("copy-command").textContent = "Copy"; }, 2000);
  }
}
