const settings = JSON.parse($("settings").textContent);
const { photos, methods, figures, classes } = settings;
const CARDS = 60; // added at a time
const CYCLE = ["#2663be", "#c2571a", "#2f8f4e", "#8a4fc4", "#b3354c", "#1c8d94", "#8b6b1f", "#c9479b", "#5b6b7a", "#6f9a1d", "#3f51b5", "#a1887f"];
const tables = Object.fromEntries(Object.entries(settings.colours).map(([name, both]) => [name, both.map(bytesOf)]));
const title = (name) => settings.titles[name]?.title ?? name.replaceAll("_", " ");
const named = (index) => classes[index] ?? `class ${index}`;
// For recordings and texts, the words that people read name these instead of photos, and words instead of pixels.
const nouns = settings.kind === "photo" ? {} : { photo: settings.kind, image: settings.kind, Photo: settings.kind[0].toUpperCase() + settings.kind.slice(1), ...(settings.kind === "text" && { pixel: "word", Pixel: "Word" }) };
const worded = (text) => Object.entries(nouns).reduce((found, [from, to]) => found.replaceAll(from, to), text);

function options(select, listed, chosen) {
  select.replaceChildren(...listed.map(([value, text]) => make("option", { value, text })));
  if (listed.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

// ---- maps: from base64 to numbers, to values on a picture, to colours ----

function unpacked(packed) {
  packed.values ??= (() => {
    const bytes = bytesOf(packed.data);
    const view = new DataView(bytes.buffer);
    const step = (packed.high - packed.low) / 65535;
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => packed.low + step * view.getUint16(2 * i, true));
  })();
  const [h, w] = packed.shape.slice(-2);
  return { h, w, values: packed.values };
}

const part = (map, index) => ({ h: map.h, w: map.w, values: map.values.subarray(index * map.h * map.w, (index + 1) * map.h * map.w) });

// Bilinear, with half-pixel centres.
function resized(map, h, w) {
  const out = new Float32Array(h * w);
  const places = (size, count) => Array.from({ length: count }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * size) / count - 0.5, 0), size - 1);
    return [Math.floor(at), Math.min(Math.floor(at) + 1, size - 1), at - Math.floor(at)];
  });
  const rows = places(map.h, h), columns = places(map.w, w);
  for (let y = 0; y < h; y++)
    for (let x = 0; x < w; x++) {
      const [a, b, t] = rows[y], [c, d, u] = columns[x];
      const above = map.values[a * map.w + c] * (1 - u) + map.values[a * map.w + d] * u;
      const below = map.values[b * map.w + c] * (1 - u) + map.values[b * map.w + d] * u;
      out[y * w + x] = above * (1 - t) + below * t;
    }
  return { h, w, values: out };
}

// Values in [0, 1], or in [-1, 1] where some are negative or the method has negative values in other photos, as `shade` of
// tokentm_jax/cli/figure.py: few extreme values do not hide the rest of a signed map. `range` is that of several maps that
// are compared.
function shaded(map, range, method) {
  const [low, high] = range ?? [map.values.reduce((a, b) => Math.min(a, b)), map.values.reduce((a, b) => Math.max(a, b))];
  const signed = low < 0 || settings.signed.includes(method), spread = high - low || 1, largest = Math.max(-low, high);
  const most = (signed && !range && percentile(map.values.map(Math.abs), 0.995)) || largest || 1;
  const shade = signed ? (value) => Math.min(Math.max(value / most, -1), 1) : (value) => Math.min(Math.max((value - low) / spread, 0), 1);
  return { ...map, values: map.values.map(shade), signed };
}

function paint(canvas, shade, opacity) {
  const colours = tables[$("colours").value][shade.signed ? 1 : 0];
  const picture = new ImageData(shade.w, shade.h);
  shade.values.forEach((value, i) => {
    const [place, weight] = opacity === null ? [Math.round(255 * (shade.signed ? (value + 1) / 2 : value)), 1] : covering(value, shade.signed);
    picture.data.set([...colours.slice(3 * place, 3 * place + 3), 255 * weight * (opacity ?? 1)], 4 * i);
  });
  put(canvas, picture);
}

