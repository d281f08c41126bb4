// Dates, places and cameras of the index, each with its number of images; a choice becomes a part of the filter.
import { ask, button, by, element, plural } from "./dom.js";

const COLUMNS = ["taken", "place", "camera"];
const MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
const LAST_CLAUSE = /(?:^|\s+and\s+)(taken|place|camera) = ("(?:[^"]|"")*"|\d{4}(?:-\d{2})?)$/;

/** A filter taken apart: { base, clauses }, the latter by column, those at its end that a choice has written. */
export function splitFilter(where) {
  const clauses = {};
  let base = where.trim();
  for (let match; (match = LAST_CLAUSE.exec(base)) && !(match[1] in clauses);) {
    clauses[match[1]] = `${match[1]} = ${match[2]}`;
    base = base.slice(0, match.index);
  }
  return { base, clauses };
}

/** A filter with another choice for the column of a clause; without any where it was chosen already. */
export function toggleClause(where, clause) {
  const { base, clauses } = splitFilter(where), column = clause.slice(0, clause.indexOf(" "));
  // `or` binds less than the `and` that follows.
  const kept = /\sor\s/i.test(base) && !Object.keys(clauses).length ? `(${base})` : base;
  const chosen = { ...clauses, [column]: clauses[column] === clause ? "" : clause };
  return [kept, ...COLUMNS.map((name) => chosen[name])].filter(Boolean).join(" and ");
}

export class Facets {
  constructor(choose) {
    this.choose = choose;
    this.where = "";
    this.buttons = [];
  }

  /** Read the counts, where the index has one of the columns. */
  async load(filters) {
    if (!COLUMNS.some((name) => filters.includes(name))) return;
    const { months, places, cameras, notes = [] } = await ask("/facets");
    const groups = [["Dates", months, () => this.calendar(months)], ["Places", places, () => this.list(places)], ["Cameras", cameras, () => this.list(cameras)]];
    by("facets").replaceChildren(...groups.filter(([, values]) => values?.length).map(([name, , draw]) => element("details", { class: "facet" }, element("summary", {}, name), draw())), ...notes.map((note) => element("p", { class: "hint" }, note)));
    this.show(this.where);
  }

  /** Show which choices a filter has. */
  show(where) {
    this.where = where;
    const chosen = Object.values(splitFilter(where).clauses);
    for (const { made, clause } of this.buttons) made.setAttribute("aria-pressed", chosen.includes(clause));
    for (const group of by("facets").children) group.classList.toggle("chosen", Boolean(group.querySelector("[aria-pressed=true]")));
  }

  choice(text, clause, properties = {}) {
    const made = button(text, () => this.choose(toggleClause(this.where, clause)), { "aria-pressed": "false", ...properties });
    this.buttons.push({ made, clause });
    return made;
  }

  list(values) {
    return element("div", { class: "values" }, ...values.map(({ value, count, where }) => this.choice(`${value} (${count.toLocaleString("en")})`, where)));
  }

  /** A row a year, with a bar a month. */
  calendar(months) {
    const most = Math.max(...months.map(({ count }) => count)), years = new Map();
    for (const { value, count, where } of months) {
      const year = value.slice(0, 4);
      if (!years.has(year)) years.set(year, Array(12).fill(null));
      years.get(year)[Number(value.slice(5)) - 1] = { count, where };
    }
    return element("div", { class: "calendar" }, ...[...years].map(([year, bars]) => {
      const total = bars.reduce((sum, bar) => sum + (bar?.count ?? 0), 0);
      return element("div", { class: "year" }, this.choice(`${year} (${total.toLocaleString("en")})`, `taken = ${year}`),
        element("div", { class: "bars" }, ...bars.map((bar, at) => {
          if (!bar) return element("span", { class: "bar-place" });
          const label = `${MONTHS[at]} ${year}: ${plural(bar.count, "image")}`;
          const made = this.choice("", bar.where, { class: "month", title: label, "aria-label": label });
          const fill = element("span", { class: "fill" });
          fill.style.height = `${Math.max(12, Math.round((100 * bar.count) / most))}%`;
          made.append(fill);
          return made;
        })));
    }));
  }
}
