/**
 * Runs one job with onnxruntime-web: what guest.py does, for a device without Python.
 *
 * A .tensors file has the layout of safetensors; its arrays are named "SAMPLE NAME".
 */

import { EdgecError, PROVIDERS, load } from "./edgec.mjs";

// dtype of ONNX -> [code in the file, typed array]; float16 and bool as their bits and bytes
const DTYPES = {
  bool: ["BOOL", Uint8Array],
  float16: ["F16", Uint16Array],
  float32: ["F32", Float32Array],
  float64: ["F64", Float64Array],
  int8: ["I8", Int8Array],
  int16: ["I16", Int16Array],
  int32: ["I32", Int32Array],
  int64: ["I64", BigInt64Array],
  uint8: ["U8", Uint8Array],
  uint16: ["U16", Uint16Array],
  uint32: ["U32", Uint32Array],
  uint64: ["U64", BigUint64Array],
};
const LEAST = 2; // feeds that are run however long they take
const BY_CODE = Object.fromEntries(
  Object.entries(DTYPES).map(([dtype, [code, array]]) => [code, [dtype, array]]),
);

/**
 * Runs a job: {outcome, outputs}, what outcome.json and outputs.tensors hold.
 *
 * job: what job.json holds; bundle, feeds: the bytes of those files. options: for `load`.
 * An error of the bundle or its inputs is {outcome: {error}}.
 */
export async function runJob(ort, { job, bundle, feeds }, options) {
  try {
    return await run(ort, job, bundle, bySample(readTensors(feeds), job.samples), options);
  } catch (error) {
    if (!(error instanceof EdgecError)) throw error;
    return { outcome: { error: error.message } };
  }
}

/** The tensors {type, data, dims} of a .tensors file, by name. bytes: Uint8Array. */
export function readTensors(bytes) {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [first, last] }] of Object.entries(header)) {
    const [type, array] = BY_CODE[dtype];
    const copy = bytes.slice(8 + length + first, 8 + length + last); // aligned
    tensors[name] = { type, data: new array(copy.buffer), dims: shape };
  }
  return tensors;
}

/** The bytes of a .tensors file. tensors: {type, data, dims} by name. */
export function writeTensors(tensors) {
  const header = {};
  let size = 0;
  for (const [name, { type, data, dims }] of Object.entries(tensors)) {
    const end = size + data.byteLength;
    header[name] = { dtype: DTYPES[type][0], shape: dims, data_offsets: [size, end] };
    size = end;
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const start = 8 + Math.ceil(text.length / 8) * 8;
  const bytes = new Uint8Array(start + size).fill(0x20, 8, start);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(start - 8), true);
  bytes.set(text, 8);
  Object.entries(tensors).forEach(([name, { data }]) => {
    const raw = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    bytes.set(raw, start + header[name].data_offsets[0]);
  });
  return bytes;
}

/** Tensors named "SAMPLE NAME" as one object by name per sample. */
export function bySample(tensors, samples) {
  const sorted = Array.from({ length: samples }, () => ({}));
  for (const [key, tensor] of Object.entries(tensors)) {
    const space = key.indexOf(" ");
    sorted[Number(key.slice(0, space))][key.slice(space + 1)] = tensor;
  }
  return sorted;
}

async function run(ort, job, bundle, feeds, options) {
  let before = performance.now();
  const model = await load(ort, bundle, { ...options, anyTarget: true });
  const loadMs = performance.now() - before;
  const outputs = {};
  before = performance.now();
  for (const [sample, given] of feeds.entries()) {
    const spentMs = performance.now() - before;
    const likelyMs = sample < LEAST ? 0 : (spentMs / sample) * (sample + 1);
    if (likelyMs > (job.limit_ms ?? Infinity)) break;
    for (const [name, tensor] of Object.entries(await model.run(given))) {
      outputs[`${sample} ${name}`] = tensor;
    }
  }
  const latencyMs = [];
  for (let turn = 0; turn < job.repeats; turn++) {
    before = performance.now();
    await model.run(feeds[0]);
    latencyMs.push(performance.now() - before);
  }
  const outcome = {
    onnxruntime: ort.env.versions.web,
    arch: "wasm32",
    os: "browser",
    features: ["wasm_simd", ...(ort.env.wasm.numThreads > 1 ? ["wasm_threads"] : [])],
    providers: Object.keys(PROVIDERS).filter((name) => model.providers.includes(PROVIDERS[name])),
    load_ms: loadMs,
    latency_ms: latencyMs,
  };
  return { outcome, outputs: writeTensors(outputs) };
}
