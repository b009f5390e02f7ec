// What is asked for: the form, which keeps itself in this browser and can be filled from a link or
// from an earlier picture.

import { Picker } from "./adapters.js";
import { $, button, element } from "./dom.js";
import { keep, recall } from "./keeping.js";
import { SizeRules } from "./sizes.js";
import { cost, model, page } from "./state.js";
import { Refusal, askPicture } from "./stream.js";
import { styled } from "./styles.js";
import { countTokens } from "./tokens.js";
import { about, some } from "./words.js";

const NAME = "klein.form";
const TEXTS = ["prompt", "width", "height", "steps", "count", "format", "quality", "guidance"];
const LOSSY = new Set(["jpeg", "webp"]);
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

export const picker = new Picker((path) => askPicture(path, { key: page.key }));

let handedOut = ""; // the limits and formats that the form was laid out for
let kept = keptForm(); // what the form is filled with once it is laid out

export function buildForm() {
  for (const id of ["steps", "width", "height"]) $(id).value = model[id];
  $("prompt-note").textContent = model.note;
  for (const text of EXAMPLES[model.id] ?? EXAMPLES.others) {
    const example = button(text, "", () => {
      $("prompt").value = text;
      keepForm();
      $("prompt").focus();
    });
    $("examples").append(element("li", {}, example));
  }
  const isWide = window.matchMedia("(min-width: 860px)").matches;
  for (const id of ["adapters", "settings"]) $(id).open = kept.open?.includes(id) ?? isWide;
  if (kept.prompt) $("prompt").value = kept.prompt;
}

/** Take the limits and formats that the service hands out; a new version of it may have others. */
export function takeLimits({ limits, output_formats: formats = [] }) {
  const told = JSON.stringify([limits, formats]);
  if (!limits || told === handedOut) return;
  const values = handedOut ? readForm() : kept;
  handedOut = told;
  page.rules = new SizeRules(model, limits);
  $("prompt").maxLength = limits.max_prompt_characters;
  $("steps").max = limits.max_steps;
  $("seed").maxLength = String(limits.max_seed).length;
  for (const id of ["width", "height"]) {
    Object.assign($(id), { min: limits.min_side, max: limits.max_side, step: limits.multiple });
  }
  const { min_guidance: min, max_guidance: max } = limits;
  Object.assign($("guidance"), { min, max, value: model.guidance ?? min });
  $("guidance-field").hidden = !(max > min);
  const sizes = page.rules.presets();
  const choices = sizes.map((size) => choice(`${size.width}x${size.height}`, size, sizes));
  $("sizes").replaceChildren(choice("auto", null, sizes), ...choices, choice("custom", null, sizes));
  usualSize().checked = true;
  const options = formats.map((value) => element("option", { value, textContent: value.toUpperCase() }));
  $("format").replaceChildren(...options);
  $("settings").dataset.ready = "";
  fillForm(values);
}

