// The page: lists the models, asks for pictures, shows them and how long each stage took. No build step, nothing from elsewhere.

import { ask, at, keyGiven, make, send, terms } from "./page.js";
import { live } from "./live.js";
import { isScene, showScene, translateScene } from "./scenes.js";

const models = new Map();
const chosen = () => models.get(at("model").value);
const translates = (model) => model.task === "sar-to-optical";

async function connect() {
  const response = await fetch("readyz");
  const { status, device, failed } = await response.json();
  const broken = failed.length ? `; not served: ${failed.join(", ")}` : "";
  at("status").textContent = `${status} on ${device}${broken}`;
  if (!response.ok) return setTimeout(connect, 1000);
  let served;
  try {
    served = (await ask("v1/models")).data;
  } catch (error) {
    if (error.status !== 401) throw error;
    at("status").textContent = error.message;
    return keyGiven().then(connect);
  }
  for (const model of served) {
    models.set(model.id, model);
    at("model").append(make("option", model.id, { value: model.id }));
  }
  at("model").value = ([...models.values()].find((model) => model.role === "student") ?? [...models.values()][0]).id;
  at("demonstration").hidden = ![...models.values()].some(translates);
  show();
}

/** Fits the form to the model. */
function show() {
  const model = chosen();
  const translating = translates(model);
  const made = model.teacher ? `${model.method} of ${model.teacher}` : `${model.method} ${model.role}`;
  at("about").textContent = `${model.task}, ${made}, ${model.size.width}x${model.size.height}`;
  at("class-row").hidden = !model.labels.length;
  at("prompt-row").hidden = !model.reads_text;
  at("image-row").hidden = !translating;
  const scene = translating && isScene(at("image").files[0]);
  at("sar-fields").hidden = !translating;
  at("units-row").hidden = at("samples-row").hidden = !scene;
  at("n-row").hidden = scene;
  at("measure").hidden = model.role !== "student" || !model.teacher;
  at("go").textContent = translating ? "Translate" : "Generate";
  const any = make("option", "drawn from the seed", { value: "" });
  at("label").replaceChildren(any, ...model.labels.map((name, i) => make("option", name, { value: i })));
  const some = [1, 2, 4, 8, 10, 25, 50, 100, 250, 500, 1000].filter((steps) => steps <= model.max_steps);
  const steps = model.steps ?? [...new Set([...some, model.default_steps])].sort((a, b) => a - b);
  at("steps").replaceChildren(...steps.map((count) => make("option", count, { value: count })));
  at("steps").value = model.default_steps;
}

/** What the form says in any case. */
function common() {
  const fields = { model: chosen().id, steps: Number(at("steps").value) };
  if (at("seed").value) fields.seed = at("seed").valueAsNumber;
  return fields;
}

/** What the form says, and the request that says it. */
function order() {
  const fields = { ...common(), n: at("n").valueAsNumber };
  if (translates(chosen())) {
    const file = at("image").files[0];
    if (!file) throw new Error("choose a SAR image first");
    const body = new FormData();
    body.append("image", file);
    if (bandsOf(file)) fields.bands = bandsOf(file);
    for (const [name, value] of Object.entries(fields)) body.append(name, value);
    return { path: "v1/images/translations", options: { method: "POST", body }, fields, file };
  }
  describe(fields);
  return { path: "v1/images/generations", options: json(fields), fields };
}

/** The bands as the form says them; of a picture, as its name does. */
function bandsOf(file) {
  const named = isScene(file) ? [] : file.name.toUpperCase().split(/[^A-Z0-9]+/).filter((word) => ["VV", "VH"].includes(word));
  return at("bands").value.trim() || (new Set(named).size === 1 ? named[0] : "");
}

/** What is to be in the picture. */
function describe(fields) {
  if (chosen().reads_text) fields.prompt = at("prompt").value;
  else if (at("label").value) fields.label = Number(at("label").value);
}

function json(fields) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) };
}

function curl({ path, fields, file }) {
  if (!file) return `curl ${new URL(path, location.href)} -H 'Content-Type: application/json' -d '${JSON.stringify(fields)}'`;
  const form = Object.entries(fields).map(([name, value]) => `-F ${name}=${value}`);
  return [`curl ${new URL(path, location.href)} -F image=@${file.name}`, ...form].join(" ");
}

