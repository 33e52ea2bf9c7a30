// The page of `tokentm serve`. A photo is sent again for each class and method; colours and opacity are drawn here.
// For a model of recordings or texts, "photo" is one of these: `named` changes the words that people read.
"use strict";

const TRIES = 8; // how often a busy server is asked again
const KEPT = 100; // answers, about half a megabyte each
const LISTED = 100; // classes in the open list
const UNITS = { photo: "pixels", recording: "mel bins and frames", text: "tokens at most" };
let settings; // of the server: kind, model, classes, methods, colours, examples
const photos = []; // {name, file, path, target, button}: those of the strip; `path` is that of an example
let photo = null; // the one that is explained
let shown = null; // the last answer, its photo, and its pictures as pixels
let taken = 0; // how many photos were chosen: an example that comes late gives way
let pausing = null; // the signal of a request that waits for a busy server
let asking = null; // stops the request that is under way
const answers = new Map(); // by photo, method and class
let ready = new Set(); // methods that need no compiling

const nameOf = (path) => path.replace(/^.*\//, "").replace(/\.[^.]*$/, "");
const words = (name) => name.replaceAll("_", " ");
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");
const method = (name) => settings.methods.find((row) => row.name === name);
// A file's name without what would turn or hide the text around it.
const plain = (name) => name.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "\ufffd");

const named = (text) => text.replaceAll("photo", settings.kind).replaceAll("Photo", settings.kind[0].toUpperCase() + settings.kind.slice(1));
const complain = (text) => ($("error").textContent = named(text));

// Settings that a link carries, in the part of the address that is never sent. A class belongs to its photo.

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const pick = (select, value) => {
    if ([...select.options].some((option) => option.value === value)) select.value = value;
  };
  pick($("method"), link.get("method") || settings.methods[0].name);
  pick($("colours"), link.get("colours") || "inferno");
  const opacity = link.has("opacity") ? Number(link.get("opacity")) : NaN;
  $("opacity").value = opacity >= 0 && opacity <= 100 ? opacity : 75;
  describeSettings();
  const example = photos.find((one) => one.path && one.name === link.get("example"));
  const wanted = link.get("class") || "";
  const byName = settings.classes.indexOf(wanted);
  const known = byName >= 0 || (/^\d+$/.test(wanted) && Number(wanted) < settings.classes.length);
  const target = known ? String(byName >= 0 ? byName : Number(wanted)) : "";
  if (example) example.target = target;
  return example;
}

function writeLink() {
  const link = new URLSearchParams();
  link.set("method", $("method").value);
  if (photo?.path && photo.target) {
    const name = settings.classes[photo.target];
    link.set("class", settings.classes.indexOf(name) === Number(photo.target) ? name : photo.target);
  }
  link.set("colours", $("colours").value);
  link.set("opacity", $("opacity").value);
  if (photo?.path) link.set("example", photo.name);
  history.replaceState(null, "", `#${link}`);
}

function describeSettings() {
  const { name, sentence: what, paper, year, passes: cost, class_specific } = method($("method").value);
  $("method-note").textContent = `${what}${class_specific ? "" : " The map is the same for every class."}`;
  $("method-source").textContent = `${paper} ${year}; ${passes(cost)}; on the command line: ${name}.`;
  $("opacity-value").textContent = `${$("opacity").value} %`;
}

// "2 F + 1 B" -> "2 forward and 1 backward passes"
function passes(cost) {
  if (!/ F\b/.test(cost)) return cost;
  const several = /\b([2-9]|\d\d+|n\b.*) F|\b([2-9]|\d\d+) B/.test(cost);
  return `${cost.replace(" F", " forward").replace(" + 1 B", " and 1 B").replace(/ \+ (\d+ B)/, " and $1").replace(" B", " backward")} pass${several ? "es" : ""}`;
}

// Asking the server.

