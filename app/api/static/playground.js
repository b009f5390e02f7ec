// The page: what is asked for, what is on its way, what was made. Everything that a person or the
// service wrote is set as text, never as markup; the page's security policy would refuse the rest.

import { Picker, asText } from "./adapters.js";
import { $, button, element } from "./dom.js";
import { Painter } from "./mask.js";
import { asCurl, asPython, fields, fileName, formTexts } from "./recipes.js";
import { Cost, SizeRules } from "./sizes.js";
import { Refusal, ask, askPicture, draw } from "./stream.js";

const MAX_PICTURES = 200; // in the gallery; older ones are let go
const MAX_UPLOAD_PIXELS = 12_000_000; // more is drawn smaller first: the service scales to 1 MP
const PREVIEWS = 3;
const UPLOADED_AS_IS = new Set(["image/png", "image/jpeg", "image/webp"]);
const STAGES = {
  queue: "Waiting",
  text: "Reading the prompt",
  reference: "Reading the pictures",
  denoise: "Denoising",
  decode: "Decoding",
  encode: "Encoding",
};
const FIELD_OF = {
  prompt: "prompt",
  n: "count",
  num_inference_steps: "steps",
  steps: "steps",
  seed: "seed",
  output_format: "format",
  size: "sizes",
  width: "sizes",
  image: "references",
  mask: "references",
};
const EXAMPLES = {
  shapes: [
    "a red circle on a blue background",
    "a small yellow star on a black background",
    "a green heart and a white ring",
  ],
  others: [
    "a red fox in fresh snow, morning light, 85 mm",
    "an isometric paper model of a lighthouse",
    "a shop window with the words OPEN LATE in neon",
  ],
};

const model = JSON.parse($("model").textContent);
const page = {
  health: null,
  rules: null, // SizeRules, with the service's limits, once they are known
  handedOut: "", // the limits and formats that the form was laid out for
  clock: null, // of the picture that is on its way
  key: remembered(),
  needsKey: false,
  isListOld: true, // that of the adapters
  references: [], // {name, blob, url, width, height}
  mask: null, // {strokes, and promises of blob and overlay's URL}: over the first reference
  gallery: [], // {wish, blob, url, seconds, timing, peak, warnings}
  shown: null,
  running: null, // an AbortController
};
const cost = new Cost((reference) => page.rules.prepared(reference));

// ---------------------------------------------------------------------------------------------
// What is asked for

function buildForm() {
  for (const id of ["steps", "width", "height"]) $(id).value = model[id];
  $("prompt-note").textContent = model.note;
  for (const text of EXAMPLES[model.id] ?? EXAMPLES.others) {
    const example = button(text, "", () => {
      $("prompt").value = text;
      $("prompt").focus();
    });
    $("examples").append(element("li", {}, example));
  }
  for (const id of ["adapters", "settings"]) $(id).open = window.matchMedia("(min-width: 860px)").matches;
}

/** Take the limits and formats that the service hands out; a new version of it may have others. */
function takeLimits({ limits, output_formats: formats = [] }) {
  const handedOut = JSON.stringify([limits, formats]);
  if (!limits || handedOut === page.handedOut) return;
  page.handedOut = handedOut;
  page.rules = new SizeRules(model, limits);
  $("prompt").maxLength = limits.max_prompt_characters;
  $("steps").max = limits.max_steps;
  $("seed").maxLength = String(limits.max_seed).length;
  for (const id of ["width", "height"]) {
    Object.assign($(id), { min: limits.min_side, max: limits.max_side, step: limits.multiple });
  }
  const sizes = page.rules.presets();
  const choices = sizes.map((size) => choice(`${size.width}x${size.height}`, size, sizes));
  $("sizes").replaceChildren(choice("auto", null, sizes), ...choices, choice("custom", null, sizes));
  usualSize().checked = true;
  const options = formats.map((value) => element("option", { value, textContent: value.toUpperCase() }));
  $("format").replaceChildren(...options);
}

/** The service's limits; a refusal as long as it has not told them. */
function knownLimits() {
  if (page.rules) return page.rules.limits;
  if (page.needsKey) throw new Refusal("This server wants a key first.", { status: 401 });
  throw new Refusal("The service has not yet said what it can make. Try again in a moment.");
}

function usualSize() {
  return $(`size-${model.width}x${model.height}`) ?? document.querySelector("input[name=size]:not(#size-auto)");
}

