/**
 * Runs bundles on feeds in Node.js, in turns, for web.py:
 *
 *     node web.mjs MODULES FEEDS.tensors OUTPUTS.tensors REPEATS BUNDLE...
 *
 * FEEDS: tensors named "NUMBER INPUT". OUTPUTS: tensors named "BUNDLE NUMBER OUTPUT" (the bundle
 * by its place among the arguments), and "seconds", float64 [bundles, REPEATS], the process's CPU
 * seconds of calls with the first feeds. MODULES: the folder whose node_modules have the runtime.
 */

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

import { load } from "../compiler/devices/hosts/edgec.mjs";
import { bySample, readTensors, writeTensors } from "../compiler/devices/hosts/guest.mjs";

const WARM_UP = 24; // V8 compiles again what runs often

const [modules, feedsFile, outputsFile, repeats, ...bundles] = process.argv.slice(2);
const ort = createRequire(join(modules, "package.json"))("onnxruntime-web");
const tensors = readTensors(new Uint8Array(await readFile(feedsFile)));
const samples = 1 + Math.max(...Object.keys(tensors).map((name) => parseInt(name)));
const feeds = bySample(tensors, samples);
const models = [];
for (const bundle of bundles) {
  models.push(await load(ort, new Blob([await readFile(bundle)]), { threads: 1 }));
}

const outputs = {};
for (const [place, model] of models.entries()) {
  for (const [number, given] of feeds.entries()) {
    for (const [name, tensor] of Object.entries(await model.run(given))) {
      outputs[`${place} ${number} ${name}`] = tensor;
    }
  }
  for (let turn = 0; turn < WARM_UP; turn++) await model.run(feeds[0]);
}
const seconds = new Float64Array(models.length * repeats);
for (let turn = 0; turn < repeats; turn++) {
  for (const [place, model] of models.entries()) {
    const before = process.cpuUsage();
    await model.run(feeds[0]);
    const { user, system } = process.cpuUsage(before);
    seconds[place * repeats + turn] = (user + system) / 1e6;
  }
}
outputs.seconds = { type: "float64", data: seconds, dims: [models.length, Number(repeats)] };
await writeFile(outputsFile, writeTensors(outputs));
process.exit(0);