function showTiming(answer, roundTrip) {
  const { queue_ms, forward_ms, encode_ms, batch } = answer.timings;
  const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  const facts = {
    queue: ms(queue_ms), forward: ms(forward_ms), encode: ms(encode_ms), "round trip": ms(roundTrip),
    "network calls": answer.nfe, batch,
  };
  terms(at("timing"), facts);
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
  const buttons = ["go", "measure", "demonstration"].map(at);
  buttons.forEach((button) => { button.disabled = true; });
  at("error").textContent = "";
  try {
    await work();
  } catch (error) {
    at("error").textContent = error.message;
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

/** A GeoTIFF, at once or as a job: whichever the server takes it as. */
async function translateFile(file) {
  const fields = common();
  if (at("units").value !== "auto") fields.units = at("units").value;
  if (bandsOf(file)) fields.bands = bandsOf(file);
  if (at("samples").valueAsNumber > 1) fields.samples = at("samples").valueAsNumber;
  for (const id of ["timing", "pictures"]) at(id).replaceChildren();
  at("measured").hidden = at("as-curl").hidden = true;
  const started = performance.now();
  const result = await translateScene(file, fields);
  if (result.answer) showTiming(result.answer, performance.now() - started);
  showScene(result);
  at("as-curl").hidden = false;
  const said = Object.entries({ ...fields, seed: result.facts.seed }).map(([name, value]) => `-F '${name}=${value}'`);
  const [path, then] = result.answer ? ["images", " -H 'Accept: image/tiff' -o optical.tif"] : ["jobs", ""];
  at("curl").textContent = `curl ${new URL(`v1/${path}/translations`, location.href)} -F image=@${file.name} ${said.join(" ")}${then}`;
}

/** What the form says, for one picture while it changes. */
function orderNow() {
  const fields = { seed: at("slide").valueAsNumber, ...common() };
  const file = translates(chosen()) ? at("image").files[0] : undefined;
  if (translates(chosen()) && !file) throw new Error("choose a SAR picture first");
  if (isScene(file)) throw new Error("a GeoTIFF scene is not drawn live; a PNG picture is");
  if (!file) describe(fields);
  else if (bandsOf(file)) fields.bands = bandsOf(file);
  return { fields, file };
}

let running = null;
at("live").addEventListener("change", () => {
  at("slide-row").hidden = !at("live").checked;
  running?.close();
  running = !at("live").checked ? null : live(orderNow, showTiming, (message) => {
    at("error").textContent = message;
    at("live").checked = false;
    at("slide-row").hidden = true;
    running = null;
  });
});
at("slide").addEventListener("input", () => { at("seed").value = at("slide").value; });
at("model").addEventListener("change", show);
at("image").addEventListener("change", show);
at("demonstration").addEventListener("click", () => busy(async () => {
  const response = await send("v1/demonstration.tif");
  if (!response.ok) throw new Error((await response.json()).error.message);
  if (!translates(chosen())) {
    const translators = [...models.values()].filter(translates);
    at("model").value = (translators.find((model) => model.role === "student") ?? translators[0]).id;
    show();
  }
  await translateFile(new File([await response.blob()], "demonstration.tif", { type: "image/tiff" }));
}));
for (const kind of ["input", "change"]) {  // while it slides; but of a list when it has been fitted to the model
  at("order").addEventListener(kind, ({ target }) => {
    if ((kind === "input") === target.matches("[type=range], [type=number]")) running?.ask();
  });
}
at("order").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(async () => {
    const file = at("image").files[0];
    if (translates(chosen()) && isScene(file)) return translateFile(file);
    const wanted = order();
    const started = performance.now();
    const answer = await ask(wanted.path, wanted.options);
    showTiming(answer, performance.now() - started);
    showPictures(answer, wanted.file);
    at("scene").replaceChildren();
    at("measured").hidden = true;
    at("as-curl").hidden = false;
    at("curl").textContent = curl({ ...wanted, fields: { ...wanted.fields, seed: answer.seed } });
  });
});
at("measure").addEventListener("click", () => busy(async () => {
  for (const id of ["timing", "pictures", "scene"]) at(id).replaceChildren();
  at("as-curl").hidden = true;
  at("measured").hidden = false;
  at("measured").textContent = "measuring: the student and its teacher draw the same noises";
  const fields = { model: chosen().id, steps: Number(at("steps").value), n: 16 };
  try {
    showMeasured(await ask("v1/benchmarks", json(fields)));
  } catch (error) {
    at("measured").hidden = true;
    throw error;
  }
}));
connect();
