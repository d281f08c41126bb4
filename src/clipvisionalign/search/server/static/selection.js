// Selected hits: by click, space and ranges; copied or exported as paths, CSV or JSON.
import { by, copyText, download, plural, setStatus } from "./dom.js";

const folderOf = (about, index) => (about.indexes[index]?.folder ?? "").replace(/\/+$/, "");

/** The whole path of a hit, where the index names its folder. */
export const wholePath = (about, { index, hit }) => (folderOf(about, index) ? `${folderOf(about, index)}/${hit.path}` : hit.path);

/** A cell of CSV by RFC 4180; one that a spreadsheet would take for a formula is led by an apostrophe. */
export function csvCell(value) {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value !== "number" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export class Selection {
  constructor(about) {
    this.about = about;
    this.items = new Map();
    this.anchor = null;
    //: Whether the buttons to copy and export are shown.
    this.exports = true;
    this.listeners = [];
    by("copy-paths").addEventListener("click", () => this.copy());
    by("export-paths").addEventListener("click", () => download("images.txt", "text/plain", `${this.paths().join("\n")}\n`));
    by("export-csv").addEventListener("click", () => download("images.csv", "text/csv", this.csv()));
    by("export-json").addEventListener("click", () => download("images.json", "application/json", `${JSON.stringify(this.rows(), null, 2)}\n`));
    by("clear-selected").addEventListener("click", () => this.clear());
  }

  key(column, position) { return `${column.index}:${column.hits[position].path}`; }

  has(column, position) { return this.items.has(this.key(column, position)); }

  set(column, position, selected) {
    const key = this.key(column, position);
    if (selected) this.items.set(key, { index: column.index, hit: column.hits[position] });
    else this.items.delete(key);
  }

  /** Select images of an index, shown or not. */
  addPaths(index, paths) {
    for (const path of paths) if (!this.items.has(`${index}:${path}`)) this.items.set(`${index}:${path}`, { index, hit: { path } });
    this.changed();
  }

  toggle(column, position) {
    this.set(column, position, !this.has(column, position));
    this.anchor = { column, position };
    this.changed();
  }

  /** Select all from the last that was toggled to this one. */
  extend(column, position) {
    const start = this.anchor?.column === column ? this.anchor.position : position;
    for (let each = Math.min(start, position); each <= Math.max(start, position); each++) this.set(column, each, true);
    this.anchor = { column, position: start };
    this.changed();
  }

  clear() {
    this.items.clear();
    this.anchor = null;
    this.changed();
  }

  changed() {
    by("selected").hidden = !this.exports || !this.items.size;
    by("selected-count").textContent = this.items.size ? `${plural(this.items.size, "image")} selected` : "";
    for (const listener of this.listeners) listener();
  }

  paths() { return [...new Set([...this.items.values()].map((item) => wholePath(this.about, item)))]; }

  rows() { return [...this.items.values()].map(({ index, hit }) => ({ index: index + 1, file: wholePath(this.about, { index, hit }), ...hit })); }

  csv() {
    const rows = this.rows().map(({ metadata, ...row }) => ({ ...row, ...Object.fromEntries(Object.entries(metadata || {}).map(([name, value]) => [name in row ? `metadata_${name}` : name, value])) }));
    const columns = [...new Set(rows.flatMap(Object.keys))];
    return [columns, ...rows.map((row) => columns.map((name) => row[name]))].map((cells) => cells.map(csvCell).join(",")).join("\r\n") + "\r\n";
  }

  async copy() {
    const paths = this.paths();
    try {
      await copyText(paths.join("\n"));
      by("selected-count").textContent = `${plural(paths.length, "path")} copied`;
    } catch (error) { setStatus(error.message, true); }
  }
}
