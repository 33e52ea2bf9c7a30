// The page of `tokentm serve`. A photo is sent again for each class and method; colours and opacity are drawn here.
"use strict";

const $ = (id) => document.getElementById(id);
const TRIES = 8; // how often a busy server is asked again
let settings; // of the server: model, classes, methods, colours, examples
let photo = null; // {name, file}: what is explained
let shown = null; // the server's last answer, and its pictures as pixels
let taken = 0; // how many photos were chosen: an example that comes late gives way
let pausing = null; // the signal of a request that waits for a busy server
let asking = null; // stops the request that is under way
const answers = new Map(); // of this photo, by method and class
let ready = new Set(); // methods that need no compiling

// Settings that a link carries, in the part of the address that is never sent.

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const pick = (select, value) => {
    if ([...select.options].some((option) => option.value === value)) select.value = value;
  };
  pick($("method"), link.get("method") || settings.methods[0].name);
  pick($("colours"), link.get("colours") || "inferno");
  const wanted = link.get("class") || "";
  const byName = settings.classes.indexOf(wanted);
  pick($("class"), byName >= 0 ? String(byName) : wanted);
  const opacity = link.has("opacity") ? Number(link.get("opacity")) : NaN;
  $("opacity").value = opacity >= 0 && opacity <= 100 ? opacity : 75;
  describeSettings();
  const example = link.get("example");
  return settings.examples.find((path) => nameOf(path) === example);
}

function writeLink() {
  const link = new URLSearchParams();
  const chosen = $("class").value;
  const name = settings.classes[chosen];
  link.set("method", $("method").value);
  if (chosen) link.set("class", settings.classes.indexOf(name) === Number(chosen) ? name : chosen);
  link.set("colours", $("colours").value);
  link.set("opacity", $("opacity").value);
  if (photo && photo.example) link.set("example", photo.name);
  history.replaceState(null, "", `#${link}`);
}