/** The service's limits; a refusal as long as it has not told them. */
export function knownLimits() {
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
  const name = element("span", { textContent: words[value] ?? size.name });
  const sides = size ? [element("small", { textContent: `${size.width} × ${size.height}` })] : [];
  const hint = element("small", { className: "hint" });
  const box = element("span", { className: "choice" }, outline(size, sizes), name, ...sides, hint);
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

function chosen(name) {
  return document.querySelector(`input[name=${name}]:checked`)?.value;
}

function chosenSize() {
  return sizeOf(chosen("size"));
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

/** Choose this size, by its name where it has one. */
export function setSize({ width, height, isAuto = false }) {
  ($(isAuto ? "size-auto" : `size-${width}x${height}`) ?? $("size-custom")).checked = true;
  Object.assign($("width"), { value: width });
  Object.assign($("height"), { value: height });
  refreshForm();
  keepForm();
}

/** The service's limit, and that of the card beside so many pictures to work from. */
function largestPixels(references) {
  const byPlan = page.health?.worker?.max_pixels ?? [];
  const planned = byPlan[Math.min(references, byPlan.length - 1)] ?? Infinity;
  return Math.min(page.rules.limits.max_pixels, planned);
}

export function seedMode() {
  return chosen("seed-mode");
}

function chosenSeed(count) {
  if (seedMode() === "random") return crypto.getRandomValues(new Uint32Array(1))[0];
  const text = $("seed").value.trim();
  const seed = Number(text);
  const most = page.rules.limits.max_seed - count + 1;
  if (!/^\d+$/.test(text) || seed > most) {
    throw new Refusal(`The seed must be a whole number from 0 to ${most}.`, { param: "seed" });
  }
  return seed;
}

/** Everything that decides the pictures, as it stands now. */
export function readWish() {
  knownLimits();
  const prompt = $("prompt").value;
  if (!prompt.trim()) {
    throw new Refusal("The prompt is empty. Say what the picture should show.", { param: "prompt" });
  }
  const count = whole("count", "Pictures");
  const steps = whole("steps", "Steps");
  return {
    prompt: styled(prompt),
    ...chosenSize(),
    steps,
    count,
    seed: chosenSeed(count),
    format: $("format").value,
    ...(LOSSY.has($("format").value) ? { quality: whole("quality", "Quality") } : {}),
    ...($("guidance-field").hidden ? {} : { guidance: Number($("guidance").value) }),
    references: [...page.references],
    mask: page.mask,
    loras: picker.loras,
  };
}

/** The number in a field, which holds its own least and most. */
function whole(id, name) {
  const [number, least, most] = ["value", "min", "max"].map((what) => Number($(id)[what]));
  if (Number.isInteger(number) && least <= number && number <= most) return number;
  const param = { count: "n", quality: "output_compression" }[id] ?? id;
  throw new Refusal(`${name} must be a whole number from ${least} to ${most}.`, { param });
}

/** Put what depends on the choices, and on what is known by now, into the form. */
export function refreshForm() {
  countTokens(styled($("prompt").value));
  if (!page.rules) return;
  const references = page.references;
  const steps = Number($("steps").value) || model.steps;
  const limit = largestPixels(references.length);
  for (const radio of document.querySelectorAll("input[name=size]")) {
    const size = sizeOf(radio.value);
    const isTooLarge = size.width * size.height > limit;
    const isOther = Boolean(page.mask) && !page.rules.isAlike(size, references[0]);
    const hint = radio.nextElementSibling.querySelector(".hint");
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
  $("quality-field").hidden = !LOSSY.has($("format").value);
  refreshSeed();
  const size = chosenSize();
  const count = Number($("count").value) || 1;
  const all = cost.predict({ ...size, steps, references }) * count;
  $("make").textContent = count > 1 ? `Make ${count} pictures` : references.length ? "Make the edit" : "Make the picture";
  $("cost").textContent = about(all);
  $("settings-summary").textContent = `${size.width} × ${size.height}, ${some(steps, "step")}, ${seedMode()} seed`;
}

function refreshSeed() {
  const last = page.shown?.wish.seed;
  const mode = seedMode();
  $("seed-again").disabled = last === undefined;
  $("seed").readOnly = mode === "again";
  if (mode === "again") $("seed").value = last ?? "";
  if (mode === "random") $("seed").value = "";
}

/** A seed that is typed is meant. */
export function onFormInput({ target }) {
  if (target === $("seed") && seedMode() === "random") {
    const typed = $("seed").value;
    $("seed-fixed").checked = true;
    $("seed").value = typed;
  }
  if (target === $("seed-fixed") && !$("seed").value) $("seed").value = page.shown?.wish.seed ?? 0;
  refreshForm();
  keepForm();
}

// ---------------------------------------------------------------------------------------------
// Kept in this browser, and handed on as a link

function readForm() {
  const values = Object.fromEntries(TEXTS.map((id) => [id, $(id).value]));
  const { chosen: loras, isTouched } = picker.loras;
  return {
    ...values,
    model: model.id,
    size: chosen("size"),
    seedMode: seedMode(),
    seed: $("seed").value,
    loras: isTouched ? loras : null,
    open: ["adapters", "settings"].filter((id) => $(id).open),
  };
}

/** Fill in what `values` has; what another model was asked for is not for this one. */
function fillForm(values) {
  const names = values.model === model.id ? TEXTS : ["prompt", "count"];
  for (const id of names) if (values[id]) $(id).value = values[id];
  if (!$("format").value) $("format").selectedIndex = 0;
  const mode = $(`seed-${values.seedMode}`);
  if (mode) mode.checked = true;
  if (values.seedMode === "fixed") $("seed").value = values.seed;
  if (values.model === model.id) {
    const size = $(`size-${values.size}`);
    if (size) size.checked = true;
    if (values.loras) picker.restore({ chosen: values.loras });
  }
  refreshForm();
}

export function keepForm() {
  countTokens(styled($("prompt").value));
  if (page.rules) keep(NAME, readForm());
}

/** What was in the form; a link that was followed counts for more. */
function keptForm() {
  return { ...recall(NAME, {}), ...linked() };
}

/** The settings in the address, which never leave the browser there. */
function linked() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (!asked.has("prompt")) return {};
  history.replaceState(null, "", location.pathname + location.search);
  const { seed, size = "", loras, ...texts } = Object.fromEntries(asked);
  const [width, height] = size.split("x");
  const scaled = (loras ?? "").split(",").filter(Boolean).map((one) => one.split(":"));
  return {
    ...Object.fromEntries(Object.entries(texts).filter(([name]) => TEXTS.includes(name))),
    ...(size ? { size: $(`size-${size}`) ? size : "custom", width, height } : {}),
    ...(seed ? { seed, seedMode: "fixed" } : {}),
    ...(loras ? { loras: scaled.map(([name, scale]) => ({ name, scale: Number(scale) })) } : {}),
    model: model.id,
  };
}

/** An address that fills the form as this wish does; pictures to work from are not in it. */
export function asLink({ prompt, width, height, steps, seed, format, loras }) {
  const asked = new URLSearchParams({ prompt, size: `${width}x${height}`, steps, seed, format });
  if (loras.chosen.length) asked.set("loras", loras.chosen.map(({ name, scale }) => `${name}:${scale}`).join());
  return `${new URL(".", document.baseURI).href}#${asked}`;
}

/** A link that is followed on the page itself. */
export function followLink() {
  const values = linked();
  if (!values.model) return;
  if (page.rules) fillForm(values);
  else kept = { ...kept, ...values };
  keepForm();
}

/** Put back how a picture was made, seed included, as far as it is known. */
export function restoreForm({ prompt, steps, format, seed, quality, guidance, loras, ...size }) {
  const values = { prompt, steps, format, quality, guidance };
  for (const [id, value] of Object.entries(values)) if (value !== undefined) $(id).value = value;
  $("count").value = 1;
  if (seed !== undefined) {
    $("seed-fixed").checked = true;
    $("seed").value = seed;
  }
  if (loras) picker.restore(loras);
  if (size.width) setSize(size);
  refreshForm();
  keepForm();
}
