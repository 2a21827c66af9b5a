// What the page's modules share: elements, and questions to the server.

export const at = (id) => document.getElementById(id);

export function make(tag, text, attributes = {}) {
  const element = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** A list of terms, `dl`, from a plain object. */
export function terms(list, facts) {
  list.replaceChildren(...Object.entries(facts).map(([name, value]) => {
    const entry = make("div");
    entry.append(make("dt", name), make("dd", value));
    return entry;
  }));
  return list;
}

/** `fetch` with the API key, where one was given: it is kept for this tab alone. */
export function send(path, options = {}) {
  const key = sessionStorage.getItem("key");
  return fetch(path, key ? { ...options, headers: { ...options.headers, Authorization: `Bearer ${key}` } } : options);
}

/** A field for the key in the page's head; resolves when one was given. */
export function keyGiven() {
  const [label, field] = [make("label", "API key"), make("input", undefined, { type: "password", autocomplete: "off" })];
  label.append(field);
  at("status").after(label);
  return new Promise((given) => field.addEventListener("change", () => {
    sessionStorage.setItem("key", field.value.trim());
    label.remove();
    given();
  }));
}

/** Where a file of the server's is to be had by an element, which sends no key. */
export async function addressOf(path) {
  return sessionStorage.getItem("key") ? URL.createObjectURL(await (await send(path)).blob()) : path;
}

/** The answer's JSON; an error object becomes an Error with its message and status. */
export async function ask(path, options) {
  const response = await send(path, options);
  const body = await response.json();
  if (response.ok) return body;
  throw Object.assign(new Error(body.error?.message ?? body.status ?? response.statusText), { status: response.status });
}
