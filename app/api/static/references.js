// The pictures to work from, and the mask over the first of them.

import { $, blobOf, button, canvasOf, element, isOff, onClick, saveAs, setOff } from "./dom.js";
import { hideError, showError } from "./errors.js";
import { knownLimits } from "./form.js";
import { Painter, asStroke, overlayOf } from "./mask.js";
import { openExtend } from "./outpaint.js";
import { identity, page, tell } from "./state.js";
import { packed, stored, unpacked } from "./store.js";
import { Refusal } from "./stream.js";
import { some } from "./words.js";

const MAX_UPLOAD_PIXELS = 12_000_000; // more is drawn smaller first: the service scales to 1 MP
const UPLOADED_AS_IS = new Set(["image/png", "image/jpeg", "image/webp"]);

export async function addReferences(files) {
  try {
    for (const file of files) await addReference(file);
  } catch (error) {
    showError(error);
  }
  changed();
}

/** Work from these alone. */
export async function replaceReferences(files) {
  page.references = [];
  page.mask = null;
  await addReferences(files);
}

/** Put back what a picture was made from. */
export async function restoreReferences(wish) {
  const { references, mask } = await unpacked(wish);
  page.references = references.map((one) => ({ ...one, url: one.url ?? URL.createObjectURL(one.blob) }));
  page.mask = mask && references.length ? asMask(mask.blob, mask) : null;
  changed();
}

/** Work from a picture and the mask that was made with it, instead of the first one. */
async function workFrom(blob, name, mask) {
  const others = page.references.slice(1);
  await replaceReferences([new File([blob], name, { type: blob.type })]);
  page.references.push(...others);
  page.mask = asMask(mask);
  changed();
}

/** What lay in the form when the page was left. */
export async function restoreDesk() {
  const desk = await (await stored).get("desk", "form");
  if (desk && !page.references.length) await restoreReferences(desk);
}

function asMask(blob, { id = identity(), strokes, overlay } = {}) {
  return { id, blob, strokes, overlay: overlay ?? asStroke(blob).then(overlayOf).then((it) => URL.createObjectURL(it)) };
}

async function addReference(file) {
  const most = knownLimits().max_references;
  if (page.references.length >= most) {
    throw new Refusal(`At most ${some(most, "picture")} can be worked from.`, { param: "image" });
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
  const id = identity();
  const number = page.references.length + 1;
  if (UPLOADED_AS_IS.has(file.type) && width * height <= MAX_UPLOAD_PIXELS) {
    const name = file.name || `picture-${number}.png`;
    return { id, name, blob: file, url: URL.createObjectURL(file), width, height };
  }
  const scale = Math.min(1, Math.sqrt(MAX_UPLOAD_PIXELS / 3 / (width * height)));
  const [canvas, context] = canvasOf(width * scale, height * scale);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await blobOf(canvas);
  const url = URL.createObjectURL(blob);
  return { id, name: `picture-${number}.png`, blob, url, width: canvas.width, height: canvas.height };
}

function removeReference(index) {
  page.references.splice(index, 1);
  if (index === 0) page.mask = null;
  changed();
  ($("references").querySelectorAll("button.remove")[index] ?? $("add")).focus();
}

function changed() {
  showReferences();
  keepDesk();
}

async function keepDesk() {
  try {
    const store = await stored;
    const { kept, entries } = await packed({ references: page.references, mask: page.mask });
    await store.change([...entries, ["desk", kept, "form"]]);
  } catch {
    // The gallery says that there is no room.
  }
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
      actions.append(button("Extend", "extend", () => openExtend(reference, workFrom)));
    }
    const remove = button("Remove", "remove", () => removeReference(index));
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    actions.append(remove);
    const name = element("p", { textContent: reference.name, title: reference.name });
    return element("li", {}, thumb, element("div", { className: "beside" }, name, actions));
  });
  $("references").replaceChildren(...items);
  tell("references");
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
  changed();
  $("references").querySelector("button.mask").focus();
}

// ---------------------------------------------------------------------------------------------
// The mask's dialog

const painter = new Painter($("mask-canvas"), {
  tool: () => document.querySelector("input[name=tool]:checked").value,
  brush: $("brush"),
  onChange: (share) => {
    const isEmpty = share < 0.0005;
    $("coverage").textContent = isEmpty ? "Nothing painted yet" : `${Math.max(1, Math.round(share * 100))} % may change`;
    for (const id of ["mask-done", "mask-save"]) setOff(id, isEmpty);
  },
});

async function openMask() {
  const { mask } = page;
  const bitmap = await createImageBitmap(page.references[0].blob);
  const strokes = mask && (mask.strokes ?? [await asStroke(await mask.blob)]);
  askToDiscard(false);
  $("mask-dialog").showModal();
  painter.open(bitmap, strokes ?? []);
  $("mask-canvas").focus();
}

/** The page is free at once, and the focus moves but now: whoever asks for the edit waits for the PNG. */
function keepMask(event) {
  event.preventDefault();
  if (isOff("mask-done")) return;
  const overlay = painter.toOverlay().then((blob) => URL.createObjectURL(blob));
  page.mask = { id: identity(), blob: painter.toBlob(), strokes: painter.strokes, overlay };
  $("mask-dialog").close();
  changed();
  $("references").querySelector("button.mask").focus();
}

async function saveMask() {
  if (!isOff("mask-save")) saveAs(await painter.toBlob(), "mask.png");
}

async function loadMask() {
  const [file] = $("mask-file").files;
  $("mask-file").value = "";
  try {
    if (file) painter.add(await asStroke(file));
  } catch {
    $("coverage").textContent = `${file.name} is no picture that the browser can read.`;
  }
}

/** Leave, but ask before what was painted is lost. */
function leaveMask(event) {
  event.preventDefault();
  if (painter.isChanged && $("mask-ask").hidden) askToDiscard(true);
  else if ($("mask-ask").hidden) $("mask-dialog").close();
  else askToDiscard(false);
}

function askToDiscard(isAsked) {
  $("mask-ask").hidden = !isAsked;
  $("mask-finish").hidden = isAsked;
  if (isAsked) $("mask-go-on").focus();
  else if ($("mask-dialog").open) $("mask-canvas").focus();
}

export function wireReferences() {
  $("mask-form").addEventListener("submit", keepMask);
  onClick("mask-cancel", leaveMask);
  $("mask-dialog").addEventListener("cancel", leaveMask);
  $("mask-dialog").addEventListener("keydown", (event) => {
    if (event.key === "Escape") leaveMask(event);
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) painter.undo();
  });
  onClick("mask-go-on", () => askToDiscard(false));
  onClick("mask-discard", () => $("mask-dialog").close());
  onClick("mask-save", saveMask);
  onClick("mask-load", () => $("mask-file").click());
  $("mask-file").addEventListener("change", loadMask);
  onClick("mask-undo", () => painter.undo());
  onClick("mask-all", () => painter.add({ isAll: true }));
  onClick("mask-invert", () => painter.add({ isInverted: true }));
  onClick("mask-feather", () => painter.feather());
  onClick("mask-clear", () => painter.clear());
  onClick("add", () => {
    hideError();
    $("files").click();
  });
}
