// The page: lists the models, asks for pictures, shows them and how long each stage took. No build step, nothing from elsewhere.

const at = (id) => document.getElementById(id);
const models = new Map();
const chosen = () => models.get(at("model").value);
const translates = (model) => model.task === "sar-to-optical";

function make(tag, text, attributes = {}) {
  const element = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The answer's JSON; an error object becomes an Error with its message. */
async function ask(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? body.status ?? response.statusText);
  return body;
}

async function connect() {
  const response = await fetch("/readyz");
  const { status, device, failed } = await response.json();
  const broken = failed.length ? `; not served: ${failed.join(", ")}` : "";
  at("status").textContent = `${status} on ${device}${broken}`;
  if (!response.ok) return setTimeout(connect, 1000);
  for (const model of (await ask("/v1/models")).data) {
    models.set(model.id, model);
    at("model").append(make("option", model.id, { value: model.id }));
  }
  at("model").value = ([...models.values()].find((model) => model.role === "student") ?? [...models.values()][0]).id;
  show();
}

/** Fits the form to the model. */
function show() {
  const model = chosen();
  const translating = translates(model);
  const made = model.teacher ? `${model.method} of ${model.teacher}` : `${model.method} ${model.role}`;
  at("about").textContent = `${model.task}, ${made}, ${model.size.width}x${model.size.height}`;
  at("class-row").hidden = !model.labels.length;
  at("image-row").hidden = !translating;
  at("measure").hidden = model.role !== "student";
  at("go").textContent = translating ? "Translate" : "Generate";
  const any = make("option", "drawn from the seed", { value: "" });
  at("label").replaceChildren(any, ...model.labels.map((name, i) => make("option", name, { value: i })));
  const some = [1, 2, 4, 8, 10, 25, 50, 100, 250, 500, 1000].filter((steps) => steps <= model.max_steps);
  const steps = model.steps ?? [...new Set([...some, model.default_steps])].sort((a, b) => a - b);
  at("steps").replaceChildren(...steps.map((count) => make("option", count, { value: count })));
  at("steps").value = model.default_steps;
}

/** What the form says, and the request that says it. */
function order() {
  const model = chosen();
  const fields = { model: model.id, n: at("n").valueAsNumber, steps: Number(at("steps").value) };
  if (at("seed").value) fields.seed = at("seed").valueAsNumber;
  if (translates(model)) {
    const file = at("image").files[0];
    if (!file) throw new Error("choose a SAR image first");
    const body = new FormData();
    body.append("image", file);
    for (const [name, value] of Object.entries(fields)) body.append(name, value);
    return { path: "/v1/images/translations", options: { method: "POST", body }, fields, file };
  }
  if (at("label").value) fields.label = Number(at("label").value);
  return { path: "/v1/images/generations", options: json(fields), fields };
}

function json(fields) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) };
}

function curl({ path, fields, file }) {
  if (!file) return `curl ${location.origin}${path} -H 'Content-Type: application/json' -d '${JSON.stringify(fields)}'`;
  const form = Object.entries(fields).map(([name, value]) => `-F ${name}=${value}`);
  return [`curl ${location.origin}${path} -F image=@${file.name}`, ...form].join(" ");
}

function showTiming(answer, roundTrip) {
  const { queue_ms, forward_ms, encode_ms, batch } = answer.timings;
  const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  const facts = {
    queue: ms(queue_ms), forward: ms(forward_ms), encode: ms(encode_ms), "round trip": ms(roundTrip),
    "network calls": answer.nfe, batch,
  };
  at("timing").replaceChildren(...Object.entries(facts).map(([name, value]) => {
    const entry = make("div");
    entry.append(make("dt", name), make("dd", value));
    return entry;
  }));
}

function figure(source, caption) {
  const result = make("figure");
  result.append(make("img", undefined, { src: source, alt: caption }), make("figcaption", caption));
  return result;
}

function showPictures(answer, file) {
  const source = (item) => `data:image/${answer.output_format};base64,${item.b64_json}`;
  const figures = answer.data.map((item) => figure(source(item), [item.label, `seed ${item.seed}`].filter(Boolean).join(", ")));
  if (file?.type === "image/png") figures.unshift(figure(URL.createObjectURL(file), "SAR, as given"));
  at("pictures").replaceChildren(...figures);
}

/** Student and teacher side by side, and how far apart their pictures are. */
function showMeasured(result) {
  const { teacher, against_teacher: distance } = result;
  const line = (kind, ...cells) => {
    const row = make("tr");
    row.append(...cells.map((cell) => make(kind, cell, { className: typeof cell === "number" ? "number" : "" })));
    return row;
  };
  const digits = (value) => (typeof value === "number" ? Number(value.toPrecision(3)) : value ?? "not measured");
  const speeds = make("table");
  speeds.append(line("th", "", result.model, teacher.model), line("td", "network calls", result.nfe, teacher.nfe));
  for (const name of ["p50", "p90", "p99"]) {
    speeds.append(line("td", `latency ${name}, ms`, digits(result.latency_ms[name]), digits(teacher.latency_ms[name])));
  }
  const agreement = make("table");
  for (const [name, value] of Object.entries(distance)) {
    if (typeof value !== "object") agreement.append(line("td", `${name} against the teacher`, digits(value)));
  }
  at("measured").replaceChildren(
    make("h2", `${digits(result.speed_up)} times as fast, on ${result.device}`), speeds, agreement,
    make("p", result.note, { className: "quiet" }),
  );
}

/** One thing at a time; what goes wrong is said in the form. */
async function busy(work) {
  at("go").disabled = at("measure").disabled = true;
  at("error").textContent = "";
  try {
    await work();
  } catch (error) {
    at("error").textContent = error.message;
  } finally {
    at("go").disabled = at("measure").disabled = false;
  }
}

at("model").addEventListener("change", show);
at("order").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(async () => {
    const wanted = order();
    const started = performance.now();
    const answer = await ask(wanted.path, wanted.options);
    showTiming(answer, performance.now() - started);
    showPictures(answer, wanted.file);
    at("measured").hidden = true;
    at("as-curl").hidden = false;
    at("curl").textContent = curl({ ...wanted, fields: { ...wanted.fields, seed: answer.seed } });
  });
});
at("measure").addEventListener("click", () => busy(async () => {
  for (const id of ["timing", "pictures"]) at(id).replaceChildren();
  at("as-curl").hidden = true;
  at("measured").hidden = false;
  at("measured").textContent = "measuring: the student and its teacher draw the same noises";
  const fields = { model: chosen().id, steps: Number(at("steps").value), n: 16 };
  try {
    showMeasured(await ask("/v1/benchmarks", json(fields)));
  } catch (error) {
    at("measured").hidden = true;
    throw error;
  }
}));
connect();
