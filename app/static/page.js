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

/** The answer's JSON; an error object becomes an Error with its message and status. */
export async function ask(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (response.ok) return body;
  throw Object.assign(new Error(body.error?.message ?? body.status ?? response.statusText), { status: response.status });
}
