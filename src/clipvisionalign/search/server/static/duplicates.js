// Duplicates of an index: groups side by side, the image to keep marked, and what is decided on them. Nothing is deleted.
import { ask, breakable, button, copyText, element, plural, shortTime } from "./dom.js";

//: Images of a group that are shown at first, groups of one answer, and milliseconds until it is asked again whether they
//: are made: at first, and later.
const MEMBERS = 12, GROUPS = 20, FIRST_RETRY = 250, RETRY = 1500;
const KINDS = [
  ["bytes", "Same bytes", "Equal files: one of each group is enough."],
  ["nearly", "Nearly the same", "The same photograph: recompressed, resized or cropped a little."],
  ["scene", "One scene", "Different images of one scene or subject, by their vectors alone."],
  ["decided", "Decided", "What was decided on images, the last first."],
];
const POST = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
const kilobytes = (size) => (size < 1e6 ? `${Math.max(1, Math.round(size / 1000)).toLocaleString("en")} kB` : `${(size / 1e6).toFixed(1)} MB`);

export class Duplicates {
  /** `about` holds the indexes of the service; `singleKeys()` whether keys of a single character work. */
  constructor(about, singleKeys) {
    Object.assign(this, { about, singleKeys, kind: "nearly", asked: 0, shown: 0, report: "" });
    document.head.append(element("link", { rel: "stylesheet", href: "/page/duplicates.css" }));
    this.kinds = element("div", { class: "kinds", role: "group", "aria-label": "Kind" }, ...KINDS.map(([kind, name]) => button(name, () => this.show(kind), { data: { kind } })));
    this.index = element("select", { "aria-label": "Index" });
    this.index.addEventListener("change", () => this.show(this.kind));
    this.note = element("p", { id: "duplicates-note", role: "status", "aria-live": "polite" });
    this.progress = element("progress", { "aria-label": "Images compared", hidden: true });
    this.again = button("Load the groups again", () => this.show(this.kind), { hidden: true });
    this.unverified = element("details", { hidden: true });
    this.copy = button("Copy paths", () => this.copyPaths());
    this.save = element("a", { download: "not-kept.txt" }, "Save paths");
    this.others = element("span");
    this.exports = element("div", { class: "exports", hidden: true }, this.others, this.copy, this.save);
    this.list = element("ol", { class: "groups", "aria-label": "Groups" });
    this.more = button("More groups", () => this.load(true), { hidden: true });
    this.dialog = element("dialog", { id: "duplicates", "aria-labelledby": "duplicates-title" },
      element("div", { class: "viewer-bar" }, element("h2", { id: "duplicates-title" }, "Duplicates"), this.index, element("form", { method: "dialog" }, element("button", {}, "Close"))),
      this.kinds, element("div", { class: "line" }, this.note, this.again), this.progress, this.exports, this.unverified, this.list, this.more,
      element("p", { class: "hint" }, "Nothing is deleted. ", element("kbd", {}, "↑"), " ", element("kbd", {}, "↓"), " from group to group, ", element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " from image to image, ", element("kbd", {}, "k"), " keep this image, ", element("kbd", {}, "n"), " not duplicates, ", element("kbd", {}, "Escape"), " close."));
    this.dialog.addEventListener("keydown", (event) => this.onKey(event));
    this.dialog.addEventListener("close", () => { this.asked++; });
    document.body.append(this.dialog);
    document.querySelector(".tools").prepend(button("Duplicates", () => this.open(), { id: "open-duplicates" }));
  }

  open() {
    this.index.replaceChildren(...this.about.indexes.map((_, index) => element("option", { value: index }, `Index ${index + 1}`)));
    this.index.hidden = this.about.indexes.length < 2;
    this.dialog.showModal();
    this.show(this.kind);
  }

  get indexed() { return this.index.value || 0; }

  show(kind) {
    Object.assign(this, { kind, shown: 0, report: "" });
    for (const each of this.kinds.children) each.setAttribute("aria-pressed", each.dataset.kind === kind);
    this.list.replaceChildren();
    this.exports.hidden = this.unverified.hidden = this.again.hidden = true;
    return kind === "decided" ? this.loadDecisions() : this.load();
  }

