/**
 * A page that runs a classifier: pick or drop a picture, see the five likeliest classes.
 *
 * How a picture becomes an input, and the names of the classes, are in the bundle. After every
 * picture the document gets the event "classified", with the outputs in its detail.
 */

import * as ort from "onnxruntime-web";
import { load } from "edgec";

const SHOWN = 5;
const [preview, status, classes, timing, sample, facts, drop, file] = [
  "preview", "status", "classes", "timing", "sample", "facts", "drop", "file",
].map((id) => document.getElementById(id));

try {
  const model = await openModel();
  offerSample();
  listen((picture) => classify(model, picture).catch(fail));
  document.body.dataset.state = "ready";
  status.textContent = "Ready";
} catch (error) {
  fail(error);
}

async function openModel() {
  const response = await fetch("model.edgec");
  if (!response.ok) throw new Error(`the bundle cannot be fetched: status ${response.status}`);
  const bundle = await response.arrayBuffer();
  const threads = navigator.hardwareConcurrency > 3 ? 4 : 1; // as many as pay for a small model
  const model = await load(ort, bundle, { threads });
  // the first run compiles; not while somebody waits for an answer
  await model.run(model.prepareImage(new ImageData(1, 1)));
  const { name, version, target } = model.manifest;
  facts.textContent = [
    `${name} version ${version} for ${target.name}`,
    `${(bundle.byteLength / 1e6).toFixed(1)} MB`,
    `onnxruntime-web ${ort.env.versions.web}`,
    `${ort.env.wasm.numThreads} thread${ort.env.wasm.numThreads > 1 ? "s" : ""}`,
  ].join(" · ");
  return model;
}

async function classify(model, picture) {
  show(picture);
  const feeds = model.prepareImage(await pixelsOf(picture));
  const before = performance.now();
  const outputs = await model.run(feeds);
  const milliseconds = performance.now() - before;
  const logits = outputs[model.outputs[0].name].data;
  const best = likeliest(logits, model.labels ?? []);
  status.textContent = "This looks like";
  classes.replaceChildren(...best.map(row));
  timing.textContent = `Computed in ${milliseconds.toFixed(0)} ms`;
  const detail = { best, logits: Array.from(logits), milliseconds };
  document.dispatchEvent(new CustomEvent("classified", { detail }));
}

/** RGBA pixels as they are in the file: turned as its EXIF says, colours not converted. */
async function pixelsOf(picture) {
  const bitmap = await createImageBitmap(picture, {
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function likeliest(logits, labels) {
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = Array.from(logits, (logit) => Math.exp(logit - highest));
  const total = weights.reduce((a, b) => a + b, 0);
  return weights
    .map((weight, index) => ({ label: labels[index] ?? `class ${index}`, share: weight / total }))
    .sort((a, b) => b.share - a.share)
    .slice(0, SHOWN);
}

function row({ label, share }) {
  const item = document.createElement("li");
  const meter = Object.assign(document.createElement("meter"), { value: share });
  const percent = Object.assign(document.createElement("span"), {
    textContent: share < 0.01 ? "< 1 %" : `${Math.round(100 * share)} %`,
  });
  item.append(label, percent, meter);
  return item;
}

function show(picture) {
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(picture);
  preview.alt = "the picture";
  preview.hidden = false;
  status.textContent = "Looking …";
}

function listen(classifyPicture) {
  file.addEventListener("change", () => file.files.length && classifyPicture(file.files[0]));
  sample.addEventListener("click", async () => {
    classifyPicture(await (await fetch("sample")).blob());
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      const [picture] = event.dataTransfer.files;
      if (kind === "drop" && picture) classifyPicture(picture);
    });
  }
}

async function offerSample() {
  sample.hidden = !(await fetch("sample", { method: "HEAD" })).ok;
}

function fail(error) {
  document.body.dataset.state = "failed";
  status.textContent = error.message;
}
