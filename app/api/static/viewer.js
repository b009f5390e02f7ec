// The picture on show: how large, beside which other one, and what is written under it.

import { asText } from "./adapters.js";
import { $, onClick, setPressed } from "./dom.js";
import { fileName } from "./recipes.js";
import { page } from "./state.js";
import { stored, unpacked } from "./store.js";
import { bytes, seconds, some } from "./words.js";

let shownUrl = ""; // of the picture on show
let otherUrl = ""; // of the one that it is compared with
let turn = 0; // the latest picture wins

/** Empty with its examples, working until a preview has come, or done. */
export function showFrame(state) {
  $("frame").dataset.state = state;
  $("empty").hidden = state !== "empty";
  $("sheet").hidden = state === "empty" || !$("picture").src;
}

function frameFor({ width, height }) {
  $("frame").style.setProperty("--ratio", width / height);
  $("frame").style.setProperty("--widest", `${Math.round(width * 2.5)}px`);
}

/** A picture that is to come, where there is none to stay until its first preview. */
export function expect(wish) {
  if (!page.shown) announce(wish);
  showFrame("working");
}

/** Back to the picture that was on show, if any. */
export function rest() {
  if (page.shown) show(page.shown);
  else {
    $("picture").removeAttribute("src");
    $("caption").hidden = true;
    showFrame("empty");
  }
}

function announce(wish) {
  caption(wish, "On its way");
  $("viewing").inert = $("actions").inert = true;
  frameFor(wish);
}

export async function showPreview(wish, blob, share) {
  turn += 1;
  endComparing();
  announce(wish);
  const url = URL.createObjectURL(blob);
  await put(url, "A preview of the picture on its way", 9 * (1 - share), turn);
  showFrame("working");
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export async function show(made) {
  const { wish } = made;
  turn += 1;
  const mine = turn;
  page.shown = made;
  endComparing();
  const facts = [
    `${wish.width} × ${wish.height}`,
    some(wish.steps, "step"),
    `seed ${wish.seed}`,
    asText(wish.loras.chosen),
    `${wish.format.toUpperCase()}, ${bytes(made.bytes)}`,
    seconds(made.timing?.total ?? made.seconds),
  ];
  caption(wish, facts.filter(Boolean).join(" · "), made.warnings);
  $("viewing").inert = $("actions").inert = false;
  setPressed("favourite", Boolean(made.isFavourite));
  $("before").hidden = !wish.references.length;
  frameFor(wish);
  const url = URL.createObjectURL(await fileOf(made));
  if (mine !== turn) {
    URL.revokeObjectURL(url);
    return;
  }
  Object.assign($("download"), { href: url, download: fileName(wish) });
  showFrame($("stage").getAttribute("aria-busy") === "true" ? "working" : "done");
  await put(url, wish.prompt, 0, mine);
  URL.revokeObjectURL(shownUrl);
  shownUrl = url;
}

/** The file of a picture, from the store once it is there. */
export async function fileOf(made) {
  return made.blob ?? (await stored).get("files", made.id);
}

function caption(wish, facts, warnings = []) {
  $("caption").hidden = false;
  $("caption-prompt").textContent = wish.prompt;
  $("caption-facts").textContent = facts;
  $("caption-warnings").textContent = warnings.join(" ");
  $("caption-warnings").hidden = !warnings.length;
}

/** Swap the picture once it is decoded, so that nothing flickers. */
async function put(url, alt, blurPx, mine) {
  const image = new Image();
  image.src = url;
  await image.decode().catch(() => {});
  if (mine !== turn) return;
  const picture = $("picture");
  picture.src = url;
  picture.alt = alt;
  picture.style.setProperty("--blur", `${blurPx.toFixed(1)}px`);
  $("sheet").hidden = false;
  measure();
  await picture.decode().catch(() => {});
}

// ---------------------------------------------------------------------------------------------
// One pixel for one pixel, moved about by hand

export function isZoomed() {
  return $("frame").dataset.zoom === "true";
}

export function zoom(isWanted = !isZoomed()) {
  const frame = $("frame");
  frame.dataset.zoom = String(isWanted);
  setPressed("zoom", isWanted);
  if (isWanted) {
    frame.tabIndex = 0;
    measure();
    frame.scrollTo((frame.scrollWidth - frame.clientWidth) / 2, (frame.scrollHeight - frame.clientHeight) / 2);
  } else {
    frame.removeAttribute("tabindex");
  }
}

function measure() {
  const { naturalWidth, naturalHeight } = $("picture");
  $("sheet").style.setProperty("--w", `${naturalWidth / devicePixelRatio}px`);
  $("sheet").style.setProperty("--h", `${naturalHeight / devicePixelRatio}px`);
}

function pan(event) {
  const frame = $("frame");
  if (!isZoomed() || event.pointerType !== "mouse" || event.button !== 0) return;
  event.preventDefault();
  frame.focus({ preventScroll: true });
  frame.setPointerCapture(event.pointerId);
  const move = ({ movementX, movementY }) => frame.scrollBy(-movementX, -movementY);
  frame.addEventListener("pointermove", move);
  const stop = () => frame.removeEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, stop, { once: true });
}

// ---------------------------------------------------------------------------------------------
// Two pictures in one place, with a line between them

/** Lay `blob` over the left side of the picture; `name` says what is there. */
async function compare(blob, name) {
  endComparing();
  otherUrl = URL.createObjectURL(blob);
  $("other").src = otherUrl;
  $("other").alt = name;
  $("other").hidden = false;
  $("split").hidden = false;
  $("divide-name").textContent = name;
  divide(50);
  $("divide").focus({ preventScroll: true });
  await $("other").decode().catch(() => {});
}

function divide(share) {
  $("divide").value = share;
  $("sheet").style.setProperty("--at", `${share}%`);
}

export function isComparing() {
  return !$("other").hidden;
}

export function endComparing() {
  $("other").hidden = true;
  $("split").hidden = true;
  $("other").removeAttribute("src");
  URL.revokeObjectURL(otherUrl);
  $("before").setAttribute("aria-pressed", "false");
}

/** Beside the picture that it was made from; pressed again, alone. */
async function toggleBefore() {
  if ($("before").getAttribute("aria-pressed") === "true") {
    endComparing();
    return;
  }
  const { references } = await unpacked(page.shown.wish);
  if (!references.length) return;
  await compare(references[0].blob, "Before");
  $("before").setAttribute("aria-pressed", "true");
}

/** Beside another picture of the history. */
export async function compareWith(made) {
  await compare(await fileOf(made), `Seed ${made.wish.seed}`);
}

export function wireViewer() {
  onClick("zoom", () => zoom());
  $("frame").addEventListener("dblclick", () => page.shown && zoom());
  $("frame").addEventListener("pointerdown", pan);
  $("divide").addEventListener("input", () => divide($("divide").value));
  onClick("before", toggleBefore);
}