  /** What is asked for, unless something else is asked for meanwhile; an error is shown. */
  async answer(path, first) {
    const mine = ++this.asked;
    this.more.hidden = this.progress.hidden = true;
    if (first) this.note.textContent = "Loading …";
    try {
      const answer = await ask(path);
      return mine === this.asked ? answer : null;
    } catch (error) {
      if (mine === this.asked) this.fail(error);
      return null;
    }
  }

  fail(error) {
    this.note.textContent = error.message;
    // Others have decided meanwhile, or the index has changed.
    this.again.hidden = ![409, 410].includes(error.status);
  }

  async load(focus = false, wait = FIRST_RETRY) {
    const values = new URLSearchParams({ kind: this.kind, count: GROUPS, offset: this.shown, report: this.report, index: this.indexed });
    const answer = await this.answer(`/duplicates?${values}`, !this.shown && wait === FIRST_RETRY);
    if (!answer) return;
    if (answer.state === "computing") {
      this.drawProgress(answer);
      const mine = this.asked;
      setTimeout(() => { if (mine === this.asked && this.dialog.open) this.load(focus, RETRY); }, wait);
      return;
    }
    const before = this.shown;
    this.report = answer.report;
    this.shown += answer.groups.length;
    this.list.append(...answer.groups.map((group) => this.group(group, answer.decides)));
    this.more.hidden = this.shown >= answer.total;
    this.drawAnswer(answer);
    if (focus) this.list.children[before]?.focus();
  }

  drawProgress({ step, done, of, seconds }) {
    this.progress.hidden = false;
    if (of) Object.assign(this.progress, { max: of, value: done });
    else this.progress.removeAttribute("value");
    const count = of ? ` ${done.toLocaleString("en")} of ${of.toLocaleString("en")}` : "";
    this.note.textContent = `${step ? `${step[0].toUpperCase()}${step.slice(1)}${count}` : "Reading the index"}, for ${Math.round(seconds)} s so far …`;
  }

  drawAnswer(answer) {
    for (const [kind, name] of KINDS) {
      const count = answer.counts[kind], tab = this.kinds.querySelector(`[data-kind=${kind}]`);
      tab.textContent = count === undefined ? name : `${name} (${count.toLocaleString("en")})`;
    }
    const [, , meaning] = KINDS.find(([kind]) => kind === this.kind), none = !answer.counts.bytes && !answer.counts.nearly;
    this.note.textContent = answer.total ? `${plural(answer.total, "group")}. ${meaning}` : none && this.kind !== "scene" ? `No duplicates among ${plural(answer.images, "image")}.` : "No group of this kind.";
    this.exports.hidden = !answer.not_kept || this.kind === "scene";
    this.others.textContent = `${plural(answer.not_kept, "image")} of ${kilobytes(answer.not_kept_bytes)} need not be kept.`;
    this.save.href = `/duplicates/paths?${new URLSearchParams({ report: this.report, index: this.indexed })}`;
    const count = answer.not_verified_images;
    this.unverified.hidden = !count;
    if (!count) return;
    const named = answer.not_verified.map(({ path, reason }) => element("li", {}, breakable(path), `: ${reason}`));
    if (count > named.length) named.push(element("li", {}, `and ${(count - named.length).toLocaleString("en")} more`));
    this.unverified.replaceChildren(element("summary", {}, `${plural(count, "image")} could not be compared`), element("ul", {}, ...named));
  }

  // --- a group -----------------------------------------------------------------------------------------------------------

  group(group, decides) {
    const made = element("li", { class: "group", tabIndex: -1 });
    made.group = group;
    made.decides = decides;
    this.drawGroup(made);
    if (!this.list.querySelector(".group[tabindex='0']")) made.tabIndex = 0;
    return made;
  }

  drawGroup(made) {
    const { group, decides } = made, images = group.all ? group.images : group.images.slice(0, MEMBERS), rest = group.members - images.length;
    made.setAttribute("aria-label", `${plural(group.members, "image")}, keep ${group.images.find((image) => image.keep)?.path ?? "the best"}`);
    const acts = element("div", { class: "acts" });
    if (decides && group.kind !== "bytes") {
      if (group.added?.length) acts.append(button("Undo", () => this.undo(made), { class: "decide" }));
      // Of what someone else has decided nothing is taken back here.
      else if (!group.added) acts.append(button("Not duplicates", () => this.decide(made), { class: "decide" }));
    }
    if (group.said) acts.append(element("span", { class: "said" }, group.said));
    made.classList.toggle("decided", Boolean(group.added));
    made.replaceChildren(element("ul", { class: "members" }, ...images.map((image) => this.image(made, image))), acts);
    if (rest <= 0) return;
    const text = `and ${plural(rest, "other image")}`;
    acts.prepend(group.all ? element("span", {}, text) : button(text, () => { group.all = true; this.drawGroup(made); made.querySelectorAll(".large")[MEMBERS].focus(); }));
  }

