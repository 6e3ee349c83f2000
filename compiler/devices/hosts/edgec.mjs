/**
 * Runs edgec bundles in a browser or in Node.js, through onnxruntime-web.
 *
 *     import * as ort from "onnxruntime-web";
 *     import { load } from "./edgec.mjs";
 *
 *     const file = await fetch("model.web.edgec");
 *     const model = await load(ort, await file.arrayBuffer());
 *     const { logits } = await model.run(model.prepareImage(imageData));
 *
 * The format is docs/bundle-format.md. A bundle is a stored zip with manifest.json as its last
 * entry, and the graph's large tensors are external data whose offsets count from the start of
 * the bundle: so the bundle itself is handed to ONNX Runtime as that external file.
 *
 * Tensors are objects {data, dims} with the typed array of the dtype: float32 in a Float32Array,
 * int64 in a BigInt64Array, float16 in a Uint16Array of its bits (or a Float16Array where there
 * is one), bool in a Uint8Array. An ort.Tensor is such an object.
 *
 * Left out on purpose: bundles of 2 GiB and more (WebAssembly's memory), decoding of image files
 * (createImageBitmap does it), the self-test (`edgec verify --on node-wasm` runs it).
 */

import { prepareImage } from "./image.mjs";

export class EdgecError extends Error {}
/** The file is truncated, altered, of another format, or needs another onnxruntime-web. */
export class BundleError extends EdgecError {}
/** Built for another instruction set or operating system. */
export class TargetMismatchError extends EdgecError {}
/** A tensor has the wrong name, type, rank or size. */
export class InputError extends EdgecError {}

const FORMAT_VERSION = 1;
const MANIFEST = "manifest.json";
const WEIGHTS = "weights.bin";
const LOCATION = "./".repeat(125) + "weights"; // the graph's name for the bundle itself
const AUTO_FULL_BYTES = 64 << 20; // below, the check "auto" hashes everything
const FEATURES = ["wasm_simd"]; // what onnxruntime-web itself needs
/** ONNX Runtime's names of execution providers -> those of onnxruntime-web. */
export const PROVIDERS = { CPUExecutionProvider: "wasm", WebGpuExecutionProvider: "webgpu" };
const ARRAYS = {
  bool: "Uint8Array",
  float16: "Uint16Array",
  float32: "Float32Array",
  float64: "Float64Array",
  int8: "Int8Array",
  int16: "Int16Array",
  int32: "Int32Array",
  int64: "BigInt64Array",
  string: "Array",
  uint8: "Uint8Array",
  uint16: "Uint16Array",
  uint32: "Uint32Array",
  uint64: "BigUint64Array",
};

/**
 * Opens a bundle.
 *
 * ort: the module onnxruntime-web. source: ArrayBuffer, Uint8Array or Blob.
 * threads: instead of the bundle's; more than one needs a page that is cross-origin isolated,
 * and onnxruntime-web starts its threads once: the first model of a page decides.
 * provider: "wasm" or "webgpu", instead of the bundle's. check: "auto" compares all digests below
 * 64 MiB, else all but the weights'; "full" all. anyTarget: run a bundle for another device.
 * Throws BundleError for the file, TargetMismatchError for the target.
 */
export async function load(ort, source, options = {}) {
  const { threads, provider, check = "auto", anyTarget = false } = options;
  const bytes = await bytesOf(source);
  const manifest = await readBundle(bytes, check);
  checkTarget(manifest.target, anyTarget);
  checkVersion(ort.env.versions.web, manifest.onnxruntime);
  ort.env.wasm.numThreads = threadsHere(threads ?? manifest.session.threads);
  const graph = manifest.graphs.main;
  const providers = provider ? [provider] : providersOf(manifest.session.providers);
  try {
    const session = await ort.InferenceSession.create(entry(bytes, manifest, graph.file), {
      executionProviders: providers,
      externalData: [{ path: LOCATION, data: bytes }],
      logSeverityLevel: 4,
      extra: sessionConfig(manifest.session),
    });
    return new Model(ort, manifest, session, providers);
  } catch (error) {
    throw new BundleError(`ONNX Runtime refuses the bundle '${manifest.name}': ${lineOf(error)}`);
  }
}

/** A loaded model; `load` makes one. */
export class Model {
  constructor(ort, manifest, session, providers) {
    this.ort = ort;
    this.manifest = manifest;
    this.session = session;
    this.providers = providers;
  }

  /** Names, dtypes and shapes of the inputs. */
  get inputs() {
    return this.manifest.graphs.main.inputs;
  }

  /** Names, dtypes and shapes of the outputs. */
  get outputs() {
    return this.manifest.graphs.main.outputs;
  }

  /** Names of the classes, if the model is a classifier that has them; else null. */
  get labels() {
    return this.manifest.labels;
  }