const nameOf = (path) => path.replace(/^.*\//, "").replace(/\.[^.]*$/, "");
const words = (name) => name.replaceAll("_", " ");

function describeSettings() {
  const method = settings.methods.find((row) => row.name === $("method").value);
  const whatever = method.class_specific ? "" : " The map is the same for every class.";
  $("method-note").textContent = `${sentence(`${method.paper} ${method.year}`)} ${sentence(passes(method.passes))}${whatever}`;
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
  const key = `${$("method").value} ${$("class").value}`;
  $("error").textContent = "";
  if (answers.has(key)) return show(answers.get(key));
  document.body.classList.add("waiting");
  const method = $("method").value;
  const { name } = photo;
  const notice = ready.has(method)
    ? "Explaining"
    : `First use of ${method} here: compiling takes about ${Math.max(1, Math.round(settings.compiling))} s`;
  const began = performance.now();
  const tick = () => {
    if (stop.signal.aborted || pausing === stop.signal) return;
    const seconds = Math.floor((performance.now() - began) / 1000);
    say(`${notice} … ${seconds > 1 ? `${seconds} s` : ""}`);
  };
  if (!ready.has(method)) tick();
  const clock = setInterval(tick, 1000);
  try {
    const answer = await ask(method, $("class").value, stop.signal);
    const pixels = { photo: await pixelsOf(answer.photo), shade: await pixelsOf(answer.shade) };
    ready.add(method);
    answer.seconds = (performance.now() - began) / 1000;
    if (stop.signal.aborted) return;
    answers.set(key, { ...answer, pixels, name });
    show(answers.get(key));
  } catch (error) {
    if (stop.signal.aborted) return;
    say("");
    $("error").textContent = sentence(error.message);
  } finally {
    clearInterval(clock);
    if (asking === stop) document.body.classList.remove("waiting");
  }
}

async function ask(method, target, signal) {
  const query = new URLSearchParams({ method, ...(target && { class: target }) });
  const headers = { "Content-Type": "application/octet-stream" };
  for (let left = TRIES; ; left--) {
    let response;
    try {
      response = await fetch(`explain?${query}`, { method: "POST", headers, body: photo.file, signal });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Error("the server does not answer: it may have ended, or the photo cannot be read any more");
    }
    if (response.status === 503 && left > 1) {
      const seconds = Number(response.headers.get("Retry-After")) || 2;
      say(`Many photos are waiting here; the next try is in ${seconds} s`);
      pausing = signal;
      await new Promise((go) => setTimeout(go, seconds * 1000 * (0.75 + Math.random() / 2)));
      if (pausing === signal) pausing = null;
      signal.throwIfAborted();
      continue;
    }
    const answer = await response.json().catch(() => ({ error: `the server answers ${response.status}` }));
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
}

function say(text) {
  $("status").textContent = text;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

// Drawing.

async function pixelsOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function show(answer) {
  document.body.classList.remove("waiting");
  shown = answer;
  for (const id of ["pictures", "answer", "take"]) $(id).hidden = false;
  $("drop").hidden = true;
  const { target, map, signed } = answer;
  $("low").textContent = signed ? "against" : "low";
  $("high").textContent = signed ? "for" : "high";
  const [rows, columns] = map.shape;
  const numbers = new Float32Array(bytes(map.data).buffer);
  const most = numbers.reduce((best, value, i) => (value > numbers[best] ? i : best), 0);
  const where = `strongest in row ${Math.floor(most / columns) + 1} of ${rows}, column ${(most % columns) + 1} of ${columns}`;
  const what = `${answer.method} for ${target.name}`;
  $("overlay").setAttribute("aria-label", `Photo under its heatmap: ${what}, ${where}`);
  $("heat").setAttribute("aria-label", `Heatmap: ${what}, ${where}`);
  say(`${target.name}, ${percent(target.probability)}: ${answer.method}, ${answer.seconds.toFixed(2)} s`);
  listClasses(answer);
  draw();
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function listClasses({ top5, target }) {
  const focused = document.activeElement?.dataset?.class;
  const entries = top5.some((entry) => entry.class === target.class) ? top5 : [...top5, target];
  $("top").replaceChildren(
    ...entries.map((entry) => {
      const button = document.createElement("button");
      const [bar, name, share] = ["i", "span", "span"].map((tag) => button.appendChild(document.createElement(tag)));
      button.type = "button";
      button.dataset.class = entry.class;
      button.setAttribute("aria-pressed", entry.class === target.class);
      bar.style.width = `${100 * entry.probability}%`;
      name.textContent = entry.name;
      share.textContent = percent(entry.probability);
      button.addEventListener("click", () => {
        $("class").value = entry.class;
        settingsChanged(true);
      });
      if (focused === String(entry.class)) queueMicrotask(() => button.focus());
      return button;
    }),
  );
}

// The photo turns pale where the opacity grows, so that colour means heat: the stronger the value, the less photo shows.
function draw() {
  if (!shown) return;
  const { photo: seen, shade } = shown.pixels;
  const table = settings.tables[$("colours").value][shown.signed ? 1 : 0];
  const opacity = $("opacity").value / 100;
  const overlay = new ImageData(seen.width, seen.height);
  const heat = new ImageData(seen.width, seen.height);
  for (let i = 0; i < seen.data.length; i += 4) {
    const value = shade.data[i];
    const strength = shown.signed ? Math.abs(value / 127.5 - 1) ** 0.7 : (1 + 2 * Math.sqrt(value / 255)) / 3;
    const grey = 0.299 * seen.data[i] + 0.587 * seen.data[i + 1] + 0.114 * seen.data[i + 2];
    for (let c = 0; c < 3; c++) {
      const colour = table[3 * value + c];
      const pale = seen.data[i + c] + 0.6 * opacity * (grey - seen.data[i + c]);
      overlay.data[i + c] = pale + opacity * strength * (colour - pale);
      heat.data[i + c] = colour;
    }
    overlay.data[i + 3] = heat.data[i + 3] = 255;
  }
  put($("overlay"), overlay);
  put($("heat"), heat);
  put($("photo"), seen);
  const scale = new ImageData(256, 1);
  for (let i = 0; i < 256; i++) scale.data.set([...table.slice(3 * i, 3 * i + 3), 255], 4 * i);
  put($("scale"), scale);
}

function put(canvas, pixels) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Taking away.

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${shown.name}.${shown.method}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// NumPy's format, version 1: a magic number, the length of the header, the header, the numbers.
function npy({ shape, data }) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const header = `${text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11)}\n`;
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return new Blob([start, bytes(data)]);
}

async function copyLink() {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    say(photo && !photo.example ? "The link is copied; your photo is not part of it" : "The link is copied");
  } catch {
    say(`The link is the address of this page: ${location.href}`);
  }
}

// Choosing.

function take(file, name, example = false) {
  if (!file) return;
  if (file.size > settings.largest) {
    $("error").textContent = `The photo's file is larger than ${settings.largest / 2 ** 20} MiB.`;
    return;
  }
  photo = { file, name, example };
  taken += 1;
  answers.clear();
  for (const button of $("photos").children) button.setAttribute("aria-pressed", button.dataset.path ? example && nameOf(button.dataset.path) === name : !example);
  writeLink();
  explain();
}

async function takeExample(path) {
  const before = (taken += 1);
  try {
    const response = await fetch(path);
    if (!response.ok) throw new Error();
    const file = await response.blob();
    if (taken === before) take(file, nameOf(path), true);
  } catch {
    $("error").textContent = "The server does not answer: it may have ended.";
  }
}

function takeOwn(file) {
  if (file) take(file, nameOf(file.name) || "photo");
}

function settingsChanged(asksAnew) {
  describeSettings();
  writeLink();
  if (asksAnew) explain();
  else draw();
}

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

async function start() {
  try {
    settings = await (await fetch("settings")).json();
  } catch {
    $("about").textContent = "The server does not answer.";
    return;
  }
  ready = new Set(settings.ready);
  settings.tables = Object.fromEntries(Object.entries(settings.colours).map(([name, both]) => [name, both.map(bytes)]));
  const [height, width] = settings.size;
  $("about").textContent = `${settings.model}: ${settings.classes.length} classes, ${height} × ${width} pixels.`;
  $("class").append(...settings.classes.map((name, i) => option(i, name)));
  $("method").append(...settings.methods.map(({ name }) => option(name, name)));
  $("colours").append(...Object.keys(settings.colours).map((name) => option(name, name)));
  $("photos").prepend(
    ...settings.examples.map((path) => {
      const button = document.createElement("button");
      const image = button.appendChild(document.createElement("img"));
      button.type = "button";
      button.dataset.path = path;
      button.title = image.alt = `Example: ${words(nameOf(path))}`;
      image.src = path;
      button.addEventListener("click", () => takeExample(path));
      return button;
    }),
  );

  const example = readLink();
  if (example) takeExample(example);
  addEventListener("hashchange", () => {
    const linked = readLink();
    if (linked && !(photo?.example && photo.name === nameOf(linked))) takeExample(linked);
    else settingsChanged(true);
  });
  for (const id of ["method", "class"]) $(id).addEventListener("change", () => settingsChanged(true));
  $("colours").addEventListener("change", () => settingsChanged(false));
  $("opacity").addEventListener("input", () => settingsChanged(false));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-choose]")) button.addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    takeOwn($("file").files[0]);
    $("file").value = "";
  });
  addEventListener("paste", (event) => takeOwn(event.clipboardData?.files[0]));
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
    takeOwn(event.dataTransfer?.files[0]);
  });
  $("save-picture").addEventListener("click", () => $("overlay").toBlob((blob) => save(blob, "png")));
  $("save-heat").addEventListener("click", () => $("heat").toBlob((blob) => save(blob, "map.png")));
  $("save-map").addEventListener("click", () => save(npy(shown.map), "npy"));
  $("link").addEventListener("click", copyLink);
}

start();