  image(made, image) {
    const { group, decides } = made, facts = [`${image.width} × ${image.height}`, kilobytes(image.size)];
    if (image.taken) facts.push(shortTime(image.taken));
    if (!image.keep && group.kind !== "bytes") facts.push(`cosine ${image.cosine.toFixed(3)}`);
    const preview = element("img", { src: `/image/${image.id}?index=${this.indexed}`, alt: `Show ${image.path}`, loading: "lazy", decoding: "async" });
    const large = element("a", { class: "large", href: `/image/${image.id}?large=true&index=${this.indexed}`, target: "_blank", rel: "noopener" }, preview);
    const mark = element("span", { class: "mark" }, image.keep ? `Keep: ${image.chosen ? "chosen by hand" : group.reason}` : "");
    const shown = element("li", { class: image.keep ? "member kept" : "member" }, large, mark, breakable(image.path), element("span", { class: "facts" }, facts.join(" · ")));
    if (decides && !group.added) {
      const name = image.chosen ? "Take back" : "Keep this one";
      shown.append(button(name, () => this.keep(made, image.chosen ? null : image), { class: "keep", "aria-label": `${name}: ${image.path}` }));
    }
    return shown;
  }

  /** Store something of a group, and draw what has become of it, unless another view is open by then. `selector` names
   * what has the focus afterwards, where it was in the group and on nothing else meanwhile. A group stores one thing at a
   * time. */
  async store(made, path, body, done, selector, at = 0) {
    if (made.storing) return;
    made.storing = true;
    const pressed = document.activeElement;
    try {
      const answer = await ask(`${path}?index=${this.indexed}`, POST(body));
      if (!made.isConnected) return;
      const focused = made.contains(document.activeElement);
      const target = focused && document.activeElement !== pressed ? this.control(made, document.activeElement) : { selector, at };
      done(answer);
      this.drawGroup(made);
      if (focused) (made.querySelectorAll(target.selector)[target.at] ?? made).focus();
    } catch (error) {
      if (made.isConnected) this.fail(error);
      else this.note.textContent = `What was decided before is not stored: ${error.message}`;
    } finally { made.storing = false; }
  }

  /** How a control of a group is found again once the group is drawn again. */
  control(made, focused) {
    const selector = [".large", ".keep", ".decide"].find((each) => focused.matches(each)) ?? ".group";
    return { selector, at: [...made.querySelectorAll(selector)].indexOf(focused) };
  }

  /** Remember that images are no duplicates of each other. */
  async decide(made) {
    const { group } = made;
    await this.store(made, "/duplicates/decisions", { report: this.report, group: group.number }, ({ added }) => {
      // What others have decided is not taken back with it.
      Object.assign(group, { added, said: added.length ? "Remembered: these are no duplicates." : "Someone else has decided this already." });
      this.note.textContent = group.said;
    }, ".decide");
  }

  async undo(made) {
    const { group } = made, undone = () => { Object.assign(group, { added: null, said: "" }); this.note.textContent = "Taken back."; };
    await this.store(made, "/duplicates/forgotten", { pairs: group.added }, undone, ".decide");
  }

  /** Choose the image to keep; null takes the choice back. */
  async keep(made, image) {
    const { group } = made, at = group.images.indexOf(image ?? group.images.find((each) => each.chosen));
    const replaces = group.images.filter((each) => each.chosen).map((each) => each.id);
    group.best ??= group.images.some((each) => each.chosen) ? null : group.images.find((each) => each.keep).id;
    await this.store(made, "/duplicates/keepers", { report: this.report, group: group.number, image: image?.id ?? null, replaces }, () => {
      for (const each of group.images) Object.assign(each, { chosen: each === image, keep: image ? each === image : each.id === group.best });
      group.said = image ? "Remembered: this image is kept." : group.best === null ? "Taken back: load the groups again for the best." : "Taken back.";
      this.note.textContent = group.said;
    }, ".keep", at);
  }