function choice(value, size, sizes) {
  const radio = element("input", { type: "radio", name: "size", value, id: `size-${value}` });
  const words = { auto: "As the picture", custom: "Another size" };
  const text = words[value] ?? `${size.width} × ${size.height}`;
  const name = element("span", { textContent: text });
  const box = element("span", { className: "choice" }, outline(size, sizes), name, element("small"));
  const label = element("label", {}, radio, box);
  label.hidden = value === "auto";
  return label;
}

/** A rectangle of this shape, the larger the nearer it is to the largest of `sizes`. */
function outline(size, sizes) {
  const names = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(names, "svg");
  svg.setAttribute("viewBox", "0 0 40 26");
  svg.setAttribute("aria-hidden", "true");
  const rect = document.createElementNS(names, "rect");
  const largest = Math.max(...sizes.map(({ width, height }) => Math.max(width, height)));
  const scale = size ? Math.max(0.45, Math.sqrt(Math.max(size.width, size.height) / largest)) : 0.7;
  const [w, h] = size ? [size.width, size.height] : [4, 3];
  const fit = Math.min((38 * scale) / w, (24 * scale) / h);
  const box = { x: 20 - (w * fit) / 2, y: 13 - (h * fit) / 2, width: w * fit, height: h * fit, rx: 2 };
  for (const [name, number] of Object.entries(box)) rect.setAttribute(name, number.toFixed(1));
  if (!size) rect.setAttribute("stroke-dasharray", "3 2.5");
  svg.append(rect);
  return svg;
}

function chosenSize() {
  const value = document.querySelector("input[name=size]:checked").value;
  return sizeOf(value);
}

function sizeOf(value) {
  if (value === "auto" && page.references.length) {
    return { ...page.rules.prepared(page.references[0]), isAuto: true };
  }
  if (value === "custom" || value === "auto") {
    return { width: Number($("width").value), height: Number($("height").value), isAuto: false };
  }
  const [width, height] = value.split("x").map(Number);
  return { width, height, isAuto: false };
}

/** The service's limit, and that of the card beside so many pictures to work from. */
function largestPixels(references) {
  const byPlan = page.health?.worker?.max_pixels ?? [];
  const planned = byPlan[Math.min(references, byPlan.length - 1)] ?? Infinity;
  return Math.min(page.rules.limits.max_pixels, planned);
}

function seedMode() {
  return document.querySelector("input[name=seed-mode]:checked").value;
}

function chosenSeed(count) {
  const mode = seedMode();
  if (mode === "random") return crypto.getRandomValues(new Uint32Array(1))[0];
  const text = $("seed").value.trim();
  const seed = Number(text);
  const most = page.rules.limits.max_seed - count + 1;
  if (!/^\d+$/.test(text) || seed > most) {
    throw new Refusal(`The seed must be a whole number from 0 to ${most}.`, { param: "seed" });
  }
  return seed;
}

/** Everything that decides the pictures, as it stands now. */
function readWish() {
  knownLimits();
  const prompt = $("prompt").value;
  if (!prompt.trim()) {
    throw new Refusal("The prompt is empty. Say what the picture should show.", { param: "prompt" });
  }
  const count = whole("count", "Pictures");
  const steps = whole("steps", "Steps");
  return {
    prompt,
    ...chosenSize(),
    steps,
    count,
    seed: chosenSeed(count),
    format: $("format").value,
    references: [...page.references],
    mask: page.mask,
    loras: picker.loras,
  };
}

/** The number in a field, which holds its own least and most. */
function whole(id, name) {
  const [number, least, most] = ["value", "min", "max"].map((what) => Number($(id)[what]));
  if (Number.isInteger(number) && least <= number && number <= most) return number;
  throw new Refusal(`${name} must be a whole number from ${least} to ${most}.`, { param: id === "count" ? "n" : id });
}