async function explain() {
  if (!photo) return;
  asking?.abort();
  const stop = (asking = new AbortController());
  const own = photo;
  const { name, title } = method($("method").value);
  const asked = { photo: own, method: name, target: own.target };
  const key = `${photos.indexOf(own)} ${name} ${own.target}`;
  $("error").textContent = "";
  showClass();
  if (answers.has(key)) return show(answers.get(key));
  document.body.classList.add("waiting");
  const began = performance.now();
  let sent = 0; // share of the upload
  const tick = () => {
    if (stop.signal.aborted || pausing === stop.signal) return;
    const seconds = Math.floor((performance.now() - began) / 1000);
    if (sent < 1) say(`Sending ${own.name} … ${Math.round(100 * sent)} %`);
    else if (ready.has(name)) say(`Explaining ${own.name} …${seconds > 1 ? ` ${seconds} s` : ""}`);
    else say(`First use of ${title} here: compiling takes about ${Math.max(1, Math.round(settings.compiling))} s … ${seconds} s`);
  };
  const progress = (share) => {
    sent = share;
    if (share < 1) $("progress").value = share;
    else $("progress").removeAttribute("value");
    tick();
  };
  progress(0);
  const clock = setInterval(tick, 1000);
  try {
    const answer = await ask(asked, stop.signal, progress);
    const pixels = answer.photo && { photo: await pixelsOf(answer.photo), shade: await pixelsOf(answer.shade) };
    ready.add(name);
    if (stop.signal.aborted) return;
    answers.set(key, { ...answer, asked, pixels, seconds: (performance.now() - began) / 1000 });
    if (answers.size > KEPT) answers.delete(answers.keys().next().value);
    show(answers.get(key));
  } catch (error) {
    if (stop.signal.aborted) return;
    goBack("");
    complain(`${own.name}: ${sentence(error.message)}`);
  } finally {
    clearInterval(clock);
    if (asking === stop) document.body.classList.remove("waiting");
  }
}

async function ask({ photo: own, method: name, target }, signal, progress) {
  const query = new URLSearchParams({ method: name, ...(target && { class: target }) });
  for (let left = TRIES; ; left--) {
    const { status, text, retry } = await post(`explain?${query}`, own.file, signal, progress);
    if (status === 503 && left > 1) {
      const seconds = Number(retry) || 2;
      say(`Many photos are waiting here; the next try is in ${seconds} s`);
      pausing = signal;
      await new Promise((go) => setTimeout(go, seconds * 1000 * (0.75 + Math.random() / 2)));
      if (pausing === signal) pausing = null;
      signal.throwIfAborted();
      continue;
    }
    let answer = { error: `the server answers ${status}` };
    try {
      answer = JSON.parse(text);
    } catch {}
    if (status !== 200) throw new Error(answer.error);
    return answer;
  }
}

// What fetch does, and the upload's progress, which fetch does not report.
function post(url, body, signal, progress) {
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    request.open("POST", url);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => progress(Math.min(event.loaded / (event.total || 1), 0.99)));
    request.upload.addEventListener("load", () => progress(1));
    request.addEventListener("load", () => done({ status: request.status, text: request.responseText, retry: request.getResponseHeader("Retry-After") }));
    request.addEventListener("error", () => fail(new Error("the server does not answer: it may have ended, or the photo cannot be read any more")));
    request.addEventListener("abort", () => fail(new Error("cancelled")));
    signal.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

function cancel() {
  asking?.abort();
  document.body.classList.remove("waiting");
  goBack("Cancelled.");
  (photo?.button ?? $("own")).focus();
}

// After a request without an answer: the settings are again those of the picture that is shown.
function goBack(text) {
  photo = shown?.asked.photo ?? null;
  if (shown) {
    photo.target = shown.asked.target;
    $("method").value = shown.asked.method;
  }
  press();
  showClass();
  describeSettings();
  writeLink();
  say(text || (shown ? told(shown) : ""));
}

function say(said) {
  const text = named(said);
  if ($("status").textContent !== text) $("status").textContent = text;
}

// Drawing.

async function pixelsOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

