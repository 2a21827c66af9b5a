// GeoTIFF scenes: asked for at once, or as a job where the server says that they are too large; shown before and after.

import { addressOf, ask, at, make, send, terms } from "./page.js";

export const isScene = (file) => Boolean(file) && (file.type === "image/tiff" || /\.tiff?$/i.test(file.name));

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** {facts, sar, optical, downloads, answer}: addresses of pictures and files; `answer` where there was no job. */
export async function translateScene(file, fields) {
  const body = new FormData();
  body.append("image", file);
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  body.append("output_format", "geotiff");
  at("scene").replaceChildren(make("p", "Translating", { className: "quiet" }));
  try {
    const answer = await ask("v1/images/translations", { method: "POST", body });
    return { answer, ...fromAnswer(answer) };
  } catch (error) {
    if (error.status !== 413) {
      at("scene").replaceChildren();
      throw error;
    }
  }
  return fromJob(file, fields);
}

function fromAnswer({ data, scene }) {
  const png = (base64) => `data:image/png;base64,${base64}`;
  const downloads = { "optical.tif": address(data[0].b64_json) };
  if (scene.uncertainty_geotiff) downloads["uncertainty.tif"] = address(scene.uncertainty_geotiff);
  return { facts: scene.facts, sar: png(scene.sar_png), optical: png(scene.optical_png), downloads };
}

let addresses = []; // of the last scene's files; they hold memory until they are let go

function address(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/tiff" }));
  addresses.push(url);
  return url;
}

/** The file goes as the body, from disk; then the job is asked how far it is. */
async function fromJob(file, fields) {
  const query = new URLSearchParams(fields);
  at("scene").replaceChildren(make("p", "Sending the scene", { className: "quiet" }));
  const headers = { "Content-Type": "image/tiff", "Content-Disposition": `attachment; filename="${encodeURIComponent(file.name)}"` };
  const options = { method: "POST", headers, body: file };
  try {
    let job = await ask(`v1/jobs/translations?${query}`, options);
    const path = `v1/jobs/${job.id}`;
    const [bar, said] = [make("progress", "", { max: 1 }), make("p", "")];
    const stop = make("button", "Cancel", { type: "button", className: "second" });
    bar.setAttribute("aria-label", "Share of the scene that is translated");
    stop.addEventListener("click", () => { stop.disabled = true; send(path, { method: "DELETE" }); });
    at("scene").replaceChildren(said, bar, stop);
    while (job.status === "queued" || job.status === "running") {
      const speed = job.megapixels_per_second;
      bar.value = job.progress;
      const progress = `${job.status}, ${Math.round(100 * job.progress)} %`;
      said.textContent = speed ? `${progress}, ${speed.toPrecision(2)} Mpx/s` : progress;
      await pause(500);
      job = await ask(path);
    }
    if (job.status !== "done") throw new Error(job.error?.message ?? `the job was ${job.status}`);
    const files = Object.keys(job.files).map(async (name) => [name, await addressOf(`${path}/${name}`)]);
    const { "preview.png": optical, "sar.png": sar, ...downloads } = Object.fromEntries(await Promise.all(files));
    addresses.push(...Object.values(downloads));
    return { facts: job.facts, sar, optical, downloads };
  } catch (error) {
    at("scene").replaceChildren();
    throw error;
  }
}

/** The warning, SAR and result under one slider, the files, and what was decided. */
export function showScene({ facts, sar, optical, downloads }) {
  const [warning, ...more] = facts.warnings;
  const files = make("p", "", { className: "files" });
  files.append(...Object.entries(downloads).map(([name, href]) => make("a", name, { href, download: name })));
  const bands = Object.entries(facts.bands).map(([band, index]) => `${band} = band ${index}`).join(", ");
  const list = terms(make("dl", undefined, { className: "facts" }), {
    units: `${facts.units} (${facts.units_why})`,
    bands: `${bands} (${facts.bands_how})`,
    scene: `${facts.width} x ${facts.height} px, ${Math.round(100 * facts.valid_share)} % with data`,
    tiles: `${facts.tiles} drawn, ${facts.skipped} empty`,
    speed: `${facts.megapixels_per_second.toPrecision(3)} Mpx/s, ${facts.seconds.toPrecision(3)} s`,
    model: `${facts.model}, ${facts.steps} step${facts.steps === 1 ? "" : "s"}, seed ${facts.seed}`,
    "model hash": facts.model_sha256.slice(0, 16),
    ...(facts.mean_deviation === null ? {} : {
      samples: `${facts.samples}, which differ by ${facts.mean_deviation.toPrecision(2)} levels of 255`,
    }),
  });
  const note = make("p", warning, { className: "warning" });
  note.setAttribute("role", "note");
  const remarks = more.map((text) => make("p", text, { className: "quiet" }));
  at("scene").replaceChildren(note, compare(sar, optical), files, ...remarks, list);
  const kept = new Set(Object.values(downloads));
  addresses = addresses.filter((url) => kept.has(url) || URL.revokeObjectURL(url));
}

/** Two pictures of one size under a slider: left of it the SAR, right of it the result. */
function compare(sar, optical) {
  const figure = make("figure", undefined, { className: "compare" });
  const layers = make("div", undefined, { className: "layers" });
  const picture = (src, alt, className) => make("img", undefined, { src, alt, className });
  layers.append(
    picture(sar, "The SAR scene in grey, 2 to 98 % of its decibels", ""),
    picture(optical, "The optical picture, inferred from the SAR", "over"),
  );
  const slider = make("input", undefined, { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", "Where the SAR ends and the optical picture begins");
  const cut = () => {
    layers.style.setProperty("--cut", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % SAR, ${100 - slider.value} % optical`);
  };
  const follow = (event) => {
    if (!event.buttons) return;
    const { left, width } = layers.getBoundingClientRect();
    slider.value = (100 * (event.clientX - left)) / width;
    cut();
  };
  slider.addEventListener("input", cut);
  for (const kind of ["pointerdown", "pointermove"]) layers.addEventListener(kind, follow);
  cut();
  const caption = make("figcaption");
  caption.append(make("span", "SAR"), make("span", "optical, inferred"));
  figure.append(layers, slider, caption);
  return figure;
}
