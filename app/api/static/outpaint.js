// Extends a picture past its edges: padded on any side, with the mask that lets only what is new
// change.

import { $, blobOf, canvasOf, isOff, onClick, setOff } from "./dom.js";
import { page } from "./state.js";

const SIDES = ["left", "top", "right", "bottom"];
const SEAM = 8; // pixels of the picture along its edge that may change, so that none is seen

let opened = null; // {reference, bitmap, done}

/** Where a picture of this size lies in one that is larger on these sides. */
export function extended({ width, height }, pads, rules) {
  const { multiple } = rules.limits;
  const [left, right, wide] = axis(width, pads.left, pads.right, multiple);
  const [top, bottom, high] = axis(height, pads.top, pads.bottom, multiple);
  const size = rules.prepared({ width: wide, height: high });
  const scale = [size.width / wide, size.height / high];
  return { ...size, scale, pads: { left, top, right, bottom } };
}

/** Sides come in steps: what is missing is added where something is added, or cut off. */
function axis(side, before, after, multiple) {
  if (!before && !after) return [0, 0, Math.max(multiple, Math.floor(side / multiple) * multiple)];
  const whole = Math.ceil((side + before + after) / multiple) * multiple;
  const rest = whole - side - before - after;
  return after ? [before, after + rest, whole] : [before + rest, 0, whole];
}

/** The padded picture, its edges drawn out as far as it is larger; and its mask. */
function draw(bitmap, { width, height, scale: [x, y], pads }) {
  const [picture, context] = canvasOf(width, height);
  const [mask, keep] = canvasOf(width, height);
  const [w, h] = [bitmap.width, bitmap.height];
  const columns = [[0, 1, 0, pads.left], [0, w, pads.left, w], [w - 1, 1, pads.left + w, pads.right]];
  const rows = [[0, 1, 0, pads.top], [0, h, pads.top, h], [h - 1, 1, pads.top + h, pads.bottom]];
  context.scale(x, y);
  for (const [sx, sw, dx, dw] of columns) {
    for (const [sy, sh, dy, dh] of rows) if (dw && dh) context.drawImage(bitmap, sx, sy, sw, sh, dx, dy, dw, dh);
  }
  const edges = Object.fromEntries(SIDES.map((side) => [side, pads[side] && pads[side] + SEAM]));
  keep.fillRect(
    edges.left * x,
    edges.top * y,
    width - (edges.left + edges.right) * x,
    height - (edges.top + edges.bottom) * y,
  );
  return { picture, mask };
}

function typedPads() {
  return Object.fromEntries(SIDES.map((side) => [side, Math.max(0, Math.round(Number($(`extend-${side}`).value)) || 0)]));
}

/** `done` gets the padded picture, its name and the mask. */
export async function openExtend(reference, done) {
  opened = { reference, done, bitmap: await createImageBitmap(reference.blob) };
  for (const side of SIDES) $(`extend-${side}`).value = 0;
  around(0.25, ["left", "right"]);
  $("extend-dialog").showModal();
}

function around(share, sides) {
  const { width, height } = opened.reference;
  for (const side of SIDES) {
    const whole = side === "left" || side === "right" ? width : height;
    $(`extend-${side}`).value = sides.includes(side) ? Math.round(whole * share) : 0;
  }
  showExtended();
}

function showExtended() {
  const plan = extended(opened.reference, typedPads(), page.rules);
  const { max_ratio } = page.rules.limits;
  const isLonger = Math.max(plan.width, plan.height) >= max_ratio * Math.min(plan.width, plan.height);
  const isSame = !Object.values(typedPads()).some(Boolean);
  const isScaled = plan.scale[0] < 0.999 ? ", the picture itself made smaller" : "";
  const note = isLonger ? `No side may be ${max_ratio} times the other or more` : `${plan.width} × ${plan.height}${isScaled}`;
  $("extend-size").textContent = isSame ? "Say how many pixels to add, and where" : note;
  setOff("extend-done", isSame || isLonger);
  const { picture, mask } = draw(opened.bitmap, plan);
  const canvas = $("extend-canvas");
  Object.assign(canvas, { width: plan.width, height: plan.height });
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.drawImage(picture, 0, 0);
  context.globalCompositeOperation = "destination-over";
  context.globalAlpha = 0.35;
  context.drawImage(picture, 0, 0);
}

async function extend(event) {
  event.preventDefault();
  if (isOff("extend-done")) return;
  const { reference, bitmap, done } = opened;
  const { picture, mask } = draw(bitmap, extended(reference, typedPads(), page.rules));
  $("extend-dialog").close();
  const [one, other] = await Promise.all([blobOf(picture), blobOf(mask)]);
  await done(one, `extended-${reference.name.replace(/\.\w+$/, "")}.png`, other);
  $("prompt").focus();
}

export function wireExtend() {
  for (const side of SIDES) $(`extend-${side}`).addEventListener("input", showExtended);
  onClick("extend-wider", () => around(0.25, ["left", "right"]));
  onClick("extend-taller", () => around(0.25, ["top", "bottom"]));
  onClick("extend-around", () => around(0.25, SIDES));
  $("extend-form").addEventListener("submit", extend);
  onClick("extend-cancel", () => $("extend-dialog").close());
}