const overlay = (canvas, map, range, method) => paint(canvas, shaded(resized(map, 96, Math.round((96 * map.w) / map.h)), range, method), $("opacity").value / 100);

const tableOf = (signed) => tables[$("colours").value][signed ? 1 : 0];

function passage(parts, scores, signed) {
  const pieces = parts.map(([text, word]) => [text, word === null ? null : scores[word]]);
  return make("p", { class: "passage", dir: "auto" }, ...wordsOf(pieces, tableOf(signed), signed, $("opacity").value / 100));
}

// The colour scales of maps, signed or not, and what their colours mean.
function scales(place, kinds, what, ends = null) {
  const line = (signed) => {
    const ofText = settings.kind === "text", canvas = make("canvas", { class: "ramp", "aria-hidden": "true" });
    put(canvas, ramp(tableOf(signed), signed, ofText, $("opacity").value / 100));
    const [low, high] = ends ?? (signed ? ["against", "for"] : ["low", "high"]);
    const means = ends ? [what] : meaning(tableOf(signed), signed, ` for ${what}`, ofText);
    return make("p", { class: "scale" }, low, canvas, high, make("span", {}, ...means));
  };
  place.replaceChildren(...[false, true].filter((signed) => kinds.has(signed)).map(line));
}

const kindsOf = (names) => new Set(names.map((name) => settings.signed.includes(name)));

const read = new Map();
function detailsOf(index) {
  if (!photos[index].details) return null;
  if (!read.has(index)) {
    if (read.size > 200) read.delete(read.keys().next().value); // thousands need not stay
    read.set(index, JSON.parse($(`details-${index}`).textContent));
  }
  return read.get(index);
}

function packedOf(details, method, klass) {
  const own = details.maps[method];
  return own && (own[klass] ?? own.every ?? Object.values(own)[0]);
}

function mapOf(details, method, klass) {
  const own = packedOf(details, method, klass);
  return own && unpacked(own);
}

// ---- pictures of numbers ----

const svg = (tag, facts, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(facts)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
function ticks(low, high) {
  const rough = (high - low) / 5 || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999), found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}
const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 1 || value === 0 ? String(+value.toFixed(2)) : Math.abs(value) >= 0.001 ? value.toPrecision(2) : value.toExponential(1));

