/**
 * Runs one job in Chromium without a window: node chromium.mjs FOLDER MODULES OPTIONS
 *
 * As node.mjs; OPTIONS also has `browser`, the program, and `flags` for it. An empty page is
 * served from the loopback address, cross-origin isolated so that WebAssembly may use threads;
 * it imports guest.mjs, fetches the job and sends its outputs back.
 */

import { createReadStream } from "node:fs";
import { writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { basename, extname, join } from "node:path";
import { fileURLToPath } from "node:url";

process.on("uncaughtException", (error) => {
  console.error(error.message.split("\n")[0]); // the last line is what the caller shows
  process.exit(1);
});
const [folder, modules, given] = process.argv.slice(2);
const { browser: program, flags, ...options } = JSON.parse(given);
const { chromium } = createRequire(join(modules, "package.json"))("playwright-core");
const FOLDERS = {
  "/hosts/": fileURLToPath(new URL(".", import.meta.url)),
  "/ort/": join(modules, "node_modules", "onnxruntime-web", "dist"),
  "/job/": folder,
};
const TYPES = { ".mjs": "text/javascript", ".wasm": "application/wasm" };

const server = createServer(serve).listen(0, "127.0.0.1");
await new Promise((listening) => server.once("listening", listening));
const browser = await chromium.launch({ executablePath: program, args: flags });
try {
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  const outcome = await page.evaluate(runInPage, options);
  await writeFile(join(folder, "outcome.json"), JSON.stringify(outcome));
} finally {
  await browser.close();
  server.close();
}

async function runInPage(options) {
  const { runJob } = await import("/hosts/guest.mjs");
  const ort = await import(`/ort/ort.${options.provider}.bundle.min.mjs`);
  const bytes = async (name) => new Uint8Array(await (await fetch(`/job/${name}`)).arrayBuffer());
  const job = await (await fetch("/job/job.json")).json();
  const files = { job, bundle: await bytes(job.bundle), feeds: await bytes("feeds.tensors") };
  const { outcome, outputs } = await runJob(ort, files, options);
  if (outputs) await fetch("/job/outputs.tensors", { method: "PUT", body: outputs });
  return outcome;
}

/** Files of FOLDERS, without their subfolders; PUT stores the outputs. */
async function serve(request, response) {
  response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
  response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
  const name = basename(request.url);
  const prefix = request.url.slice(0, request.url.length - name.length);
  if (request.method === "PUT" && request.url === "/job/outputs.tensors") {
    await writeFile(join(folder, name), request);
    response.end();
  } else if (prefix in FOLDERS) {
    response.setHeader("Content-Type", TYPES[extname(name)] ?? "application/octet-stream");
    const file = createReadStream(join(FOLDERS[prefix], name));
    file.on("error", () => response.writeHead(404).end()).pipe(response);
  } else {
    response.setHeader("Content-Type", "text/html");
    response.end("<!doctype html>");
  }
}