  /**
   * Tensors by output name. feeds: tensors by input name.
   * Throws InputError for a wrong name, dtype or shape.
   */
  async run(feeds) {
    checkFeeds(this.inputs, feeds);
    const given = {};
    for (const { name, dtype } of this.inputs) {
      given[name] = new this.ort.Tensor(dtype, feeds[name].data, feeds[name].dims);
    }
    try {
      return await this.session.run(given);
    } catch (error) {
      throw new InputError(`the model cannot run these inputs: ${lineOf(error)}`);
    }
  }

  /**
   * The feeds for one photograph, as the model's author preprocessed it.
   *
   * pixels: an ImageData, or {data, width, height} with RGBA bytes.
   * Throws InputError for anything else, and if the bundle states no preprocessing.
   */
  prepareImage(pixels) {
    const { image } = this.manifest;
    if (!image) throw new InputError("the bundle does not say how to prepare images");
    const { data, width, height } = pixels ?? {};
    if (!width || !height || data?.length !== 4 * width * height) {
      throw new InputError("an image must be {data, width, height} with 4 bytes RGBA per pixel");
    }
    return { [image.input]: prepareImage(pixels, image) };
  }

  /** Gives back the memory. */
  async release() {
    await this.session.release();
  }
}

/**
 * The manifest of a bundle whose sizes, places and digests were checked.
 *
 * bytes: Uint8Array. check: as in `load`. Throws BundleError with the first thing that is wrong.
 */
export async function readBundle(bytes, check = "auto") {
  if (!["auto", "full"].includes(check)) {
    throw new EdgecError(`check is '${check}', expected 'auto' or 'full'`);
  }
  const members = readDirectory(bytes);
  const last = members.at(-1);
  if (last.name !== MANIFEST) {
    throw new BundleError(`the bundle's last entry is '${last.name}', expected ${MANIFEST}`);
  }
  const text = slice(bytes, last);
  if (crc32(text) !== last.crc32) throw altered(MANIFEST);
  const manifest = JSON.parse(new TextDecoder().decode(text));
  if (manifest.format_version !== FORMAT_VERSION) {
    throw new BundleError(
      `the bundle has format version ${manifest.format_version}, this edgec.mjs reads ` +
        `${FORMAT_VERSION}; take the edgec.mjs of the edgec that built it`,
    );
  }
  checkEntries(manifest.entries, members.slice(0, -1));
  const full = check === "full" || bytes.length < AUTO_FULL_BYTES;
  for (const item of manifest.entries) {
    if ((full || item.name !== WEIGHTS) && (await sha256(slice(bytes, item))) !== item.sha256) {
      throw altered(item.name);
    }
  }
  return manifest;
}

async function bytesOf(source) {
  if (source instanceof Blob) return new Uint8Array(await source.arrayBuffer());
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (source instanceof Uint8Array) return source;
  throw new EdgecError("a bundle must be an ArrayBuffer, a Uint8Array or a Blob");
}

/** The zip's entries: name, size, crc32, offset of the data. One after another, without a gap. */
function readDirectory(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 4 || view.getUint32(0, true) !== 0x04034b50) {
    throw new BundleError("this is not a bundle (a zip written by edgec)");
  }
  const end = bytes.length - 22;
  if (end < 0 || view.getUint32(end, true) !== 0x06054b50) {
    throw new BundleError("the bundle is truncated or has bytes added at its end");
  }
  const members = [];
  let at = view.getUint32(end + 16, true);
  let header = 0;
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (at + 46 > end || view.getUint32(at, true) !== 0x02014b50) {
      throw new BundleError("the bundle's directory is altered");
    }
    const nameLength = view.getUint16(at + 28, true);
    const size = view.getUint32(at + 24, true);
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const stored = view.getUint16(at + 10, true) === 0 && view.getUint32(at + 20, true) === size;
    if (!stored || view.getUint32(at + 42, true) !== header || header + 30 > end) {
      throw new BundleError(`the entry '${name}' is not where a bundle has it, or is compressed`);
    }
    const offset =
      header + 30 + view.getUint16(header + 26, true) + view.getUint16(header + 28, true);
    members.push({ name, size, crc32: view.getUint32(at + 16, true), offset });
    header = offset + size;
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  if (at !== end || header !== view.getUint32(end + 16, true) || !members.length) {
    throw new BundleError("the bundle's directory is altered");
  }
  return members;
}

function checkEntries(entries, members) {
  if (entries.length !== members.length) {
    throw new BundleError(`${MANIFEST} lists ${entries.length} entries, there are ${members.length}`);
  }
  entries.forEach(({ name, size, offset }, i) => {
    const member = members[i];
    if (name !== member.name || size !== member.size || offset !== member.offset) {
      throw new BundleError(
        `the entry '${member.name}' has ${member.size} bytes at ${member.offset}; ` +
          `${MANIFEST} says '${name}', ${size} bytes at ${offset}`,
      );
    }
  });
}

function checkTarget({ name, arch, os }, anyTarget) {
  if (anyTarget || (arch === "wasm32" && os.includes("browser"))) return;
  throw new TargetMismatchError(
    `the bundle was built for ${name} (${arch}; ${os.join(", ")}), this is wasm32 on browser; ` +
      "build it with --target web, or load it with anyTarget to run it slower or less exactly",
  );
}