const told = ({ target, method: name, seconds }) => `${target.name}, ${percent(target.probability)}: ${method(name).title}, ${seconds.toFixed(2)} s`;

function show(answer) {
  document.body.classList.remove("waiting");
  shown = answer;
  for (const id of ["pictures", "answer", "take"]) $(id).hidden = false;
  $("drop").hidden = true;
  const { target, map, signed, asked } = answer;
  if (answer.photo) {
    const [rows, columns] = map.shape;
    const numbers = new Float32Array(bytesOf(map.data).buffer);
    const most = numbers.reduce((best, value, i) => (value > numbers[best] ? i : best), 0);
    const where = `strongest in row ${Math.floor(most / columns) + 1} of ${rows}, column ${(most % columns) + 1} of ${columns}`;
    const what = `${method(answer.method).title} for ${target.name}`;
    $("overlay").setAttribute("aria-label", named(`Photo under its heatmap: ${what}, ${where}`));
    $("heat").setAttribute("aria-label", `Heatmap: ${what}, ${where}`);
  }
  $("low").textContent = signed ? "against" : "low";
  $("high").textContent = signed ? "for" : "high";
  const thumbnail = asked.photo.button.querySelector("img");
  if (thumbnail?.hidden) [thumbnail.src, thumbnail.hidden] = [answer.photo, false]; // a file that browsers do not draw
  say(told(answer));
  caution(answer);
  showClass();
  listTop(answer);
  draw();
}

function caution({ target, top5 }) {
  $("caution").textContent = cautionOf(target.name, target.probability, target.class === top5[0].class, "The map shows");
}

function showScale(table) {
  const { signed, target, method: name } = shown;
  const ofText = settings.kind === "text", what = `${signed || method(name).class_specific ? ` for “${target.name}”` : ", whatever the class"}`;
  put($("scale"), ramp(table, signed, ofText, $("opacity").value / 100));
  $("meaning").replaceChildren(...meaning(table, signed, what, ofText));
}

function listTop({ top5, target }) {
  const focused = document.activeElement?.dataset?.class;
  const entries = top5.some((entry) => entry.class === target.class) ? top5 : [...top5, target];
  $("top").replaceChildren(
    ...entries.map((entry) => {
      const bar = make("i");
      bar.style.width = `${100 * entry.probability}%`;
      const button = make("button", { type: "button" }, bar, make("span", { textContent: entry.name }), make("span", { textContent: percent(entry.probability) }));
      button.dataset.class = entry.class;
      button.setAttribute("aria-pressed", entry.class === target.class);
      button.addEventListener("click", () => chooseClass(entry.class === top5[0].class ? "" : String(entry.class)));
      if (focused === String(entry.class)) queueMicrotask(() => button.focus());
      return button;
    }),
  );
}

// The photo turns pale where the opacity grows, so that colour means heat: the stronger the value, the less photo shows.
function draw() {
  if (!shown) return;
  if (shown.parts) return drawWords();
  const { photo: seen, shade } = shown.pixels;
  const table = settings.tables[$("colours").value][shown.signed ? 1 : 0];
  const opacity = $("opacity").value / 100;
  const covers = Array.from({ length: 256 }, (_, grey) => covering(shown.signed ? Math.min(grey / 127.5 - 1, 1) : grey / 255, shown.signed));
  const overlay = new ImageData(seen.width, seen.height);
  const heat = new ImageData(seen.width, seen.height);
  for (let i = 0; i < seen.data.length; i += 4) {
    const value = shade.data[i];
    const [place, weight] = covers[value];
    const grey = 0.299 * seen.data[i] + 0.587 * seen.data[i + 1] + 0.114 * seen.data[i + 2];
    for (let c = 0; c < 3; c++) {
      const pale = seen.data[i + c] + 0.6 * opacity * (grey - seen.data[i + c]);
      overlay.data[i + c] = pale + opacity * weight * (table[3 * place + c] - pale);
      heat.data[i + c] = table[3 * value + c];
    }
    overlay.data[i + 3] = heat.data[i + 3] = 255;
  }
  put($("overlay"), overlay);
  put($("heat"), heat);
  put($("photo"), seen);
  showScale(table);
}

