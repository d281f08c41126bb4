// Columns of results: cards that are loaded page by page, with arrow keys between them.
import { button, element, fileName, shortTime, visible } from "./dom.js";

//: Narrower and wider images are cut, so that no row is made of one.
const MIN_RATIO = 0.6, MAX_RATIO = 2.2;

export class Column {
  /** `load(column)` resolves to the next page: { hits, done, line }, the latter a promise whose line is reached. */
  constructor(index, load, actions, selection) {
    Object.assign(this, { index, load, actions, selection, hits: [], cards: [], done: false, loading: null, current: 0 });
    this.list = element("ul", { class: "found" });
    this.list.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Load the next page; concurrent calls share one. */
  more() {
    if (this.done) return Promise.resolve();
    this.loading ??= this.load(this).then((page) => this.append(page)).finally(() => { this.loading = null; });
    return this.loading;
  }

  append({ hits, done, line }) {
    this.done = done;
    if (line && !this.line && line.promised <= this.hits.length) this.drawLine(line);
    const known = new Set(this.hits.map((hit) => hit.id));
    for (const hit of hits) {
      if (known.has(hit.id)) continue;
      this.hits.push(hit);
      const card = this.card(hit, this.hits.length - 1);
      this.cards.push(card);
      this.list.append(card);
      card.classList.toggle("below", Boolean(this.line));
      if (line && !this.line && line.promised === this.hits.length) this.drawLine(line);
    }
    this.mark();
  }

  /** The line of a promise: what is meant is above it with the probability that was asked for. */
  drawLine(promise) {
    const images = promise.promised === 1 ? "this image" : `these ${promise.promised.toLocaleString("en")} images`;
    const text = promise.promised ? `With ${Math.round(1000 * promise.level) / 10} % probability what is meant is among ${images}` : `No image fits as well as what is meant does with ${Math.round(1000 * promise.level) / 10} % probability`;
    this.line = element("li", { class: "promise-line" }, element("strong", {}, text), ` – in collections like the one that this was calibrated on: ${promise.calibrated_on}`);
    // The row that it ends is not stretched.
    if (promise.promised) this.list.append(element("li", { class: "filler", "aria-hidden": "true" }));
    this.list.append(this.line);
  }

  card(hit, position) {
    const name = visible(hit.path.slice(hit.path.lastIndexOf("/") + 1));
    const score = hit.score === undefined ? "" : `, score ${hit.score.toFixed(3)}`;
    const image = element("img", { src: `/image/${hit.id}?index=${this.index}`, alt: "", loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => { image.alt = "no thumbnail"; });
    const open = button("", (event) => {
      if (event.shiftKey) this.selection.extend(this, position);
      else if (event.ctrlKey || event.metaKey) this.selection.toggle(this, position);
      else this.actions.open(this, position);
    }, { class: "open", tabIndex: position === this.current ? 0 : -1, title: visible(hit.path), "aria-label": `Show ${name}${score}` });
    open.append(image);
    open.addEventListener("focus", () => this.setCurrent(position));
    // Pointers have these on the card; the keyboard has them as keys of the card, and all have them in the viewer.
    const pick = element("input", { type: "checkbox", class: "pick", tabIndex: -1, "aria-label": `Select ${name}` });
    pick.addEventListener("click", (event) => {
      if (event.shiftKey) this.selection.extend(this, position);
      else this.selection.toggle(this, position);
      this.mark();
    });
    const acts = element("div", { class: "on-card" },
      button("Similar", () => this.actions.similar(this, position), { tabIndex: -1, "aria-label": `Images similar to ${name}` }),
      button("Why", () => this.actions.open(this, position, true), { tabIndex: -1, "aria-label": `Why ${name}` }));
    const about = element("div", { class: "about" }, fileName(hit.path));
    const value = hit.score === undefined ? (hit.time ? shortTime(hit.time).slice(0, 10) : "") : hit.pair_score === undefined ? hit.score.toFixed(3) : `${hit.score.toFixed(3)} / ${hit.pair_score.toFixed(2)}`;
    if (value) about.append(element("span", { class: "value", title: hit.score === undefined ? "date" : hit.pair_score === undefined ? "cosine with the query" : "cosine / pair score" }, value));
    const card = element("li", { class: "card" }, open, pick, acts, about);
    const ratio = Math.min(MAX_RATIO, Math.max(MIN_RATIO, hit.width / hit.height || 1));
    card.style.setProperty("--ratio", ratio.toFixed(3));
    return card;
  }

  /** Show which cards are selected. */
  mark() {
    this.cards.forEach((card, position) => {
      const selected = this.selection.has(this, position);
      card.classList.toggle("chosen", selected);
      card.querySelector(".pick").checked = selected;
    });
  }

  /** Where each card's image is in the other column. */
  compareWith(other) {
    const ranks = new Map(other.hits.map((hit, position) => [hit.path, position + 1]));
    this.cards.forEach((card, position) => {
      const rank = ranks.get(this.hits[position].path);
      const badge = card.querySelector(".rank") ?? card.querySelector(".about").appendChild(element("span", { class: "rank" }));
      badge.textContent = rank === undefined ? "here only" : rank === position + 1 ? "same rank" : `there ${rank}.`;
      card.classList.toggle("alone", rank === undefined);
    });
  }

  setCurrent(position) {
    this.cards[this.current]?.querySelector(".open").setAttribute("tabindex", "-1");
    this.current = position;
    this.cards[position]?.querySelector(".open").setAttribute("tabindex", "0");
  }

  focus(position = this.current) {
    this.setCurrent(position);
    this.cards[position]?.querySelector(".open").focus();
  }

  async onKey(event) {
    if (!event.target.classList.contains("open") || event.ctrlKey || event.metaKey || event.altKey) return;
    const position = this.current, moves = {
      ArrowRight: () => position + 1, ArrowLeft: () => position - 1, ArrowDown: () => this.vertical(1),
      ArrowUp: () => this.vertical(-1), Home: () => 0, End: () => this.cards.length - 1,
    };
    const single = this.actions.singleKeys();
    if (moves[event.key]) {
      event.preventDefault();
      let target = moves[event.key]();
      if (target >= this.cards.length) { await this.more().catch(() => {}); target = Math.min(target, this.cards.length - 1); }
      if (target < 0) return;
      if (event.shiftKey) { this.selection.anchor ??= { column: this, position }; this.selection.extend(this, target); }
      this.focus(target);
    } else if (event.key === " ") {
      event.preventDefault();
      if (event.shiftKey) this.selection.extend(this, position);
      else this.selection.toggle(this, position);
    } else if (single && event.key === "s") this.actions.similar(this, position);
    else if (single && event.key === "w") this.actions.open(this, position, true);
  }

  /** The card above or below, nearest by its middle; this one's position where there is none. */
  vertical(direction) {
    const boxes = this.cards.map((card) => card.getBoundingClientRect()), own = boxes[this.current];
    const rows = boxes.map((box) => Math.round(box.top)).filter((top) => direction * (top - own.top) > 2);
    if (!rows.length) return direction > 0 ? this.cards.length : this.current;
    const top = direction > 0 ? Math.min(...rows) : Math.max(...rows), middle = own.left + own.width / 2;
    let best = this.current, distance = Infinity;
    boxes.forEach((box, position) => {
      const away = Math.abs(box.left + box.width / 2 - middle);
      if (Math.abs(box.top - top) < 2 && away < distance) { best = position; distance = away; }
    });
    return best;
  }
}