/** Only the numbers of a version count: 1.32.0-dev.1 is 1.32.0. */
function checkVersion(installed, wanted) {
  for (const term of wanted.split(",")) {
    const [, operator, limit] = term.match(/^\s*(>=|<=|==|!=|>|<)\s*([\d.]+)\s*$/) ?? [];
    const order = compareVersions(installed, limit ?? "");
    const holds = {
      ">=": order >= 0,
      "<=": order <= 0,
      "==": order === 0,
      "!=": order !== 0,
      ">": order > 0,
      "<": order < 0,
    };
    if (!holds[operator]) {
      throw new BundleError(
        `the bundle needs onnxruntime ${wanted}, this is onnxruntime-web ${installed}`,
      );
    }
  }
}

function compareVersions(a, b) {
  const [first, second] = [a, b].map((text) => text.match(/^[\d.]*/)[0].split(".").map(Number));
  for (let i = 0; i < Math.max(first.length, second.length); i++) {
    const difference = (first[i] ?? 0) - (second[i] ?? 0);
    if (difference) return difference;
  }
  return 0;
}

/** Threads share memory, which a page may only do if it is cross-origin isolated. */
function threadsHere(wanted) {
  if (globalThis.crossOriginIsolated === false) return 1;
  return wanted || Math.min(4, globalThis.navigator?.hardwareConcurrency ?? 1);
}

function providersOf(names) {
  const unknown = names.find((name) => !(name in PROVIDERS));
  if (!unknown) return names.map((name) => PROVIDERS[name]);
  throw new BundleError(
    `the bundle needs the execution provider '${unknown}', which onnxruntime-web lacks; ` +
      "build it with --target web, or give a provider to run it slower or less exactly",
  );
}

function sessionConfig({ config, without, prepacking, disabled_optimizers: disabled }) {
  const entries = { ...config };
  for (const [feature, changes] of Object.entries(without)) {
    if (!FEATURES.includes(feature)) Object.assign(entries, changes);
  }
  if (!prepacking) entries["session.disable_prepacking"] = "1";
  if (disabled.length) entries["optimization.disable_specified_optimizers"] = disabled.join(";");
  return entries;
}

function checkFeeds(inputs, feeds) {
  const known = inputs.map(({ name }) => `'${name}'`).join(", ");
  for (const name of Object.keys(feeds)) {
    if (!inputs.some((input) => input.name === name)) {
      throw new InputError(`the model has no input '${name}'; it has ${known}`);
    }
  }
  const sizes = new Map(); // dynamic dimension -> [size, input]
  for (const input of inputs) {
    const feed = feeds[input.name];
    if (!feed) throw new InputError(`input '${input.name}' is missing; the model has ${known}`);
    if (!feed.data || !feed.dims) {
      throw new InputError(`input '${input.name}' must be {data, dims} or an ort.Tensor`);
    }
    checkType(input, feed);
    checkShape(input, feed, sizes);
  }
}

function checkType({ name, dtype }, { data, type }) {
  const given = data.constructor.name;
  const fits = given === ARRAYS[dtype] || (dtype === "float16" && given === "Float16Array");
  if (!fits || (type && type !== dtype)) {
    throw new InputError(
      `input '${name}' is ${type ? `${type} in a ` : "a "}${given}, ` +
        `expected ${dtype} in a ${ARRAYS[dtype]}`,
    );
  }
}

function checkShape({ name, shape }, { data, dims }, sizes) {
  const expected = `[${shape.map((size) => size ?? "?").join(", ")}]`;
  const fits = (size, axis) => typeof shape[axis] !== "number" || shape[axis] === size;
  if (dims.length !== shape.length || !dims.every(fits)) {
    throw new InputError(`input '${name}' has the shape [${dims.join(", ")}], expected ${expected}`);
  }
  const count = dims.reduce((product, size) => product * size, 1);
  if (data.length !== count) {
    throw new InputError(
      `input '${name}' has ${data.length} values, its shape [${dims.join(", ")}] needs ${count}`,
    );
  }
  shape.forEach((wanted, axis) => {
    if (typeof wanted !== "string") return;
    const [first, where] = sizes.get(wanted) ?? [dims[axis], name];
    sizes.set(wanted, [first, where]);
    if (first !== dims[axis]) {
      throw new InputError(
        `input '${name}' has ${wanted} = ${dims[axis]}, input '${where}' has ` +
          `${wanted} = ${first}; they must be equal`,
      );
    }
  });
}

function entry(bytes, manifest, name) {
  return slice(
    bytes,
    manifest.entries.find((item) => item.name === name),
  );
}

function slice(bytes, { offset, size }) {
  return bytes.subarray(offset, offset + size);
}

function altered(name) {
  return new BundleError(`the entry '${name}' is altered: its checksum differs`);
}

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new EdgecError("digests cannot be checked without WebCrypto: serve the page by https");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

function lineOf(error) {
  return String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 500);
}
