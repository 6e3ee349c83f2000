/**
 * Lets a language model answer in Node.js, for decoder_web.py:
 *
 *     node decoder_web.mjs MODULES PROMPT TOKENS BUNDLE
 *
 * PROMPT: token ids as JSON. Prints {load_ms, first_ms, step_ms, peak_mb, tokens} as JSON:
 * milliseconds of CPU time of the process, the step's a median, and the process's largest resident
 * size. MODULES: the folder whose node_modules have the runtime.
 */

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

import { loadLanguageModel } from "../compiler/devices/hosts/generate.mjs";

const [modules, prompt, tokens, bundle] = process.argv.slice(2);
const ort = createRequire(join(modules, "package.json"))("onnxruntime-web");

const cpu_ms = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e3;
};
const times = [cpu_ms()];
const file = new Blob([await readFile(bundle)]);
const model = await loadLanguageModel(ort, file, { threads: 1, anyTarget: true });
times.push(cpu_ms());
const answer = model.generate(JSON.parse(prompt), { max_new_tokens: Number(tokens), temperature: 0 });
for await (const _ of answer) times.push(cpu_ms());
const [load_ms, first_ms, ...steps_ms] = times.slice(1).map((time, i) => time - times[i]);
const step_ms = steps_ms.sort((a, b) => a - b)[steps_ms.length >> 1];
const peak_mb = (process.resourceUsage().maxRSS * 1024) / 1e6;
console.log(JSON.stringify({ load_ms, first_ms, step_ms, peak_mb, tokens: answer.tokens }));
process.exit(0);
