// Small helpers for elements and for the service's answers.

export const by = (id) => document.getElementById(id);

/** An element with properties, `class` and `data` among them, and children. */
export function element(name, properties = {}, ...children) {
  const { class: names = "", data = {}, ...others } = properties;
  const made = document.createElement(name);
  if (names) made.className = names;
  Object.assign(made.dataset, data);
  for (const [key, value] of Object.entries(others)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function button(text, action, properties = {}) {
  const made = element("button", { type: "button", ...properties }, text);
  made.addEventListener("click", action);
  return made;
}

export function setStatus(text, bad = false) {
  by("status").textContent = text;
  by("status").classList.toggle("bad", bad);
}

/** The service's answer to a request; where it refuses an Error with its message, its `status` and its `answer`. */
export async function ask(path, options) {
  const response = await fetch(path, options);
  if (response.status === 401) throw new Error("The service asks for its token: open the link that 'serve' printed.");
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const { detail } = answer;
    const message = Array.isArray(detail) ? detail.map((each) => `${each.loc.at(-1)}: ${each.msg}`).join("; ") : detail;
    throw Object.assign(new Error(message || `the service answered ${response.status}`), { status: response.status, answer });
  }
  return answer;
}

export const plural = (count, name) => `${count.toLocaleString("en")} ${name}${count === 1 ? "" : "s"}`;

/** A name with the characters written out that nobody sees: controls, and those that turn the order of letters around. */
export const visible = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
  (each) => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The name of a file in two parts, of which the first can be cut: "IMG_2023…01.jpg" keeps its end. */
export function fileName(path) {
  const name = visible(path.slice(path.lastIndexOf("/") + 1));
  const ending = name.length > 14 ? Math.max(name.lastIndexOf(".") - 3, name.length - 12) : name.length;
  const cut = ending > 4 && ending < name.length ? ending : name.length;
  return element("span", { class: "name", title: visible(path) },
    element("span", { class: "stem" }, name.slice(0, cut)), element("span", { class: "ending" }, name.slice(cut)));
}

/** A path that breaks after its separators only. */
export function breakable(path) {
  const made = element("span", { class: "path", title: visible(path) });
  for (const part of visible(path).split(/(?<=[/\\_-])/)) made.append(part, document.createElement("wbr"));
  return made;
}

/** A time without its seconds: "2023-05-17T12:30:00" is shown as "2023-05-17 12:30". */
export const shortTime = (time) => String(time).slice(0, 16).replace("T", " ");

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context, as over plain HTTP from another machine, there is no clipboard to write to.
    const area = element("textarea", { value: text });
    (document.querySelector("dialog[open]") || document.body).append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) throw new Error("the browser does not let this page write to the clipboard");
  }
}

export function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
