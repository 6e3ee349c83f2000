/**
 * Text to tokens and back: the bundle's tokenizer and its chat template.
 *
 * Tokenizers are read by the package @huggingface/tokenizers, chat templates by
 * @huggingface/jinja: the page imports their classes and hands them over. `Pieces` turns tokens
 * into text as they come: a piece is given away when its characters are complete and it cannot be
 * the start of a stop string. All pieces joined are the whole text.
 */

import { BundleError, EdgecError, InputError } from "./edgec.mjs";

const INCOMPLETE = "\uFFFD"; // what a decoder gives for half a character
const OPTIONS = { skip_special_tokens: true, clean_up_tokenization_spaces: false };

/** Tokenizer and chat template of a bundle. */
export class Text {
  /**
   * libraries: {Tokenizer, Template}; Template is for chats alone. tokenizer: JSON text.
   * template: jinja text, or null. specials: names that a template may use, and their text.
   * Throws BundleError if one of them cannot be read, EdgecError without a Tokenizer.
   */
  constructor({ Tokenizer, Template }, tokenizer, template, specials) {
    if (!Tokenizer) {
      throw new EdgecError(
        "a language model needs its tokenizer: import { Tokenizer } from " +
          '"@huggingface/tokenizers" and give it to loadLanguageModel',
      );
    }
    this.specials = specials;
    this.chats = template !== null;
    try {
      this.tokenizer = new Tokenizer(JSON.parse(tokenizer), {});
      this.template = template !== null && Template ? new Template(template) : null;
    } catch (error) {
      throw new BundleError(`tokenizer or chat template cannot be read: ${error.message}`);
    }
  }

  /** The tokens of a text, with those that the tokenizer adds to it (such as bos). */
  encode(text) {
    return this.tokenizer.encode(text).ids;
  }

  /** The tokens of a conversation, up to where the model's answer starts. */
  encodeChat(messages) {
    return this.tokenizer.encode(this.renderChat(messages), { add_special_tokens: false }).ids;
  }

  /** The text of tokens, without the special ones. */
  decode(tokens) {
    return tokens.length ? this.tokenizer.decode(tokens, OPTIONS) : "";
  }

  /** The token that `decode` leaves out and whose text this is; undefined if there is none. */
  specialToken(text) {
    const token = this.tokenizer.token_to_id(text);
    return this.tokenizer.get_added_tokens_decoder().get(token)?.special ? token : undefined;
  }

  /**
   * The text of a conversation, up to where the model's answer starts.
   *
   * messages: [{role, content}]. Throws InputError for others, or if the template refuses them.
   */
  renderChat(messages) {
    if (!this.chats) throw new InputError("the bundle has no chat template; give a text");
    if (!this.template) {
      throw new EdgecError(
        'a chat needs the bundle\'s template: import { Template } from "@huggingface/jinja" and ' +
          "give it to loadLanguageModel",
      );
    }
    messages.forEach(({ role, content }, i) => {
      if (typeof role !== "string" || content === undefined) {
        throw new InputError(`message ${i} has no role or no content`);
      }
    });
    try {
      const names = { messages, tools: null, documents: null, add_generation_prompt: true };
      return this.template.render({ ...names, ...this.specials });
    } catch (error) {
      throw new InputError(`the chat template refuses these messages: ${error.message}`);
    }
  }
}

/** The text of one answer while it grows. */
export class Pieces {
  #context = 0;
  #given = 0; // tokens from context to given have been turned into text
  #held = "";
  #tokens = [];

  /** decode: tokens to text. stops: strings that end the answer and are no part of it. */
  constructor(decode, stops) {
    this.decode = decode;
    this.stops = stops;
    this.stopped = false;
  }

  /** The text that is certain after one more token; often empty. */
  push(token) {
    this.#tokens.push(token);
    const text = this.#newText();
    return text.endsWith(INCOMPLETE) ? "" : this.#release(text);
  }

  /** The rest of the text, once there are no more tokens. */
  end() {
    if (this.stopped) return "";
    const rest = this.#release(this.#newText());
    if (this.stopped) return rest;
    const held = this.#held;
    this.#held = "";
    return rest + held;
  }

  /** The text behind what was given. Decoded with the tokens before it: they may join. */
  #newText() {
    const before = this.decode(this.#tokens.slice(this.#context, this.#given));
    return this.decode(this.#tokens.slice(this.#context)).slice(before.length);
  }

  #release(text) {
    if (text) {
      this.#context = this.#given;
      this.#given = this.#tokens.length;
    }
    this.#held += text;
    const places = this.stops.map((stop) => this.#held.indexOf(stop)).filter((at) => at >= 0);
    if (places.length) {
      this.stopped = true;
      return this.#held.slice(0, Math.min(...places));
    }
    const kept = Math.max(0, ...this.stops.map((stop) => startOf(stop, this.#held)));
    const ready = this.#held.length - kept;
    const given = this.#held.slice(0, ready);
    this.#held = this.#held.slice(ready);
    return given;
  }
}

/** Length of the longest beginning of a stop string that the text ends with. */
function startOf(stop, text) {
  for (let length = Math.min(stop.length - 1, text.length); length > 0; length--) {
    if (text.endsWith(stop.slice(0, length))) return length;
  }
  return 0;
}
