// Live: what the form says is drawn while it changes. One WebSocket, one picture at work; what changes meanwhile is asked next.

import { at, make } from "./page.js";

/**
 * Opens the connection. `order()` gives {fields, file} of the form as it is now, or throws what is missing in it;
 * `shown(header, roundTrip)` is told of every picture, `ended(message)` why it is over.
 */
export function live(order, shown, ended) {
  const key = sessionStorage.getItem("key");
  const protocols = key ? ["fewstep", `fewstep-key.${key}`] : ["fewstep"];
  const socket = new WebSocket(new URL("v1/realtime", location.href.replace(/^http/, "ws")), protocols);
  const canvas = make("canvas"), caption = make("figcaption");
  let seq = 0, atWork = false, changed = false, sent = 0, over = false;
  socket.binaryType = "arraybuffer";

  async function ask() {
    changed = atWork || socket.readyState !== WebSocket.OPEN;
    if (changed) return;
    atWork = true;
    try {
      const { fields, file } = order();
      const picture = file && await file.arrayBuffer();
      sent = performance.now();
      socket.send(JSON.stringify({ ...fields, seq: ++seq, image: Boolean(file), output_format: "webp" }));
      if (file) socket.send(picture);
    } catch (error) {
      failed(error.message);
    }
  }

  function next() {
    atWork = false;
    if (changed) ask();
  }

  function failed(message) {
    at("error").textContent = message;
    next();
  }

  async function show(data) {
    const length = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const picture = await createImageBitmap(new Blob([new Uint8Array(data, 4 + length)], { type: "image/webp" }));
    [canvas.width, canvas.height] = [picture.width, picture.height];
    canvas.getContext("2d").drawImage(picture, 0, 0);
    caption.textContent = [header.label, `seed ${header.seed}`].filter(Boolean).join(", ");
    at("error").textContent = "";
    shown(header, performance.now() - sent);
    next();
  }

  socket.addEventListener("open", () => {
    const figure = make("figure");
    figure.append(canvas, caption);
    at("pictures").replaceChildren(figure);
    ask();
  });
  socket.addEventListener("message", ({ data }) => {
    if (typeof data === "string") failed(JSON.parse(data).error.message);
    else show(data);
  });
  socket.addEventListener("close", ({ reason }) => { if (!over) ended(reason || "the live connection broke off"); });
  return { ask, close: () => { over = true; socket.close(1000); } };
}
