/**
 * Writes text with a language model in a browser or in Node.js, as Model.generate of
 * edgec_runtime does.
 *
 *     import * as ort from "onnxruntime-web";
 *     import { Tokenizer } from "@huggingface/tokenizers";
 *     import { Template } from "@huggingface/jinja";
 *     import { loadLanguageModel } from "./generate.mjs";
 *
 *     const model = await loadLanguageModel(ort, bytes, { Tokenizer, Template });
 *     const answer = model.generate([{ role: "user", content: "Hello" }], { max_new_tokens: 99 });
 *     for await (const piece of answer) page.append(piece);
 *     console.log(answer.tokens, answer.reason);
 *
 * Greedy answers are those of edgec_runtime on the same bundle, token by token, where both engines
 * compute the same numbers: in float32 always but for ties, in integers nearly so.
 *
 * Options have the names of edgec_runtime's. The cache is handed from run to run. onnxruntime-web
 * copies it into WebAssembly's memory and out of it each time, also one that other engines write
 * in place.
 *
 * Left out on purpose: batches, models with an encoder, beams.
 */

import { EdgecError, InputError, load } from "./edgec.mjs";
import { choose, settingsOf } from "./sampling.mjs";
import { Pieces, Text } from "./text.mjs";

const ARRAYS = {
  float16: Uint16Array,
  float32: Float32Array,
  int32: Int32Array,
  int64: BigInt64Array,
};

/**
 * Opens the bundle of a language model.
 *
 * ort, source and options: as of `load`; and Tokenizer and Template, the classes of
 * @huggingface/tokenizers and @huggingface/jinja. Token ids need neither.
 * Throws what `load` throws, and InputError if the bundle is no language model.
 */
export async function loadLanguageModel(ort, source, options = {}) {
  const { Tokenizer, Template, ...others } = options;
  const bytes = source instanceof Uint8Array ? source : new Uint8Array(await bufferOf(source));
  const model = await load(ort, bytes, others);
  const { generation, entries, name } = model.manifest;
  if (!generation) throw new InputError(`'${name}' is no language model; open it with load()`);
  if (generation.encoder) {
    throw new InputError(`'${name}' has an encoder, which generate.mjs does not run`);
  }
  const textOf = (file) => {
    if (file === null) return null;
    const { offset, size } = entries.find((entry) => entry.name === file);
    return new TextDecoder().decode(bytes.subarray(offset, offset + size));
  };
  let text = null;
  if (generation.tokenizer !== null && (Tokenizer || Template)) {
    const { tokenizer, chat_template: template, special_tokens: specials } = generation;
    text = new Text({ Tokenizer, Template }, textOf(tokenizer), textOf(template), specials);
  }
  return new LanguageModel(model, text);
}

/** A loaded language model; `loadLanguageModel` makes one. */
export class LanguageModel {
  #past = null; // what the last answer read and wrote: {tokens, tensors}

  /** model: the loaded Model. text: a Text, or null if the caller gives and takes token ids. */
  constructor(model, text) {
    this.model = model;
    this.text = text;
  }

  get manifest() {
    return this.model.manifest;
  }

  /**
   * The answer to a prompt, to be read with `for await`; breaking off ends it.
   *
   * prompt: a text, messages [{role, content}], or token ids. options: max_new_tokens, stop (texts
   * that end the answer), temperature, top_k, top_p, min_p, repetition_penalty (those left out are
   * what the bundle recommends), random (numbers from 0 to 1 for draws; Math.random).
   * What this model has read of the same conversation is not read again.
   * Throws InputError for a wrong option, and for a prompt that is empty or too long.
   */
  generate(prompt, options = {}) {
    const { max_new_tokens: asked, stop = [], random = Math.random, ...given } = options;
    const { generation } = this.manifest;
    const settings = settingsOf(generation.sampling, given);
    const tokens = this.#encode(prompt);
    const limit = this.#limit(tokens, asked);
    if ([stop].flat().some((one) => typeof one !== "string" || !one)) {
      throw new InputError(`stop is '${stop}', expected texts that are not empty`);
    }
    if ([stop].flat().length && !this.text) {
      throw new InputError("stop needs the tokenizer: give Tokenizer to loadLanguageModel");
    }
    const next = (logits, seen) => choose(logits, seen, settings, random);
    return new Answer((answer) => this.#write(answer, tokens, limit, next, [stop].flat()));
  }

  /** Gives back the memory. */
  async release() {
    this.#past = null;
    await this.model.release();
  }

  async *#write(answer, prompt, limit, next, stops) {
    const { text, manifest } = this;
    const pieces = text && new Pieces((tokens) => text.decode(tokens), stops);
    const specials = stops.map((stop) => text.specialToken(stop));
    const seen = [...prompt];
    const past = this.#take(seen);
    try {
      while (answer.tokens.length < limit) {
        const token = next(await this.#read(seen, past), seen);
        if (manifest.generation.eos.includes(token)) answer.reason = "eos";
        else if (specials.includes(token)) answer.reason = "stop";
        if (answer.reason) break;
        answer.tokens.push(token);
        seen.push(token);
        const piece = pieces?.push(token) ?? "";
        if (pieces?.stopped) answer.reason = "stop";
        yield piece;
        if (answer.reason) return;
      }
      answer.reason ??= "length";
      const rest = pieces?.end() ?? "";
      if (pieces?.stopped) answer.reason = "stop";
      if (rest) yield rest;
    } finally {
      this.#past = past;
    }
  }

  /** The scores behind the last token; runs the graph on those that the cache lacks. */
  async #read(tokens, past) {
    let scores;
    while (past.tokens.length < tokens.length) {
      const first = past.tokens.length;
      const some = tokens.slice(first, first + this.manifest.generation.prompt_chunk);
      scores = await this.#run(some, past);
      past.tokens.push(...some);
    }
    return scores;
  }

