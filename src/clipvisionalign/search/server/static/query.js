// The query, and how the address holds it: q, minus, where, count, promise, rerank, late, compare; like for an image.

export const DEFAULT_COUNT = 40;

export const emptyQuery = () => ({
  q: [], minus: [], where: "", count: DEFAULT_COUNT, promise: "", rerank: false, late: false, compare: false,
  like: null, index: 0, upload: null,
});

/** The query that an address holds. What it does not understand is left at its default. */
export function readQuery(search) {
  const values = new URLSearchParams(search);
  const number = (name) => /^\d{1,18}$/.test(values.get(name) ?? "") ? Number(values.get(name)) : null;
  const isOn = (name) => values.has(name) && !["0", "false", "no", "off"].includes(values.get(name).toLowerCase());
  const texts = (name) => values.getAll(name).map((text) => text.trim()).filter(Boolean);
  return {
    ...emptyQuery(),
    q: texts("q"), minus: texts("minus"), where: (values.get("where") ?? "").trim(),
    count: Math.min(100, Math.max(1, number("count") ?? DEFAULT_COUNT)),
    promise: /^0?\.\d+$/.test(values.get("promise") ?? "") ? values.get("promise") : "",
    rerank: isOn("rerank") && !isOn("late"), late: isOn("late"), compare: isOn("compare"), like: number("like"), index: number("index") ?? 0,
  };
}

/** The address of a query; the token of the service is never in it. */
export function writeQuery(query) {
  const values = new URLSearchParams();
  for (const text of query.q) values.append("q", text);
  if (query.like !== null) values.set("like", query.like);
  if (query.like !== null && query.index) values.set("index", query.index);
  for (const text of query.minus) values.append("minus", text);
  if (query.where) values.set("where", query.where);
  if (query.count !== DEFAULT_COUNT) values.set("count", query.count);
  if (query.promise) values.set("promise", query.promise);
  if (query.rerank) values.set("rerank", "1");
  if (query.late) values.set("late", "1");
  if (query.compare) values.set("compare", "1");
  const text = values.toString();
  return text ? `?${text}` : "";
}

/** Words without the notation of their weight. */
export const plainWords = (text) => text.replace(/^\^\d+(\.\d+)?\s+/, "").replace(/^\d+(\.\d+)?:(?=[^\d\s])/, "");

export const kindOf = (query) => query.upload ? "upload" : query.like !== null ? "like" : query.q.length ? "words" : "browse";

/** What a query is called: in the title, the status and the list of saved searches. */
export function queryName(query) {
  const words = query.q.join(" + ");
  const subject = { upload: query.upload && `images like ${query.upload.name}`, like: `images like number ${query.like}`, words, browse: "newest images" }[kindOf(query)];
  const without = query.minus.length && query.q.length ? ` without ${query.minus.join(", ")}` : "";
  return `${subject}${without}${query.where ? `, ${query.where}` : ""}`;
}
