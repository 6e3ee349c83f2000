/**
 * Answers with a bundle in Node.js: node answer.mjs MODULES HOSTS BUNDLE < CASES
 *
 * CASES: a list of {prompt, options, load} as JSON; the model is opened once for each different
 * load, and options may have numbers, which "random" gives one after another. Prints a list of
 * {tokens, reason, pieces}, or {error}. MODULES: the folder with node_modules.
 */

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, hosts, file] = process.argv.slice(2);
const require = createRequire(join(modules, "package.json"));
const ort = require("onnxruntime-web");
const libraries = {
  ...require("@huggingface/tokenizers"),
  ...require("@huggingface/jinja"),
};
const { loadLanguageModel } = await import(pathToFileURL(join(hosts, "generate.mjs")));

const opened = new Map();
async function modelOf(load = {}) {
  const key = JSON.stringify(load);
  if (!opened.has(key)) {
    const { without = [], ...options } = load;
    const given = { Tokenizer: libraries.Tokenizer, Template: libraries.Template };
    without.forEach((name) => delete given[name]);
    const bytes = new Blob([await readFile(file)]);
    opened.set(key, await loadLanguageModel(ort, bytes, { threads: 1, ...options, ...given }));
  }
  return opened.get(key);
}

async function answered({ prompt, options = {}, load }) {
  try {
    const { numbers, ...given } = options;
    if (numbers) given.random = () => numbers.shift();
    const answer = (await modelOf(load)).generate(prompt, given);
    const pieces = [];
    for await (const piece of answer) pieces.push(piece);
    return { tokens: answer.tokens, reason: answer.reason, pieces };
  } catch (error) {
    return { error: `${error.constructor.name}: ${error.message}` };
  }
}

let text = "";
for await (const chunk of process.stdin) text += chunk;
const found = [];
for (const one of JSON.parse(text)) found.push(await answered(one));
process.stdout.write(JSON.stringify(found), () => process.exit(0));
