/**
 * Runs one job in Node.js: node node.mjs FOLDER MODULES OPTIONS
 *
 * FOLDER: the job, as for guest.py. MODULES: the folder of node_modules. OPTIONS: JSON for `load`.
 */

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

import { runJob } from "./guest.mjs";

process.on("uncaughtException", (error) => {
  console.error(error.message.split("\n")[0]); // the last line is what the caller shows
  process.exit(1);
});
const [folder, modules, options] = process.argv.slice(2);
const ort = createRequire(join(modules, "package.json"))("onnxruntime-web");
const job = JSON.parse(await readFile(join(folder, "job.json"), "utf8"));
const bundle = new Uint8Array(await readFile(join(folder, job.bundle)));
const feeds = new Uint8Array(await readFile(join(folder, "feeds.tensors")));
const { outcome, outputs } = await runJob(ort, { job, bundle, feeds }, JSON.parse(options));
if (outputs) await writeFile(join(folder, "outputs.tensors"), outputs);
await writeFile(join(folder, "outcome.json"), JSON.stringify(outcome));
process.exit(0); // threads of WebAssembly would keep it alive