/** Put what depends on the choices, and on what is known by now, into the form. */
function refreshForm() {
  if (!page.rules) return;
  const references = page.references;
  const steps = Number($("steps").value) || model.steps;
  const limit = largestPixels(references.length);
  for (const radio of document.querySelectorAll("input[name=size]")) {
    const size = sizeOf(radio.value);
    const isTooLarge = size.width * size.height > limit;
    const isOther = Boolean(page.mask) && !page.rules.isAlike(size, references[0]);
    const hint = radio.nextElementSibling.querySelector("small");
    radio.disabled = radio.value !== "custom" && radio.value !== "auto" && (isTooLarge || isOther);
    if (radio.disabled) hint.textContent = isTooLarge ? "no room for it" : "mask differs";
    else if (radio.value === "custom") hint.textContent = `in steps of ${page.rules.limits.multiple}`;
    else hint.textContent = about(cost.predict({ ...size, steps, references }));
  }
  $("size-auto").closest("label").hidden = !references.length;
  const checked = document.querySelector("input[name=size]:checked");
  if (checked.disabled || (checked.value === "auto" && !references.length)) {
    (references.length ? $("size-auto") : usualSize()).checked = true;
  }
  $("custom").hidden = !$("size-custom").checked;
  refreshSeed();
  const size = chosenSize();
  const count = Number($("count").value) || 1;
  const all = cost.predict({ ...size, steps, references }) * count;
  $("make").textContent = count > 1 ? `Make ${count} pictures` : references.length ? "Make the edit" : "Make the picture";
  $("cost").textContent = all ? about(all) : "";
  $("settings-summary").textContent = `${size.width} × ${size.height}, ${steps} ${steps === 1 ? "step" : "steps"}, ${seedMode()} seed`;
}

function refreshSeed() {
  const last = page.shown?.wish.seed;
  const mode = seedMode();
  $("seed-again").disabled = last === undefined;
  $("seed").readOnly = mode === "again";
  if (mode === "again") $("seed").value = last;
  if (mode === "random") $("seed").value = "";
}

// ---------------------------------------------------------------------------------------------
// Pictures to work from

async function addReferences(files) {
  try {
    for (const file of files) await addReference(file);
  } catch (error) {
    showError(error);
  }
  showReferences();
}

async function addReference(file) {
  const most = knownLimits().max_references;
  if (page.references.length >= most) {
    const pictures = most === 1 ? "1 picture" : `${most} pictures`;
    throw new Refusal(`At most ${pictures} can be worked from.`, { param: "image" });
  }
  try {
    page.references.push(await readPicture(file));
    if (page.references.length === 1) $("size-auto").checked = true;
  } catch {
    showError(new Refusal(`${file.name || "This"} is no picture that the browser can read.`, { param: "image" }));
  }
}

