// Finds and makes elements. A text is always set as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function button(text, className, act) {
  const made = element("button", { type: "button", textContent: text, className });
  made.addEventListener("click", act);
  return made;
}

export function onClick(id, act) {
  $(id).addEventListener("click", act);
}

export function setPressed(id, isPressed) {
  $(id).setAttribute("aria-pressed", String(Boolean(isPressed)));
}

export function isOff(id) {
  return $(id).getAttribute("aria-disabled") === "true";
}

export function setOff(id, isWanted) {
  $(id).setAttribute("aria-disabled", String(isWanted));
}

export function canvasOf(width, height) {
  const canvas = element("canvas", { width: Math.max(1, Math.round(width)), height: Math.max(1, Math.round(height)) });
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })];
}

export function blobOf(canvas, type = "image/png", quality = undefined) {
  return new Promise((resolve) => canvas.toBlob(resolve, type, quality));
}

export function saveAs(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