  #encode(prompt) {
    let tokens = prompt;
    if (typeof prompt === "string" || typeof prompt?.[0] === "object") {
      if (!this.text) {
        throw new InputError(
          "a text needs the bundle's tokenizer and the class Tokenizer; give token ids otherwise",
        );
      }
      tokens = typeof prompt === "string" ? this.text.encode(prompt) : this.text.encodeChat(prompt);
    }
    const list = Array.isArray(tokens) ? tokens : Array.from(tokens ?? []);
    const size = this.model.outputs.find(({ name }) => name === this.manifest.generation.logits)
      .shape[2];
    const count = typeof size === "number" ? size : 2 ** 31;
    if (!list.length) throw new InputError("the prompt is empty; give at least one token");
    const wrong = list.find((token) => !Number.isInteger(token) || token < 0 || token >= count);
    if (wrong !== undefined) {
      throw new InputError(`the prompt has the token ${wrong}, expected 0 to ${count - 1}`);
    }
    return list;
  }

  #limit(tokens, asked) {
    if (asked !== undefined && (!Number.isInteger(asked) || asked < 1)) {
      throw new InputError(`max_new_tokens is ${asked}, expected a whole number from 1 up`);
    }
    const capacities = this.#pasts().map(({ shape }) => shape[2]);
    const numbers = capacities.filter((size) => typeof size === "number");
    const room = Math.min(this.manifest.generation.context_length, ...numbers);
    if (tokens.length + (asked ?? 1) > room) {
      throw new InputError(
        `the prompt has ${tokens.length} tokens${asked ? `, max_new_tokens is ${asked}` : ""}; ` +
          `the model has room for ${room} together: shorten the prompt`,
      );
    }
    return asked ?? room - tokens.length;
  }

  #pasts() {
    const { pairs } = this.manifest.generation;
    return pairs.map(({ past }) => this.model.inputs.find(({ name }) => name === past));
  }

  /** The cache of the longest known beginning of the tokens, one token less at least. */
  #take(tokens) {
    const held = this.#past;
    this.#past = null; // a second answer at the same time reads everything
    const most = Math.min(held?.tokens.length ?? 0, tokens.length - 1);
    let common = 0;
    while (common < most && held.tokens[common] === tokens[common]) common++;
    if (!common) return { tokens: [], tensors: this.#empty() };
    if (common === held.tokens.length) return held;
    const tensors = held.tensors.map((tensor, i) => this.#cut(tensor, common, this.#pasts()[i]));
    return { tokens: held.tokens.slice(0, common), tensors };
  }

  #empty() {
    return this.#pasts().map(({ dtype, shape: [, heads, length, size] }) => {
      const dims = [1, heads, typeof length === "number" ? length : 0, size];
      const count = dims.reduce((product, dim) => product * dim);
      return new this.model.ort.Tensor(dtype, new ARRAYS[dtype](count), dims);
    });
  }

  /** The first tokens of a tensor [1, heads, tokens, size]; one of fixed length stays. */
  #cut({ data, dims: [, heads, length, size] }, count, { dtype, shape }) {
    if (typeof shape[2] === "number") {
      return new this.model.ort.Tensor(dtype, data, [1, heads, length, size]);
    }
    const kept = new data.constructor(heads * count * size);
    for (let head = 0; head < heads; head++) {
      const from = head * length * size;
      kept.set(data.subarray(from, from + count * size), head * count * size);
    }
    return new this.model.ort.Tensor(dtype, kept, [1, heads, count, size]);
  }

  /** One run on new tokens; the cache's tensors are replaced, its list of tokens is not. */
  async #run(tokens, past) {
    const { generation } = this.manifest;
    const before = past.tokens.length;
    const total = before + tokens.length;
    const feeds = {
      ...this.#integers(generation.ids, tokens),
      ...this.#integers(generation.mask, new Array(total).fill(1)),
      ...this.#integers(generation.positions, Array.from(tokens, (_, i) => before + i)),
    };
    generation.pairs.forEach((pair, i) => (feeds[pair.past] = past.tensors[i]));
    let outputs;
    try {
      outputs = await this.model.session.run(feeds);
    } catch (error) {
      throw new EdgecError(`the model cannot run these tokens: ${error.message}`);
    }
    past.tensors = generation.pairs.map((pair) => outputs[pair.present]);
    const { data, dims } = outputs[generation.logits];
    return data.slice((dims[1] - 1) * dims[2]);
  }

  #integers(name, values) {
    if (name === null) return {};
    const { dtype } = this.model.inputs.find((input) => input.name === name);
    const array = dtype === "int64" ? BigInt64Array.from(values, BigInt) : Int32Array.from(values);
    return { [name]: new this.model.ort.Tensor(dtype, array, [1, values.length]) };
  }
}

/**
 * An answer while it is written; `for await` gives its text in pieces, "" for none yet.
 *
 * tokens: so far, without the one that ended it. reason: why it ended: "eos", "stop" or "length";
 * null before.
 */
class Answer {
  #steps;

  constructor(write) {
    this.tokens = [];
    this.reason = null;
    this.#steps = write(this);
  }

  [Symbol.asyncIterator]() {
    return this.#steps;
  }

  /** The whole text. */
  async whole() {
    let text = "";
    for await (const piece of this) text += piece;
    return text;
  }
}

async function bufferOf(source) {
  if (source instanceof Blob) return source.arrayBuffer();
  if (source instanceof ArrayBuffer) return source;
  throw new EdgecError("a bundle must be an ArrayBuffer, a Uint8Array or a Blob");
}
