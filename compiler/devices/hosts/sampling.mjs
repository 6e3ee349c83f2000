/**
 * Which token comes next: the filters of a draw, and the draw, as edgec_runtime/sampling.py has
 * them (there are the sources).
 *
 * Scores go through the filters in this order: repetition penalty, temperature, top-k, top-p,
 * min-p. A draw takes one number u from 0 to 1 and gives the first token, by id, at which the sum
 * of the probabilities exceeds u.
 */

import { EdgecError, InputError } from "./edgec.mjs";

const RANGES = {
  temperature: [(x) => x >= 0 && x < Infinity, "a number from 0 up"],
  top_k: [(x) => Number.isInteger(x) && x >= 0, "a whole number from 0 up"],
  top_p: [(x) => x > 0 && x <= 1, "a number above 0, at most 1"],
  min_p: [(x) => x >= 0 && x <= 1, "a number from 0 to 1"],
  repetition_penalty: [(x) => x > 0 && x < Infinity, "a number above 0"],
};

/**
 * The settings of the bundle with those that the caller gave; throws InputError for a wrong one.
 *
 * stated: the manifest's, by its names. given: by the same names.
 */
export function settingsOf(stated, given) {
  const settings = { ...stated };
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined) continue;
    if (!(name in RANGES)) {
      throw new InputError(`generate has no option '${name}'`);
    }
    const [fits, expected] = RANGES[name];
    if (typeof value !== "number" || !fits(value)) {
      throw new InputError(`${name} is ${value}, expected ${expected}`);
    }
    settings[name] = value;
  }
  return settings;
}

/**
 * The next token.
 *
 * logits: scores of all tokens. seen: the tokens so far. random: gives numbers from 0 to 1,
 * without 1. Throws EdgecError if the highest score is not finite.
 */
export function choose(logits, seen, settings, random) {
  const scores = Float32Array.from(logits);
  if (!Number.isFinite(highest(scores))) {
    throw new EdgecError(
      "the model gives scores that are not finite for the next token; build it in a wider " +
        "number format, or report the prompt to its maker",
    );
  }
  if (settings.repetition_penalty !== 1) penalise(scores, seen, settings.repetition_penalty);
  if (settings.temperature === 0) return scores.indexOf(highest(scores));
  const shares = probabilities(scores, settings);
  const sum = shares.reduce((total, share) => total + share, 0);
  const point = random() * sum;
  let reached = 0;
  let last = 0;
  for (let token = 0; token < shares.length; token++) {
    if (!shares[token]) continue;
    reached += shares[token];
    last = token;
    if (reached > point) break;
  }
  return last;
}

/** What a token is drawn from; 0 for tokens that a filter removed. temperature: above 0. */
function probabilities(scores, { temperature, top_k: k, top_p: p, min_p: least }) {
  const kept = scores.map((score) => score / temperature);
  if (k && k < kept.length) keep(kept, kept.toSorted()[kept.length - k]);
  if (p < 1) keep(kept, smallestOfTop(kept, p));
  if (least) {
    const shares = softmax(kept);
    const limit = Math.fround(least * highest(shares));
    shares.forEach((share, token) => {
      if (share < limit) kept[token] = -Infinity;
    });
  }
  return softmax(kept);
}

/** The smallest of the fewest highest scores whose probabilities exceed p together. */
function smallestOfTop(scores, p) {
  const ordered = scores.toSorted();
  const shares = softmax(ordered);
  let sum = 0;
  let first = 0;
  while (first < shares.length - 1 && Math.fround(sum + shares[first]) <= 1 - p) {
    sum += shares[first++];
  }
  return ordered[first];
}

function keep(scores, least) {
  scores.forEach((score, token) => {
    if (score < least) scores[token] = -Infinity;
  });
}

function penalise(scores, seen, penalty) {
  for (const token of new Set(seen)) {
    scores[token] = scores[token] < 0 ? scores[token] * penalty : scores[token] / penalty;
  }
}

function softmax(scores) {
  const top = highest(scores);
  const powers = scores.map((score) => Math.exp(score - top));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** NaN if there is one. */
function highest(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}
