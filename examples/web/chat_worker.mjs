/**
 * The model of chat.mjs, in a worker: reads conversations and posts the pieces of the answer.
 *
 * Import maps reach no worker: modules are imported by their addresses.
 */

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./tokenizers.mjs";
import { Template } from "./jinja.mjs";
import { loadLanguageModel } from "./generate.mjs";

let asked = null; // the answer that is wanted; another value ends the loop of an older one

const opened = openModel();
opened.catch((error) => postMessage({ kind: "failed", message: error.message, fatal: true }));
addEventListener("message", async ({ data: { kind, messages, longest } }) => {
  asked = kind === "ask" ? messages : null;
  if (asked) await write(await opened, messages, longest);
});

async function openModel() {
  const response = await fetch("model.edgec");
  if (!response.ok) throw new Error(`the bundle cannot be fetched: status ${response.status}`);
  const bundle = await response.arrayBuffer();
  const threads = Math.min(4, Math.max(1, navigator.hardwareConcurrency - 1));
  const model = await loadLanguageModel(ort, bundle, { Tokenizer, Template, threads });
  const { name, version, target } = model.manifest;
  const about = [
    `${name} version ${version} for ${target.name}`,
    `${(bundle.byteLength / 1e6).toFixed(1)} MB`,
    `onnxruntime-web ${ort.env.versions.web}`,
    `${ort.env.wasm.numThreads} thread${ort.env.wasm.numThreads > 1 ? "s" : ""}`,
  ].join(" · ");
  postMessage({ kind: "ready", about });
  return model;
}

/** longest: tokens of the answer; less where the context has no room for them. */
async function write(model, messages, longest) {
  const before = performance.now();
  const passed = () => (performance.now() - before) / 1e3;
  let first = null;
  try {
    const answer = model.generate(messages);
    for await (const text of answer) {
      first ??= passed();
      if (text) postMessage({ kind: "piece", text });
      await turn();
      if (asked !== messages || answer.tokens.length >= longest) break;
    }
    const { tokens, reason } = answer;
    const seconds = passed();
    postMessage({ kind: "end", tokens, reason: reason ?? "length", seconds, first: first ?? seconds });
  } catch (error) {
    postMessage({ kind: "failed", message: error.message, fatal: false });
  }
}

/** Lets messages come in: a run of the model ends without a turn of the event loop. */
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
