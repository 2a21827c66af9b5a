// The API as one page, read from /openapi.json, so that it cannot disagree with the server and needs nothing from elsewhere.

const api = await (await fetch("openapi.json")).json();

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

const resolve = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema) ?? {};

/** A schema as words: "integer 1..", "png | jpeg | webp". */
function kind(given) {
  const schema = resolve(given);
  if (schema.anyOf) return schema.anyOf.filter((part) => part.type !== "null").map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if ("const" in schema) return String(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  const low = schema.minimum, high = schema.maximum;
  const range = low === undefined && high === undefined ? "" : ` ${low ?? ""}..${high ?? ""}`;
  return (schema.format === "binary" ? "bytes" : schema.title && schema.properties ? schema.title : schema.type ?? "anything") + range;
}

function table(rows) {
  const lines = rows.map(([name, schema, required, description]) => make("tr", "",
    make("td", "", make("code", name)), make("td", kind(schema)), make("td", required ? "required" : ""),
    make("td", description ?? schema.description ?? "")));
  return make("table", "", ...lines);
}

const fields = (schema) =>
  Object.entries(schema.properties ?? {}).map(([name, field]) => [name, field, schema.required?.includes(name)]);

function article(path, verb, route) {
  const parts = [make("h2", "", make("code", verb.toUpperCase()), ` ${path}`), make("p", route.summary)];
  parts[0].firstChild.className = "verb";
  if (route.description) parts.push(make("p", route.description));
  if (route.parameters?.length) {
    parts.push(make("h3", "Parameters"));
    parts.push(table(route.parameters.map((p) => [p.name, p.schema, p.required, p.schema.description ?? p.description])));
  }
  for (const [type, { schema }] of Object.entries(route.requestBody?.content ?? {})) {
    const body = resolve(schema);
    parts.push(make("h3", `Body: ${type}`));
    parts.push(body.properties ? table(fields(body)) : make("p", kind(body)));
    if (body.example) parts.push(make("pre", JSON.stringify(body.example)));
  }
  parts.push(make("h3", "Answers"));
  parts.push(table(Object.entries(route.responses).map(([code, answer]) =>
    [code, { type: Object.keys(answer.content ?? {}).join(", ") || "JSON" }, false, answer.description])));
  return make("article", "", ...parts);
}

document.getElementById("about").textContent = api.info.summary;
document.getElementById("routes").append(...Object.entries(api.paths).flatMap(([path, verbs]) =>
  Object.entries(verbs).map(([verb, route]) => article(path, verb, route))));
