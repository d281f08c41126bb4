// A field whose text is one term, with a button that makes a chip of it for further terms.
import { button, element } from "./dom.js";

export class TermField {
  constructor(input, list, add, kind) {
    Object.assign(this, { input, list, kind, chips: [] });
    add.addEventListener("click", () => this.commit());
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.shiftKey) { event.preventDefault(); this.commit(); }
      if (event.key === "Backspace" && !input.value && this.chips.length) {
        event.preventDefault();
        input.value = this.chips.pop();
        this.draw();
      }
    });
  }

  get terms() { return [...this.chips, this.input.value.trim()].filter(Boolean); }

  set terms(texts) {
    this.chips = texts.slice(0, -1);
    this.input.value = texts.at(-1) ?? "";
    this.draw();
  }

  commit() {
    if (this.input.value.trim()) this.chips.push(this.input.value.trim());
    this.input.value = "";
    this.draw();
    this.input.focus();
  }

  draw() {
    this.list.replaceChildren(...this.chips.map((text, position) => element("li", {}, element("span", {}, text),
      button("×", () => { this.chips.splice(position, 1); this.draw(); this.input.focus(); }, { "aria-label": `Remove ${this.kind} ${text}` }))));
    this.list.hidden = !this.chips.length;
  }
}
