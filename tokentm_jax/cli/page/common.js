"use strict";
// What the live page, the report and the page of texts share.

const $ = (id) => document.getElementById(id);
const UNSURE = 0.05; // probability below which a page cautions
const percent = (share) => (share > 0 && share < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`);
const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

function make(tag, facts = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(facts))
    if (name === "text") node.textContent = value;
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// [place of the colour in the scale, how much of it covers the photo], as `blend` of tokentm_jax/inputs/pictures.py has
// them. Where a signed map is zero, nothing covers the photo; next to it the colours are not the scale's whites, which are fog.
function covering(value, signed) {
  if (!signed) return [Math.round(255 * value), (1 + 2 * Math.sqrt(value)) / 3];
  const outer = Math.sign(value) * (0.5 + 0.5 * Math.abs(value));
  return [Math.round(127.5 * (outer + 1)), (1.15 * value ** 2) / (value ** 2 + 0.15)];
}

// Behind a word with this share of the largest score, as `Passage` of tokentm_jax/inputs/passages.py has it.
function wordColour(table, share, signed, strongest) {
  const place = 3 * (signed ? (share < 0 ? 38 : 217) : 191);
  return [...table.slice(place, place + 3), strongest * Math.abs(share)];
}

// The pieces of a text, each with its score or null, the words on their colours.
function wordsOf(pieces, table, signed, strongest) {
  const most = Math.max(...pieces.map(([, score]) => Math.abs(score ?? 0)), 1e-30);
  return pieces.map(([text, score]) => {
    if (score === null) return text;
    const word = make("span", { text, title: score.toPrecision(3) });
    word.style.background = `rgba(${wordColour(table, score / most, signed, strongest)})`;
    return word;
  });
}

// A colour scale as one row of pixels; of texts, with the colours of words.
function ramp(table, signed, ofText, strongest) {
  const scale = new ImageData(256, 1);
  for (let i = 0; i < 256; i++) {
    const [r, g, b, share] = ofText ? wordColour(table, signed ? i / 127.5 - 1 : i / 255, signed, strongest) : [...table.slice(3 * i, 3 * i + 3), 1];
    scale.data.set([r, g, b, 255 * share], 4 * i);
  }
  return scale;
}

function put(canvas, pixels) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function swatchOf(background) {
  const node = make("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = background;
  return node;
}

// What the colours mean for `what`, in one line.
function meaning(table, signed, what, ofText) {
  if (!signed) return [`The ${ofText ? "stronger the colour" : "brighter"}, the more important${what}.`];
  const swatch = (step) => swatchOf(`rgb(${table.slice(3 * step, 3 * step + 3).join(" ")})`);
  return [swatch(225), ` speaks${what}, `, swatch(30), " against it."];
}

// A sentence where a class is improbable; `shown` is what shows what would count for it.
function cautionOf(name, probability, predicted, shown) {
  if (!(probability < UNSURE)) return "";
  return predicted
    ? `Caution: the model is unsure. Even its best class, “${name}”, has only ${percent(probability)}.`
    : `Caution: the probability of “${name}” is only ${percent(probability)}. ${shown} what would count for this class, not what the model recognises.`;
}