// Curves {name, x, y, colour, dashed} in one picture; `at` is told which x is under the cursor.
function chart(curves, { label, xLabel, yLabel, mark = null, at = null, zero = true }) {
  const W = 430, H = 250, left = 54, right = 10, top = 12, bottom = 36;
  const xs = curves.flatMap((curve) => curve.x), ys = curves.flatMap((curve) => curve.y);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), y1 = Math.max(...ys), y0 = zero ? Math.min(0, ...ys) : Math.min(...ys);
  const px = (x) => left + ((W - left - right) * (x - x0)) / (x1 - x0 || 1);
  const py = (y) => H - bottom - ((H - top - bottom) * (y - y0)) / (y1 - y0 || 1);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
  for (const y of ticks(y0, y1))
    picture.append(svg("line", { class: "axis", x1: left, x2: W - right, y1: py(y), y2: py(y) }),
      svg("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  for (const x of ticks(x0, x1)) picture.append(svg("text", { x: px(x), y: H - bottom + 15, "text-anchor": "middle" }, short(x)));
  picture.append(svg("text", { x: (left + W - right) / 2, y: H - 5, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 11, y: (H - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${(H - bottom) / 2})` }, yLabel));
  for (const curve of curves)
    picture.append(svg("polyline", { class: "line", stroke: curve.colour, "stroke-dasharray": curve.dashed ? "5 4" : "none",
      points: curve.x.map((x, i) => `${px(x)},${py(curve.y[i])}`).join(" ") }, svg("title", {}, title(curve.name))));
  if (mark !== null) picture.append(svg("line", { x1: px(mark), x2: px(mark), y1: top, y2: H - bottom, stroke: "currentColor", "stroke-dasharray": "2 3" }));
  if (at) picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    at(x0 + ((((event.clientX - box.left) / box.width) * W - left) / (W - left - right)) * (x1 - x0));
  });
  return picture;
}

// ---- the run's table and curves ----

const rowColour = (name) => (name === "random" ? "#888888" : CYCLE[figures.rows.filter((row) => row !== "random").indexOf(name) % CYCLE.length]);
let sorted = null; // {metric, down}

function showTable() {
  const cells = new Map(figures.cells.map((cell) => [`${cell.method} ${cell.metric}`, cell]));
  const columns = Object.entries(figures.columns);
  const best = {};
  for (const [metric, { better }] of columns) {
    const found = figures.rows.map((row) => cells.get(`${row} ${metric}`)?.value).filter((value) => value !== undefined);
    if (better && found.length) best[metric] = better === "higher" ? Math.max(...found) : Math.min(...found);
  }
  const rows = [...figures.rows];
  if (sorted) rows.sort((a, b) => (sorted.down ? -1 : 1) * ((cells.get(`${a} ${sorted.metric}`)?.value ?? 0) - (cells.get(`${b} ${sorted.metric}`)?.value ?? 0)));
  const heads = columns.map(([metric, { better }]) => {
    const arrow = better === "higher" ? " ↑" : better === "lower" ? " ↓" : "";
    const button = make("button", { type: "button", text: title(metric) + arrow });
    button.addEventListener("click", () => {
      sorted = { metric, down: sorted?.metric === metric ? !sorted.down : better === "higher" };
      showTable();
      [...$("figures").querySelectorAll("thead button")].find((other) => other.textContent === button.textContent).focus();
    });
    const state = sorted?.metric === metric ? (sorted.down ? "descending" : "ascending") : "none";
    return make("th", { scope: "col", "aria-sort": state }, button);
  });
  const lines = rows.map((row) => make("tr", {}, make("th", { scope: "row", text: title(row), title: row }), ...columns.map(([metric, { digits }]) => {
    const cell = cells.get(`${row} ${metric}`);
    if (!cell) return make("td");
    const value = make(cell.value === best[metric] ? "strong" : "span", { text: cell.value.toFixed(digits) });
    return make("td", {}, value, make("small", { text: ` [${cell.low.toFixed(digits)}, ${cell.high.toFixed(digits)}]` }));
  })));
  const clean = figures.cells.find((cell) => cell.method === "clean");
  $("clean").hidden = !clean;
  if (clean) $("clean").textContent = `Clean accuracy: ${clean.value.toFixed(2)} % [${clean.low.toFixed(2)}, ${clean.high.toFixed(2)}]`;
  $("figures").replaceChildren(make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "method" }), ...heads)), make("tbody", {}, ...lines));
}

function showCurves() {
  $("curves").hidden = !figures.curves.length;
  const off = new Set([...$("legend").querySelectorAll("input:not(:checked)")].map((box) => box.value));
  $("panels").replaceChildren(...figures.curves.map((panel) => {
    const shown = Object.entries(panel.rows).filter(([name]) => !off.has(name));
    const curves = shown.map(([name, [x, y]]) => ({ name, x, y, colour: rowColour(name), dashed: name === "random" }));
    const says = make("figcaption", { text: panel.title });
    const at = (x) => {
      const nearest = (curve) => curve.x.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(curve.x[best] - x) ? i : best), 0);
      const near = curves[0].x[nearest(curves[0])];
      const values = curves.map((curve) => ({ name: curve.name, y: curve.y[nearest(curve)] })).sort((a, b) => b.y - a.y);
      says.textContent = `${panel.title}, at ${short(near)}: ${values.map(({ name, y }) => `${title(name)} ${short(y)}`).join(", ")}`;
    };
    const picture = curves.length ? chart(curves, { label: `Curves: ${panel.title}`, xLabel: worded(panel.x), yLabel: panel.y, at }) : "";
    return make("figure", {}, picture, says);
  }));
}

function startFigures() {
  if (!figures) return;
  showTable();
  $("legend").replaceChildren(...figures.rows.map((name) => {
    const box = make("input", { type: "checkbox", value: name, checked: true });
    box.addEventListener("change", showCurves);
    return make("label", {}, box, swatchOf(rowColour(name)), title(name));
  }));
  showCurves();
}

// ---- the gallery ----

let chosen = []; // places of the photos that are shown, in order
let drawn = 0;
const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (entry.isIntersecting) { seen.unobserve(entry.target); paintCard(entry.target); }
}), { rootMargin: "300px" });
const more = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) addCards(); }, { rootMargin: "600px" });

const resultOf = (photo) => photo.results?.[$("method").value]?.[$("metric").value];

function paintCard(card) {
  const index = Number(card.dataset.photo), canvas = card.querySelector("canvas"), details = detailsOf(index);
  const map = canvas && details && mapOf(details, $("method").value, details.classes[0]);
  if (map) overlay(canvas, map, undefined, $("method").value);
  else if (canvas) canvas.width = canvas.height = 1;
}

function facts(photo) {
  const said = photo.predicted === undefined ? "" : named(photo.predicted) + (photo.probability === undefined ? "" : ` ${percent(photo.probability)}`);
  const wrong = photo.label >= 0 && photo.label !== photo.predicted;
  const lines = [make("span", { class: wrong ? "fact wrong" : "fact", text: wrong ? `${said}; it is ${named(photo.label)}` : said })];
  const result = resultOf(photo);
  if (result !== undefined) lines.push(make("span", { class: "fact", text: `${title($("metric").value)} ${short(result)}` }));
  return lines;
}

function card(index) {
  const photo = photos[index];
  const picture = photo.text ? "" : photo.thumb ? make("span", { class: "stack" }, make("img", { src: photo.thumb, alt: "", loading: "lazy" }), make("canvas", { "aria-hidden": "true" })) : make("span", { class: "nothing" });
  if (picture) picture.style.display = "block";
  const button = make("button", { type: "button", "data-photo": String(index) }, picture, make("span", { class: "name", text: photo.text ?? photo.name.replace(/^.*[\\/]/, "") }), ...facts(photo));
  if (photo.details) {
    button.addEventListener("click", () => open(index));
    seen.observe(button);
  } else button.setAttribute("aria-disabled", "true");
  return make("li", {}, button);
}

function addCards() {
  const next = chosen.slice(drawn, drawn + CARDS);
  drawn += next.length;
  $("gallery").append(...next.map(card));
  more.unobserve($("more"));
  if (drawn < chosen.length) more.observe($("more"));
}

function showGallery() {
  const klass = $("of-class").value, right = $("right").value, word = $("search").value.toLowerCase(), order = $("order").value;
  chosen = [...photos.keys()].filter((i) => {
    const photo = photos[i];
    const is = photo.label < 0 || photo.label === undefined ? null : photo.label === photo.predicted;
    return (!klass || String(photo.label) === klass || String(photo.predicted) === klass) && (!right || is === (right === "right"))
      && `${photo.name} ${photo.text ?? ""}`.toLowerCase().includes(word) && (!$("only").checked || photo.details);
  });
  if (order) {
    const down = (figures.columns[$("metric").value].better === "lower") !== (order === "best") ? -1 : 1;
    const known = (i) => resultOf(photos[i]);
    chosen = chosen.filter((i) => known(i) !== undefined).sort((a, b) => down * (known(a) - known(b)));
  }
  $("count").textContent = worded(`${chosen.length} of ${photos.length} photos`);
  drawn = 0;
  $("gallery").replaceChildren();
  showScale();
  addCards();
}

// The scale of the gallery's maps, as the first of them have it.
function showScale() {
  const name = $("method").value, first = explained().slice(0, 8).map(detailsOf);
  const shown = first.some((details) => packedOf(details, name, details.classes[0]));
  scales($("gallery-scales"), kindsOf(shown ? [name] : []), "the predicted class");
}

// ---- one photo ----

let current = null; // {index, details}

const explained = () => chosen.filter((i) => photos[i].details);

function open(index) {
  const details = detailsOf(index), photo = photos[index];
  current = { index, details };
  $("photo-name").textContent = photo.name;
  const wrong = photo.label >= 0 && photo.label !== photo.predicted ? ` The data set says ${named(photo.label)}.` : "";
  $("said").textContent = `The model's answer.${wrong}`;
  $("top").replaceChildren(...details.probabilities.map(([klass, share]) => make("li", { text: share === null ? named(klass) : `${named(klass)} ${percent(share)}` })));
  options($("class"), details.classes.map((klass) => [klass, named(klass)]), details.classes[0]); // each photo's own first
  options($("curve-method"), methods.filter((name) => details.curves[name]).map((name) => [name, title(name)]), $("curve-method").value || $("method").value);
  $("curve-section").hidden = !Object.keys(details.curves).length;
  const blocks = Object.values(details.blocks)[0];
  $("block-section").hidden = !blocks;
  if (blocks) {
    options($("quantity"), Object.keys(blocks).map((name) => [name, name]), $("quantity").value);
    $("block").max = blocks.contribution.shape[0];
    if (!$("photo").open) $("block").value = $("block").max;
  }
  const there = explained();
  $("previous").disabled = there[0] === index;
  $("next").disabled = there.at(-1) === index;
  showPhoto();
  if (!$("photo").open) $("photo").showModal();
  $("photo").scrollTop = 0;
  $("photo-name").focus();
}

function step(by) {
  const there = explained();
  const next = there[there.indexOf(current.index) + by];
  if (next !== undefined) open(next);
}

const pictureOf = () => current.details.picture ?? photos[current.index].thumb;

function showPhoto() {
  const { details } = current, klass = $("class").value, probability = details.probability[klass];
  const predicted = details.probabilities[0][0] === Number(klass);
  $("caution").textContent = cautionOf(named(klass), probability, predicted, "The maps show");
  scales($("map-scales"), kindsOf(methods.filter((name) => packedOf(details, name, klass))), `“${named(klass)}”`);
  $("maps").replaceChildren(
    ...(pictureOf() ? [make("figure", {}, make("div", { class: "stack" }, make("img", { src: pictureOf(), alt: `What the model receives of ${photos[current.index].name}` })), make("figcaption", { text: "What the model receives" }))] : []),
    ...methods.filter((name) => details.maps[name]).map((name) => {
      if (details.parts) {
        const scores = mapOf(details, name, klass).values, note = settings.titles[name]?.note ?? name;
        return make("figure", {}, make("figcaption", { text: title(name), title: note }), passage(details.parts, scores, settings.signed.includes(name)));
      }
      const canvas = make("canvas", { role: "img", "aria-label": `${title(name)} for ${named(klass)}` });
      overlay(canvas, mapOf(details, name, klass), undefined, name);
      const same = details.maps[name].every ? ", the same for every class" : "";
      const below = pictureOf() ? [make("img", { src: pictureOf(), alt: "" })] : [];
      const stack = make("div", { class: "stack" }, ...below, canvas);
      if (!below.length) canvas.style.position = "static";
      return make("figure", {}, stack, make("figcaption", { text: title(name) + same, title: settings.titles[name]?.note ?? name }));
    }));
  showCurve();
  showBlocks();
}

function showCurve() {
  $("share-value").textContent = `${$("share").value} %`;
  if ($("curve-section").hidden) return;
  const { details } = current, klass = $("class").value, method = $("curve-method").value;
  const found = details.curves[method]?.[klass];
  if (!found) return $("curve").replaceChildren();
  const x = Array.from({ length: 10 }, (_, i) => 10 * i), whole = details.probability[klass];
  const curves = [["the most relevant first", "#c0392b"], ["the least relevant first", "#2c7fb8"]]
    .map(([name, colour], way) => ({ name, colour, x, y: [whole, ...found[way]] }));
  const share = Number($("share").value), way = Number($("direction").value);
  const at = (value) => {
    $("share").value = Math.min(Math.max(10 * Math.round(value / 10), 0), 90);
    showCurve();
  };
  const legend = make("p", { class: "note" }, ...curves.flatMap((curve) => [swatchOf(curve.colour), ` ${curve.name}  `]));
  if (details.pixels.includes(method))
    legend.append(make("br"), "A map of pixels: removing scattered pixels harms a model more than removing patches, whichever they are. Do not compare this curve with that of a map of patches.");
  $("curve").replaceChildren(chart(curves, { label: worded(`Probability of ${named(klass)} as pixels are removed, by ${title(method)}`), xLabel: worded("pixels removed [%]"), yLabel: "probability", mark: share, at }), legend);
  $("masked").closest("figure").hidden = Boolean(details.parts);
  if (details.parts) return;
  const [h, w] = details.size, canvas = $("masked");
  const values = resized(mapOf(details, method, klass), h, w).values;
  const order = [...values.keys()].sort((a, b) => values[b] - values[a] || a - b);
  const count = Math.floor((share * values.length) / 100);
  const picture = new ImageData(w, h);
  for (const place of way ? order.slice(values.length - count) : order.slice(0, count)) picture.data[4 * place + 3] = 255;
  canvas.className = "crisp";
  put(canvas, picture);
  if (pictureOf()) $("masked-photo").src = pictureOf();
  const says = `${share} % of the pixels are black: ${named(klass)} ${percent(curves[way].y[share / 10])}`;
  canvas.setAttribute("aria-label", says);
  $("masked-says").textContent = says;
}

const NOTES = {
  contribution: "TokenTM's heatmap when the blocks up to this one are aggregated. Each block has its own range of colours.",
  length: "Ratio of the token's length after the layer and before. One range for all blocks.",
  necc: "Normalised exponential cosine correlation: above 1, a token keeps its direction more than the mean one does.",
  weight: "The transformation weight: ratio of lengths times NECC. One range for all blocks.",
};

const percentile = (values, share) => values.slice().sort()[Math.floor(share * (values.length - 1))]; // of a typed array

function showBlocks() {
  if ($("block-section").hidden) return;
  const { details } = current, klass = $("class").value, quantity = $("quantity").value;
  const own = details.blocks[klass] ?? Object.values(details.blocks)[0];
  const map = unpacked(own[quantity]), depth = own[quantity].shape[0], block = Number($("block").value);
  const kind = quantity.split(": ").at(-1);
  const range = kind === "contribution" ? null : [percentile(map.values, 0.01), percentile(map.values, 0.99)];
  $("block-value").textContent = `${block} of ${depth}`;
  $("quantity-note").textContent = NOTES[kind];
  $("strip").replaceChildren(...Array.from({ length: depth }, (_, i) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    paint(canvas, shaded(resized(part(map, i), 64, Math.round((64 * map.w) / map.h)), range), null);
    const button = make("button", { type: "button", "aria-pressed": String(i + 1 === block), "aria-label": `Block ${i + 1}` }, canvas, String(i + 1));
    button.addEventListener("click", () => {
      $("block").value = i + 1;
      showBlocks();
      $("strip").children[i].focus();
    });
    return button;
  }));
  if (pictureOf()) $("block-photo").src = pictureOf();
  overlay($("block-map"), part(map, block - 1), range);
  const signed = (range ? range[0] : Math.min(...part(map, block - 1).values)) < 0;
  const most = range && Math.max(-range[0], range[1]);
  scales($("block-scales"), new Set([signed]), range ? quantity : `“${named(klass)}”`, range && (signed ? [-most, most] : range).map(short));
  const says = `${quantity}, block ${block}, for ${named(klass)}`;
  $("block-map").setAttribute("aria-label", says);
  $("block-says").textContent = says;
  const x = Array.from({ length: depth }, (_, i) => i + 1);
  $("charts").replaceChildren(...["length", "necc", "weight"].map((name) => {
    const curves = [["attention", "#c2571a"], ["FFN", "#2663be"]].map(([layer, colour]) => {
      const all = unpacked(own[`${layer}: ${name}`]);
      return { name: layer, colour, x, y: x.map((_, i) => { const values = part(all, i).values; return values.reduce((sum, value) => sum + value, 0) / values.length; }) };
    });
    const said = { length: "ratio of lengths", necc: "NECC", weight: "weight" }[name];
    return make("details", { open: name === "length" }, make("summary", { text: `Mean ${said} by block: attention (orange), FFN (blue)` }),
      chart(curves, { label: `Mean ${said} of the patches by block`, xLabel: "block", yLabel: said, mark: block, zero: name !== "necc" }));
  }));
}

// ---- the controls ----

function restyle() {
  $("opacity-value").textContent = `${$("opacity").value} %`;
  document.documentElement.style.setProperty("--pale", (0.6 * $("opacity").value) / 100);
  showScale();
  document.querySelectorAll("#gallery button[data-photo]").forEach((card) => { if (photos[card.dataset.photo].details) seen.observe(card); });
  if ($("photo").open) showPhoto();
}

function start() {
  options($("method"), (figures ? figures.rows : methods).map((name) => [name, title(name)]), methods[0]);
  options($("colours"), Object.keys(settings.colours).map((name) => [name, name]));
  const counts = new Map();
  for (const photo of photos) for (const klass of new Set([photo.label, photo.predicted])) if (klass >= 0) counts.set(klass, (counts.get(klass) ?? 0) + 1);
  options($("of-class"), [["", "all"], ...[...counts.keys()].sort((a, b) => named(a).localeCompare(named(b))).map((klass) => [klass, `${named(klass)} (${counts.get(klass)})`])]);
  $("for-right").hidden = !photos.some((photo) => photo.label >= 0);
  const sortable = figures?.sortable ?? [];
  $("for-order").hidden = $("for-metric").hidden = !sortable.length;
  options($("order"), [...(sortable.length ? [["best", "best first"], ["worst", "worst first"]] : []), ["", "by name"]]);
  options($("metric"), sortable.map((name) => [name, title(name)]));
  const count = photos.filter((photo) => photo.details).length;
  $("for-only").hidden = count === photos.length || !count;
  $("only").checked = !$("for-only").hidden;
  document.body.classList.add(`of-${settings.kind}`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, (node) => (node.parentElement.closest("script, style") ? 2 : 1));
  while (texts.nextNode()) texts.currentNode.data = worded(texts.currentNode.data);
  for (const node of document.querySelectorAll("[aria-label*=photo]")) node.ariaLabel = worded(node.ariaLabel);
  startFigures();
  showGallery();
  restyle();
  for (const id of ["of-class", "right", "order", "metric", "only"]) $(id).addEventListener("change", showGallery);
  $("search").addEventListener("input", showGallery);
  $("method").addEventListener("change", () => { if (sortable.length) showGallery(); else restyle(); });
  for (const id of ["colours", "opacity"]) $(id).addEventListener("input", restyle);
  $("class").addEventListener("change", showPhoto);
  for (const id of ["curve-method", "direction", "share"]) $(id).addEventListener("input", showCurve);
  for (const id of ["quantity", "block"]) $(id).addEventListener("input", showBlocks);
  $("close").addEventListener("click", () => $("photo").close());
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("photo").addEventListener("keydown", (event) => {
    if (event.target.matches("input, select")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  $("photo").addEventListener("close", () => document.querySelector(`#gallery button[data-photo="${current.index}"]`)?.focus());
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

start();