function drawWords() {
  const table = settings.tables[$("colours").value][shown.signed ? 1 : 0];
  $("passage").hidden = false;
  $("passage").replaceChildren(...wordsOf(shown.parts, table, shown.signed, $("opacity").value / 100));
  showScale(table);
}

// Downloads.

function save(blob, ending) {
  const name = [shown.asked.photo.name, shown.method, shown.target.name].map((part) => part.replace(/[\\/:*?"<>|.\s]+/g, "_").slice(0, 60));
  const link = make("a", { href: URL.createObjectURL(blob), download: `${name.join(".")}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A picture with a caption below it: photo, class, probability, method, model, and the colour scale.
function savePicture(source, ending) {
  const { target, method: name, asked, signed } = shown;
  const edge = 12;
  const canvas = make("canvas", { width: source.width });
  const context = canvas.getContext("2d");
  const room = canvas.width - 2 * edge;
  const lines = [
    ["600 15px system-ui, sans-serif", `${target.name}, ${percent(target.probability)}`],
    ["13px system-ui, sans-serif", `${method(name).title} (${name}) on ${asked.photo.name}, by ${settings.model}`],
  ].flatMap(([font, text]) => wrapped(context, font, text, room));
  canvas.height = source.height + 20 * lines.length + 42;
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0);
  context.fillStyle = "#1c1c1c";
  context.textBaseline = "middle";
  let y = source.height + 18;
  for (const [font, text] of lines) {
    context.font = font;
    context.fillText(text, edge, y);
    y += 20;
  }
  const [low, high] = signed ? ["against", "for"] : ["low", "high"];
  const start = edge + context.measureText(low).width + 8;
  const scale = Math.min(160, room / 3);
  context.fillText(low, edge, y);
  context.drawImage($("scale"), start, y - 5, scale, 10);
  context.fillText(high, start + scale + 8, y);
  canvas.toBlob((blob) => save(blob, ending));
}

// [font, line] of a text that is broken between words, or within one that is wider than the room.
function wrapped(context, font, text, room) {
  context.font = font;
  const lines = [""];
  for (const word of text.split(/(?<=\s)/))
    if (context.measureText(lines.at(-1) + word.trimEnd()).width <= room) lines[lines.length - 1] += word;
    else {
      if (lines.at(-1)) lines.push("");
      for (const letter of word) {
        if (context.measureText(lines.at(-1) + letter).width > room) lines.push("");
        lines[lines.length - 1] += letter;
      }
    }
  return lines.map((line) => [font, line.trimEnd()]);
}

// NumPy's format, version 1: a magic number, the length of the header, the header, the numbers.
function npy({ shape, data }) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const header = `${text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11)}\n`;
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return new Blob([start, bytesOf(data)]);
}

async function copyLink() {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    say(photo && !photo.path ? "The link is copied; your photo and its class are not part of it" : "The link is copied");
  } catch {
    say(`The link is the address of this page: ${location.href}`);
  }
}

// The strip of photos.

function press() {
  for (const one of photos) one.button.setAttribute("aria-pressed", one === photo);
}

function addPhoto(facts, source, label) {
  const one = { target: "", ...facts };
  const image = make("img", { alt: "", loading: "lazy", decoding: "async", ...(source && { src: source }) });
  one.button = make("button", { type: "button", title: label }, ...(settings.kind === "text" ? [] : [image]), make("span", { textContent: one.path ? words(one.name) : one.name }));
  if (one.path) one.button.dataset.path = one.path;
  one.button.setAttribute("aria-label", label);
  one.button.setAttribute("aria-pressed", false);
  image.addEventListener("error", () => (image.hidden = true));
  one.button.addEventListener("click", () => choose(one));
  const firstExample = photos.find((other) => other.path);
  $("photos").insertBefore(one.button, !one.path && firstExample ? firstExample.button : null);
  photos.push(one);
  return one;
}

async function choose(one) {
  const before = (taken += 1);
  if (!one.file)
    try {
      const response = await fetch(one.path);
      if (!response.ok) throw new Error();
      one.file = await response.blob();
    } catch {
      complain("The server does not answer: it may have ended.");
      return;
    }
  if (taken !== before) return;
  photo = one;
  press();
  one.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  writeLink();
  explain();
}

// Several photos join the strip, and the first of them is explained, for its own predicted class.
function takeFiles(files) {
  const large = [...files].filter((file) => file.size > settings.largest);
  const added = [...files]
    .filter((file) => !large.includes(file))
    .map((file) => {
      const name = plain(nameOf(file.name)) || settings.kind;
      return addPhoto({ name, file }, URL.createObjectURL(file), name);
    });
  if (added.length) choose(added[0]);
  if (large.length)
    complain(`${large.map((file) => plain(file.name)).join(", ")}: ${large.length > 1 ? "these files are" : "the photo's file is"} larger than ${settings.largest / 2 ** 20} MiB.`);
}

function takeText(text) {
  const name = plain(text.trim().replace(/\s+/g, " "));
  choose(addPhoto({ name: name.length > 40 ? `${name.slice(0, 40)}…` : name, file: new Blob([text]) }, "", name.slice(0, 1000)));
}

// The menu of classes: a text field that filters a list.

let listed = []; // classes in the list, "" for the predicted one
let active = -1; // the place of the marked one

function showClass() {
  const predicted = photo && shown?.asked.photo === photo ? `${shown.top5[0].name} (predicted)` : "the predicted one";
  $("class").disabled = !photo;
  $("class").placeholder = predicted;
  $("class").value = photo?.target ? settings.classes[photo.target] : "";
  closeClasses();
}

// Names that begin with the text come first, then those with a word that does, then the others.
function matching(text) {
  const asked = text.trim().toLowerCase();
  const parts = asked.split(/\s+/);
  const rank = (name) => (name.startsWith(asked) ? 0 : name.includes(` ${asked}`) ? 1 : 2);
  const found = settings.lower.map((name, index) => ({ name, index }));
  return found
    .filter(({ name, index }) => String(index) === asked || parts.every((part) => name.includes(part)))
    .sort((a, b) => rank(a.name) - rank(b.name) || a.index - b.index)
    .map(({ index }) => String(index));
}

function openClasses(text, marked = "") {
  const own = shown?.asked.photo === photo ? shown.top5 : [];
  const best = own.map((entry) => String(entry.class));
  const found = text.trim() ? matching(text) : ["", ...best, ...Array.from(settings.classes.keys(), String).filter((index) => !best.includes(index))];
  listed = found.slice(0, LISTED);
  $("classes").replaceChildren(
    ...listed.map((index, place) => {
      const note = own.find((entry) => String(entry.class) === index);
      const facts = index === "" ? ["the predicted one", own.length ? own[0].name : ""] : [settings.classes[index], note ? percent(note.probability) : index];
      const item = make("li", { id: `class-${place}` }, make("span", { textContent: facts[0] }), make("small", { textContent: facts[1] }));
      item.setAttribute("role", "option");
      item.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
      item.addEventListener("click", () => chooseClass(index));
      return item;
    }),
  );
  $("classes").hidden = !listed.length;
  $("class").setAttribute("aria-expanded", listed.length > 0);
  const more = found.length > listed.length ? `; the first ${listed.length} are listed` : "";
  $("class-note").textContent = text.trim() ? `${found.length || "No"} class${found.length === 1 ? " matches" : "es match"}${more}.` : `${settings.classes.length} classes: type to find one.`;
  mark(listed.length ? Math.max(listed.indexOf(marked), 0) : -1);
}

function mark(place) {
  active = place;
  [...$("classes").children].forEach((item, i) => item.setAttribute("aria-selected", i === place));
  if (place < 0) return $("class").removeAttribute("aria-activedescendant");
  $("class").setAttribute("aria-activedescendant", `class-${place}`);
  $("classes").children[place].scrollIntoView({ block: "nearest" });
}

function closeClasses() {
  $("classes").hidden = true;
  $("class").setAttribute("aria-expanded", false);
  $("class").removeAttribute("aria-activedescendant");
  $("class-note").textContent = "";
}

function chooseClass(index) {
  if (!photo) return;
  photo.target = index;
  showClass();
  settingsChanged(true);
}

function classKey(event) {
  const open = !$("classes").hidden;
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
  if (event.key in steps) {
    if (!open) openClasses("", photo.target);
    else mark(Math.min(Math.max(active + steps[event.key], 0), listed.length - 1));
  } else if (event.key === "Enter") {
    if (open) chooseClass(listed[active]);
  } else if (event.key === "Escape" && ($("class-note").textContent || open)) showClass();
  else return;
  event.preventDefault();
}

function settingsChanged(asksAnew) {
  describeSettings();
  writeLink();
  if (asksAnew) explain();
  else draw();
}

const option = (value, text) => make("option", { value, textContent: text });

// The page itself for a model of recordings or texts.
function nameAll() {
  if (settings.kind === "photo") return;
  document.body.classList.add(`of-${settings.kind}`);
  $("file").accept = settings.accept.join(",");
  $("write").hidden = settings.kind !== "text";
  if (settings.kind === "text") document.title = $("about").previousElementSibling.textContent = "Which words matter for a class?";
  else $("received").textContent = "What the model receives: time to the right, frequency upwards";
  for (const node of document.querySelectorAll("[aria-label*=hoto]")) node.ariaLabel = named(node.ariaLabel);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = named(texts.currentNode.data);
}

async function start() {
  try {
    settings = await (await fetch("settings")).json();
  } catch {
    $("about").textContent = "The server does not answer.";
    return;
  }
  ready = new Set(settings.ready);
  settings.lower = settings.classes.map((name) => name.toLowerCase());
  settings.tables = Object.fromEntries(Object.entries(settings.colours).map(([name, both]) => [name, both.map(bytesOf)]));
  nameAll();
  $("about").textContent = `${settings.model}: ${settings.classes.length} classes, ${settings.size.join(" × ")} ${UNITS[settings.kind]}.`;
  $("method").append(...settings.methods.map(({ name, title, recommended }) => option(name, recommended ? `${title} (recommended)` : title)));
  $("colours").append(...Object.keys(settings.colours).map((name) => option(name, name)));
  for (const path of settings.examples) addPhoto({ name: nameOf(path), path }, path, `Example: ${words(nameOf(path))}`);

  const example = readLink();
  if (example) choose(example);
  addEventListener("hashchange", () => {
    const linked = readLink();
    if (linked && linked !== photo) choose(linked);
    else settingsChanged(true);
  });
  $("method").addEventListener("change", () => settingsChanged(true));
  $("class").addEventListener("focus", () => $("class").select());
  $("class").addEventListener("click", () => $("classes").hidden && openClasses("", photo.target));
  $("class").addEventListener("input", () => openClasses($("class").value));
  $("class").addEventListener("keydown", classKey);
  $("class").addEventListener("blur", showClass);
  $("colours").addEventListener("change", () => settingsChanged(false));
  $("opacity").addEventListener("input", () => settingsChanged(false));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("cancel").addEventListener("click", cancel);
  $("write").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("text").value.trim()) takeText($("text").value);
  });
  for (const button of document.querySelectorAll("[data-choose]")) button.addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    takeFiles($("file").files);
    $("file").value = "";
  });
  addEventListener("paste", (event) => takeFiles(event.clipboardData?.files ?? []));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    takeFiles(event.dataTransfer?.files ?? []);
  });
  $("save-picture").addEventListener("click", () => savePicture($("overlay"), "png"));
  $("save-heat").addEventListener("click", () => savePicture($("heat"), "map.png"));
  $("save-map").addEventListener("click", () => save(npy(shown.map), "npy"));
  $("link").addEventListener("click", copyLink);
}

start();