  async copyPaths() {
    try {
      const response = await fetch(this.save.href);
      if (!response.ok) throw new Error((await response.json()).detail);
      const text = (await response.text()).trimEnd();
      await copyText(text);
      this.note.textContent = `${plural(text.split("\n").length, "path")} copied.`;
    } catch (error) { this.note.textContent = error.message; }
  }

  // --- what was decided --------------------------------------------------------------------------------------------------

  async loadDecisions() {
    const values = new URLSearchParams({ count: GROUPS, offset: this.shown, index: this.indexed });
    const answer = await this.answer(`/duplicates/decisions?${values}`, !this.shown);
    if (!answer) return;
    this.shown += answer.decisions.length;
    this.note.textContent = answer.total ? `${plural(answer.total, "decision")}, the last first.` : "Nothing is decided yet.";
    this.list.append(...answer.decisions.map((each) => this.decision(each, answer.decides)));
    if (this.shown < answer.total) this.list.append(element("li", { class: "further" }, button("More decisions", (event) => { event.target.parentNode.remove(); this.loadDecisions(); })));
  }

  decision({ kind, images, decided }, decides) {
    const made = element("li", { class: "group" });
    const shown = images.map(({ id, path }) => element("li", { class: "member" },
      id === null ? element("span", { class: "gone" }, "not in the index") : element("img", { src: `/image/${id}?index=${this.indexed}`, alt: "", loading: "lazy" }), breakable(path)));
    const acts = element("div", { class: "acts" }, element("span", { class: "said" }, `${kind === "keep" ? "Kept" : "No duplicates"}, ${shortTime(decided)}`));
    const names = images.map(({ path }) => path).join(" and ");
    if (decides) {
      acts.append(button("Take back", async () => {
        const body = kind === "keep" ? { kept: [[images[0].hash, images[0].path]] } : { pairs: [images.map(({ hash }) => hash)] };
        try {
          await ask(`/duplicates/forgotten?index=${this.indexed}`, POST(body));
          // Another view is open by now.
          if (!made.isConnected) return;
          const next = made.nextElementSibling ?? made.previousElementSibling, focused = made.contains(document.activeElement);
          made.remove();
          this.shown--;
          this.note.textContent = "Taken back.";
          if (focused) (next?.querySelector("button") ?? this.kinds.lastChild).focus();
        } catch (error) {
          if (made.isConnected) this.fail(error);
          else this.note.textContent = `What was decided before is not taken back: ${error.message}`;
        }
      }, { "aria-label": `Take back the decision on ${names}` }));
    }
    made.append(element("ul", { class: "members" }, ...shown), acts);
    return made;
  }

  // --- keys ----------------------------------------------------------------------------------------------------------------

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, summary")) return;
    const groups = [...this.list.querySelectorAll(".group")], here = event.target.closest?.(".group"), at = groups.indexOf(here);
    const vertical = { ArrowDown: at + 1, ArrowUp: Math.max(0, at - 1), Home: 0, End: groups.length - 1 }[event.key];
    if (vertical !== undefined && groups.length) {
      event.preventDefault();
      if (vertical >= groups.length) { (this.more.hidden ? groups.at(-1) : this.more).focus(); return; }
      for (const each of groups) each.tabIndex = -1;
      groups[vertical].tabIndex = 0;
      groups[vertical].focus();
      groups[vertical].scrollIntoView({ block: "nearest" });
      return;
    }
    if (at < 0) return;
    const images = [...here.querySelectorAll(".large")], member = event.target.closest(".member"), image = images.indexOf(member?.querySelector(".large"));
    const horizontal = { ArrowRight: image + 1, ArrowLeft: image - 1 }[event.key];
    if (horizontal !== undefined && images.length) {
      event.preventDefault();
      images[Math.min(images.length - 1, Math.max(0, horizontal))].focus();
    } else if (this.singleKeys() && event.key === "n") here.querySelector(".decide")?.click();
    else if (this.singleKeys() && event.key === "k") member?.querySelector(".keep")?.click();
  }
}