async function readPicture(file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = bitmap;
  const number = page.references.length + 1;
  if (UPLOADED_AS_IS.has(file.type) && width * height <= MAX_UPLOAD_PIXELS) {
    const name = file.name || `picture-${number}.png`;
    return { name, blob: file, url: URL.createObjectURL(file), width, height };
  }
  const scale = Math.min(1, Math.sqrt(MAX_UPLOAD_PIXELS / 3 / (width * height)));
  const canvas = element("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const url = URL.createObjectURL(blob);
  return { name: `picture-${number}.png`, blob, url, width: canvas.width, height: canvas.height };
}

function removeReference(index) {
  page.references.splice(index, 1);
  if (index === 0) page.mask = null;
  showReferences();
  ($("references").querySelectorAll("button.remove")[index] ?? $("add")).focus();
}

function showReferences() {
  const items = page.references.map((reference, index) => {
    const thumb = element("div", { className: "thumb" });
    thumb.append(element("img", { src: reference.url, alt: `Picture ${index + 1}, ${reference.name}` }));
    const actions = element("div");
    if (index === 0) {
      if (page.mask) thumb.append(overlaid(page.mask));
      actions.append(button(page.mask ? "Change mask" : "Paint a mask", "mask", openMask));
      if (page.mask) actions.append(button("Remove mask", "unmask", removeMask));
    }
    const remove = button("Remove", "remove", () => removeReference(index));
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    actions.append(remove);
    const name = element("p", { textContent: reference.name, title: reference.name });
    return element("li", {}, thumb, element("div", { className: "beside" }, name, actions));
  });
  $("references").replaceChildren(...items);
  refreshForm();
}

function overlaid(mask) {
  const image = element("img", { alt: "", className: "over" });
  mask.overlay.then((url) => {
    image.src = url;
  });
  return image;
}

function removeMask() {
  page.mask = null;
  showReferences();
  $("references").querySelector("button.mask").focus();
}

const picker = new Picker((path) => askPicture(path, { key: page.key }));

const painter = new Painter($("mask-canvas"), {
  tool: () => document.querySelector("input[name=tool]:checked").value,
  brush: () => $("brush").value,
  onChange: (share) => {
    const isEmpty = share < 0.0005;
    $("coverage").textContent = isEmpty ? "Nothing painted yet" : `${Math.max(1, Math.round(share * 100))} % may change`;
    for (const id of ["mask-done", "mask-save"]) $(id).setAttribute("aria-disabled", String(isEmpty));
  },
});

async function openMask() {
  const bitmap = await createImageBitmap(page.references[0].blob);
  $("mask-dialog").showModal();
  painter.open(bitmap, page.mask?.strokes);
  $("mask-canvas").focus();
}

/** The page is free at once, and the focus moves but now: whoever asks for the edit waits for the PNG. */
function keepMask(event) {
  event.preventDefault();
  if ($("mask-done").getAttribute("aria-disabled") === "true") return;
  const overlay = painter.toOverlay().then((blob) => URL.createObjectURL(blob));
  page.mask = { blob: painter.toBlob(), strokes: painter.strokes, overlay };
  $("mask-dialog").close();
  showReferences();
  $("references").querySelector("button.mask").focus();
}

async function saveMask() {
  if ($("mask-save").getAttribute("aria-disabled") === "true") return;
  const url = URL.createObjectURL(await painter.toBlob());
  element("a", { href: url, download: "mask.png" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// ---------------------------------------------------------------------------------------------
// On its way

async function make() {
  if (page.running) return;
  hideError();
  let wish;
  try {
    wish = readWish();
  } catch (error) {
    showError(error);
    return;
  }
  page.running = new AbortController();
  setWorking(true);
  reveal($("stage"));
  try {
    for (let index = 0; index < wish.count; index += 1) {
      await makeOne({ ...wish, seed: wish.seed + index, count: 1 }, index, wish.count);
    }
    say(wish.count > 1 ? `${wish.count} pictures are done.` : "The picture is done.");
  } catch (error) {
    if (page.running.signal.aborted) {
      say("Cancelled.");
    } else {
      showError(error);
    }
    if (page.shown) show(page.shown);
    else showFrame("empty");
  } finally {
    page.running = null;
    setWorking(false);
    refreshForm();
    poll();
  }
}

async function makeOne(wish, index, count) {
  const clock = new Clock(wish, count > 1 ? `Picture ${index + 1} of ${count}: ` : "");
  const made = { wish, warnings: [], timing: null, peak: null };
  page.clock = clock;
  frameFor(wish);
  showFrame("working");
  try {
    const [path, body] = await request(wish);
    for await (const event of draw(path, body, { key: page.key, signal: page.running.signal })) {
      if (event.kind === "comment") {
        clock.read(event.text, made);
      } else if (event.kind === "preview") {
        clock.preview(event.index);
        await showPreview(event.blob, clock.share);
      } else {
        made.blob = event.blob;
        made.warnings = event.event.warnings ?? [];
        Object.assign(wish, { seed: event.event.seed ?? wish.seed, ...measured(event.event.size) });
      }
    }
    made.seconds = clock.seconds;
    // What it was made with stays, whatever the service's own become.
    wish.loras = { ...wish.loras, isTouched: true };
    cost.learn(wish, made.timing ?? { denoise: made.seconds });
    keep(made);
  } finally {
    clock.stop();
    page.clock = null;
  }
}

async function request(wish) {
  const body = { prompt: wish.prompt, ...fields(wish), stream: true, partial_images: Math.min(PREVIEWS, wish.steps - 1) };
  if (!wish.references.length) return ["v1/images/generations", body];
  const form = new FormData();
  for (const [name, text] of formTexts(body)) form.append(name, text);
  for (const { blob, name } of wish.references) form.append("image[]", blob, name);
  if (wish.mask) form.append("mask", await wish.mask.blob, "mask.png");
  return ["v1/images/edits", form];
}

/** Where a picture is on its way, told by the stream's comments, and how long it has taken. */
class Clock {
  share = 0;
  #started = performance.now();
  #text = "Asking for it";
  #before = null; // pictures that start before this one; null once it runs
  #queuedAt = 0;
  #timer = setInterval(() => this.#show(), 100);

  constructor(wish, prefix) {
    this.wish = wish;
    this.prefix = prefix;
    this.#show();
  }

  get seconds() {
    return (performance.now() - this.#started) / 1000;
  }

  /** `queued 3`, `denoise 2/4`, `timing text;dur=1.5, ...`, `peak 123` (bytes). */
  read(comment, made) {
    const [word, rest = ""] = comment.split(/ (.*)/s);
    const [step, steps] = rest.split("/").map(Number);
    if (word === "queued") {
      this.#queuedAt = performance.now();
      this.#queued(Number(rest));
      poll();
    } else if (word === "timing") made.timing = timings(rest);
    else if (word === "peak") made.peak = Number(rest);
    else if (word in STAGES && steps > 0) this.#stepped(word, step, steps);
  }

  preview(index) {
    this.share = Math.max(this.share, (index + 1) / (PREVIEWS + 1));
    this.#show();
  }

  stop() {
    clearInterval(this.#timer);
  }

  /** A queue of `size`, asked for at `askedAt`, has at most so many before this picture. */
  onQueue(size, askedAt) {
    if (this.#before === null || askedAt < this.#queuedAt) return;
    if (size > 0 && size - 1 < this.#before) this.#queued(size - 1);
  }

  #queued(before) {
    this.#before = before;
    this.#text = before === 0 ? "Next in line" : before === 1 ? "One picture before this one" : `${before} pictures before this one`;
    this.#show();
    say(this.prefix + this.#text);
  }

  #stepped(stage, step, steps) {
    const parts = { text: 0.03, reference: 0.06, decode: 0.95, encode: 0.98 };
    this.share = parts[stage] ?? 0.08 + (0.84 * step) / steps;
    this.#before = null;
    this.#text = stage === "denoise" ? `Step ${step} of ${steps}` : STAGES[stage];
    this.#show();
    if (stage === "denoise") say(this.prefix + this.#text);
  }

  #show() {
    $("progress-text").textContent = this.prefix + this.#text;
    $("progress-time").textContent = `${this.seconds.toFixed(1)} s`;
    if (this.share) $("bar").value = this.share;
    else $("bar").removeAttribute("value");
    document.title = `${this.#text} - klein playground`;
  }
}

function timings(text) {
  const found = [...text.matchAll(/([a-z]+);dur=([\d.]+)/g)];
  return Object.fromEntries(found.map(([, stage, ms]) => [stage, Number(ms) / 1000]));
}

function measured(size) {
  const [width, height] = (size ?? "").split("x").map(Number);
  return width && height ? { width, height } : {};
}

function setWorking(isWorking) {
  $("make").setAttribute("aria-disabled", String(isWorking));
  if (!isWorking && document.activeElement === $("cancel")) $("make").focus();
  $("cancel").hidden = !isWorking;
  $("progress").hidden = !isWorking;
  $("stage").setAttribute("aria-busy", String(isWorking));
  if (!isWorking) document.title = "klein playground";
}

/** Empty with its examples, working until a preview has come, or done. */
function showFrame(state) {
  $("frame").dataset.state = state;
  $("empty").hidden = state !== "empty";
  $("caption").hidden = state !== "done";
  if (state !== "done") $("picture").hidden = true;
}

function frameFor({ width, height }) {
  $("frame").style.setProperty("--ratio", width / height);
  $("frame").style.setProperty("--widest", `${Math.round(width * 2.5)}px`);
}

async function showPreview(blob, share) {
  const url = URL.createObjectURL(blob);
  await putPicture(url, "A preview of the picture on its way", 9 * (1 - share));
  URL.revokeObjectURL(url);
}

/** Swap the picture once it is decoded, so that nothing flickers. */
async function putPicture(url, alt, blurPx) {
  const image = new Image();
  image.src = url;
  await image.decode().catch(() => {});
  const picture = $("picture");
  picture.src = url;
  picture.alt = alt;
  picture.hidden = false;
  picture.style.setProperty("--blur", `${blurPx.toFixed(1)}px`);
  await picture.decode().catch(() => {});
}

// ---------------------------------------------------------------------------------------------
// What was made

function keep(made) {
  made.url = URL.createObjectURL(made.blob);
  page.gallery.unshift(made);
  for (const old of page.gallery.splice(MAX_PICTURES)) URL.revokeObjectURL(old.url);
  show(made);
}

function show(made) {
  const { wish } = made;
  page.shown = made;
  frameFor(wish);
  showFrame("done");
  putPicture(made.url, wish.prompt, 0);
  $("caption-prompt").textContent = wish.prompt;
  $("caption-facts").textContent = [
    `${wish.width} × ${wish.height}`,
    `${wish.steps} ${wish.steps === 1 ? "step" : "steps"}`,
    `seed ${wish.seed}`,
    asText(wish.loras.chosen),
    `${wish.format.toUpperCase()}, ${bytes(made.blob.size)}`,
    seconds(made.timing?.total ?? made.seconds),
  ].filter(Boolean).join(" · ");
  $("caption-warnings").textContent = made.warnings.join(" ");
  $("caption-warnings").hidden = !made.warnings.length;
  Object.assign($("download"), { href: made.url, download: fileName(wish) });
  showGallery();
  showFacts();
  showTiming(made);
  refreshForm();
}

function showGallery() {
  const items = page.gallery.map((made, index) => {
    const thumb = element("img", { src: made.url, alt: "", loading: "lazy" });
    const item = button("", "", () => show(made));
    const number = page.gallery.length - index;
    item.setAttribute("aria-label", `Picture ${number}, seed ${made.wish.seed}: ${made.wish.prompt.slice(0, 80)}`);
    if (made === page.shown) item.setAttribute("aria-current", "true");
    item.append(thumb);
    return element("li", {}, item);
  });
  const focused = [...$("gallery").querySelectorAll("button")].indexOf(document.activeElement);
  $("gallery").replaceChildren(...items);
  $("visit").hidden = !items.length;
  if (focused >= 0) $("gallery").querySelectorAll("button")[focused]?.focus();
}

function showTiming({ timing }) {
  $("timing").hidden = !timing;
  if (!timing) return;
  const spent = Object.keys(STAGES).filter((stage) => timing[stage] > 0);
  const sum = spent.reduce((before, stage) => before + timing[stage], 0);
  const bars = spent.map((stage) => {
    const bar = element("span");
    bar.dataset.stage = stage;
    // Shares of one: where they add up to less, they leave the rest of the bar empty.
    bar.style.flexGrow = timing[stage] / sum;
    return bar;
  });
  const rows = spent.flatMap((stage) => {
    const name = element("dt", { textContent: STAGES[stage] });
    name.dataset.stage = stage;
    return [name, element("dd", { textContent: exactly(timing[stage]) })];
  });
  rows.push(element("dt", { textContent: "Altogether" }), element("dd", { textContent: exactly(timing.total) }));
  $("stages").replaceChildren(...bars);
  $("stage-list").replaceChildren(...rows);
}

async function reuse() {
  const { blob, wish } = page.shown;
  await addReferences([new File([blob], fileName(wish), { type: blob.type })]);
  say("Added to the pictures to work from.");
  $("prompt").focus();
}

/** Put everything back as it was asked for, seed included. */
function restore() {
  const { wish } = page.shown;
  $("prompt").value = wish.prompt;
  $("steps").value = wish.steps;
  $("count").value = 1;
  $("format").value = wish.format;
  $("seed-fixed").checked = true;
  $("seed").value = wish.seed;
  page.references = [...wish.references];
  page.mask = wish.mask;
  picker.restore(wish.loras);
  showReferences();
  const preset = $(wish.isAuto ? "size-auto" : `size-${wish.width}x${wish.height}`) ?? $("size-custom");
  preset.checked = true;
  $("width").value = wish.width;
  $("height").value = wish.height;
  refreshForm();
  say("The settings of this picture are back.");
  $("prompt").focus();
}

async function copy(event, write, what) {
  const pressed = event.currentTarget;
  const base = new URL(".", document.baseURI).href;
  const text = write(page.shown.wish, base, page.needsKey || Boolean(page.key));
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Only https and localhost may write to the clipboard; everybody may select and copy.
    $("text").value = text;
    $("text-dialog").showModal();
    $("text").select();
    return;
  }
  say(`Copied as ${what}.`);
  pressed.textContent = "Copied";
  setTimeout(() => {
    pressed.textContent = `Copy as ${what}`;
  }, 1600);
}

// ---------------------------------------------------------------------------------------------
// What is behind it

let polling = 0;

async function poll() {
  clearTimeout(polling);
  let wait_s = 3;
  if (!document.hidden) {
    const askedAt = performance.now();
    try {
      const { status, body } = await ask("health", { key: page.key });
      wait_s = onHealth(status, body);
      if (body?.queue) page.clock?.onQueue(body.queue.size, askedAt);
    } catch (error) {
      setStatus("gone", error.message);
    }
  }
  clearTimeout(polling);
  polling = setTimeout(poll, wait_s * 1000);
}

/** Take what the service says of itself; return when to ask again, in seconds. */
function onHealth(status, body) {
  if (status === 401) {
    askForKey();
    return 600;
  }
  showKeyForm(false);
  page.health = body;
  if (body) takeLimits(body);
  if (page.rules && body?.worker) cost.guess({ ...model, references: [] }, body.worker.warm_up_s);
  showFacts();
  refreshForm();
  if (!body?.ready) {
    const share = body?.progress ? `, ${Math.round(body.progress * 100)} %` : "";
    setStatus("waiting", `${body?.reason || "Not ready yet"}${share}`);
    return 1.5;
  }
  const waiting = body.queue.size ? `, ${body.queue.size} waiting` : "";
  refreshAdapters();
  setStatus("ready", `Ready on ${body.worker?.device === "cpu" ? "the CPU" : body.worker?.device}${waiting}`);
  return page.running ? 1 : 6;
}

/** Ask for the list of adapters, unless it is known. */
async function refreshAdapters() {
  if (!page.isListOld) return;
  page.isListOld = false;
  try {
    const { status, body } = await ask("v1/loras", { key: page.key });
    if (status === 200) picker.list(body.data);
    else page.isListOld = true;
  } catch {
    page.isListOld = true; // the status says that the service is gone
  }
}

/** Have the service asked for everything anew. */
function lookAgain() {
  if (document.hidden) return;
  page.isListOld = true;
  poll();
}

function setStatus(state, text) {
  document.querySelector(".status").dataset.state = state;
  if ($("status").textContent !== text) $("status").textContent = text;
}

let factsShown = "";

function showFacts() {
  const { health } = page;
  const worker = health?.worker;
  const facts = [["Model", model.title, worker ? `${model.id}, revision ${worker.revision.slice(0, 12)}` : model.id]];
  if (worker) {
    facts.push(["Card", worker.device === "cpu" ? "none, on the CPU" : worker.device]);
    facts.push(["Precision", worker.precision, worker.precision_reason]);
    facts.push(["Memory plan", worker.plan, worker.plan_reasons.join(" ")]);
    facts.push(["Memory", memory(worker), page.shown?.peak ? `at most ${bytes(page.shown.peak)} during the picture above` : ""]);
    if (worker.features.length) facts.push(["Switched on", worker.features.join(", ")]);
    facts.push(["Software", [`torch ${worker.torch}`, worker.cuda ? `CUDA ${worker.cuda}` : "", `klein-server ${health.version}`].filter(Boolean).join(", ")]);
  }
  if (health?.queue) {
    const { size, capacity, running } = health.queue;
    facts.push(["Queue", `${size} of ${capacity} waiting, ${running} running`]);
  }
  const text = JSON.stringify(facts);
  if (text === factsShown) return;
  factsShown = text;
  $("facts").replaceChildren(
    ...facts.flatMap(([name, value, reason]) => {
      const because = reason ? [element("small", { textContent: reason })] : [];
      return [element("dt", { textContent: name }), element("dd", {}, value, ...because)];
    }),
  );
}

function memory(worker) {
  return worker.weights_bytes ? `${bytes(worker.weights_bytes)} of weights` : "weights of unknown size";
}

// ---------------------------------------------------------------------------------------------
// Key, errors, announcements

function askForKey() {
  page.needsKey = true;
  setStatus("waiting", page.key ? "The key was refused" : "A key is needed");
  showKeyForm(true);
}

/** Ask for a key, or stop asking; where the focus would be lost, it moves on. */
function showKeyForm(isWanted) {
  const focused = document.activeElement;
  const places = [$("key-form"), $("key-forget")];
  $("key-form").hidden = !isWanted;
  $("key-forget").hidden = !page.key;
  const isLost = places.some((place) => place.hidden && place.contains(focused));
  if (isLost) $(isWanted ? "key" : "prompt").focus();
}

function useKey(key) {
  page.key = key;
  try {
    if (key) sessionStorage.setItem("klein.key", key);
    else sessionStorage.removeItem("klein.key");
  } catch {
    // Without storage the key lasts as long as the page.
  }
  lookAgain();
}

function remembered() {
  try {
    return sessionStorage.getItem("klein.key") ?? "";
  } catch {
    return "";
  }
}

function showError(error) {
  const isOurs = error instanceof Refusal;
  if (!isOurs) console.error(error);
  const name = (error.param ?? "").replace(/[[.].*/, "");
  if (name === "loras") {
    page.isListOld = true;
    picker.complain(error.message, /^loras\[(\d+)/.exec(error.param)?.[1]);
    return;
  }
  $("error").textContent = isOurs ? error.message : "The page failed in a way that nobody expected; load it anew.";
  $("error").hidden = false;
  if (error.status === 401) {
    askForKey();
    $("key").focus();
    return;
  }
  const field = $(FIELD_OF[name] ?? "");
  if (!field) return;
  if (field.closest("details")) $("settings").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", `${field.getAttribute("aria-describedby") ?? ""} error`.trim());
  if (field.matches("input, textarea, select")) field.focus();
}

function hideError() {
  picker.forgive();
  $("error").hidden = true;
  $("error").textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    const others = (field.getAttribute("aria-describedby") ?? "").replace(/ ?error$/, "");
    if (others) field.setAttribute("aria-describedby", others);
    else field.removeAttribute("aria-describedby");
  }
}

let saidAt = 0;
let unsaid = 0;

/** Tell a screen reader, at most every two seconds; the latest word wins. */
function say(text) {
  clearTimeout(unsaid);
  unsaid = setTimeout(() => {
    saidAt = performance.now();
    $("announcer").textContent = text;
  }, Math.max(0, saidAt + 2000 - performance.now()));
}

// ---------------------------------------------------------------------------------------------
// Small things

function reveal(place) {
  if (place.getBoundingClientRect().top < window.innerHeight * 0.6) return;
  const isCalm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  place.scrollIntoView({ behavior: isCalm ? "auto" : "smooth", block: "start" });
}

function seconds(value) {
  if (value < 0.1) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return value < 10 ? `${value.toFixed(1)} s` : value < 90 ? `${Math.round(value)} s` : `${(value / 60).toFixed(1)} min`;
}

function about(value) {
  return value ? `about ${seconds(value)}` : "";
}

function exactly(value) {
  return `${value.toFixed(3)} s`;
}

function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

// ---------------------------------------------------------------------------------------------
// Wiring

buildForm();
refreshForm();
showFacts();
poll();

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("form").addEventListener("input", (event) => {
  if (event.target === $("seed") && seedMode() === "random") {
    const typed = $("seed").value;
    $("seed-fixed").checked = true;
    $("seed").value = typed;
  }
  if (event.target === $("seed-fixed") && !$("seed").value) $("seed").value = page.shown?.wish.seed ?? 0;
  refreshForm();
});
$("cancel").addEventListener("click", () => page.running?.abort());
$("add").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  const files = [...$("files").files];
  $("files").value = "";
  await addReferences(files);
});
$("reuse").addEventListener("click", reuse);
$("restore").addEventListener("click", restore);
$("copy-curl").addEventListener("click", (event) => copy(event, asCurl, "curl"));
$("copy-python").addEventListener("click", (event) => copy(event, asPython, "Python"));

$("mask-form").addEventListener("submit", keepMask);
$("mask-cancel").addEventListener("click", () => $("mask-dialog").close());
$("mask-save").addEventListener("click", saveMask);
$("mask-undo").addEventListener("click", () => painter.undo());
$("mask-all").addEventListener("click", () => painter.fill());
$("mask-clear").addEventListener("click", () => painter.clear());

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  hideError();
  useKey($("key").value.trim());
  $("key").value = "";
});
$("key-forget").addEventListener("click", () => useKey(""));

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) make();
  if (event.key === "Escape") page.running?.abort();
});
document.addEventListener("visibilitychange", lookAgain);
window.addEventListener("focus", lookAgain);
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  addReferences(files);
});

let dragged = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  clearTimeout(dragged);
  $("drop").hidden = false;
});
document.addEventListener("dragleave", () => {
  dragged = setTimeout(() => {
    $("drop").hidden = true;
  }, 120);
});
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  addReferences([...event.dataTransfer.files]);
});
