// Paints a mask over a picture: strokes in, a PNG out whose transparent pixels may change.

import { canvasOf, blobOf } from "./dom.js";

// The longer side of the canvas on screen; the PNG has the picture's own size.
const LEAST_SIDE = 640;
const MOST_SIDE = 1280;
const PAINT = "#ff3b6b";

/** A mask that is there already, as a stroke: transparent pixels may change, or, of one without, white. */
export async function asStroke(blob) {
  const bitmap = await createImageBitmap(blob);
  const [image, context] = canvasOf(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  const { data } = pixels;
  let least = 255;
  for (let i = 3; i < data.length; i += 4) least = Math.min(least, data[i]);
  const colour = [1, 3, 5].map((at) => Number.parseInt(PAINT.slice(at, at + 2), 16));
  for (let i = 0; i < data.length; i += 4) {
    const light = (data[i] + data[i + 1] + data[i + 2]) / 3;
    data[i + 3] = least < 255 ? 255 - data[i + 3] : light;
    for (let part = 0; part < 3; part += 1) data[i + part] = colour[part];
  }
  context.putImageData(pixels, 0, 0);
  return { image };
}

/** What a mask lets change, in colour, to lay over a thumbnail. */
export function overlayOf({ image }) {
  const scale = Math.min(1, 256 / Math.max(image.width, image.height));
  const [small, context] = canvasOf(image.width * scale, image.height * scale);
  context.globalAlpha = 0.6;
  context.drawImage(image, 0, 0, small.width, small.height);
  return blobOf(small);
}

/** One painting on one canvas; `brush` is the slider of its size, `onChange` is told the painted share, 0 to 1. */
export class Painter {
  #canvas;
  #picture = null;
  #layer = document.createElement("canvas");
  #strokes = [];
  #opened = [];
  #current = null;
  #cursor = null;
  #isPenDown = false;

  constructor(canvas, { tool, brush, onChange }) {
    this.#canvas = canvas;
    this.tool = tool;
    this.brush = brush;
    this.onChange = onChange;
    canvas.addEventListener("pointerdown", (event) => this.#onDown(event));
    canvas.addEventListener("pointermove", (event) => this.#onMove(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => this.#end());
    }
    canvas.addEventListener("pointerleave", () => this.#hover(null));
    canvas.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
    canvas.addEventListener("keyup", (event) => {
      if (event.key === " ") this.#lift();
    });
    canvas.addEventListener("blur", () => {
      this.#lift();
      this.#hover(null);
    });
  }

  /** The strokes, to go on with later. */
  get strokes() {
    return this.#strokes;
  }

  /** Lay `picture` (an ImageBitmap) under the canvas, with what was painted before. */
  open(picture, strokes = []) {
    const longest = Math.max(picture.width, picture.height);
    const scale = Math.min(MOST_SIDE, Math.max(LEAST_SIDE, longest)) / longest;
    this.#picture = picture;
    this.#strokes = this.#opened = [...strokes];
    this.#cursor = null;
    for (const canvas of [this.#canvas, this.#layer]) {
      canvas.width = Math.max(1, Math.round(picture.width * scale));
      canvas.height = Math.max(1, Math.round(picture.height * scale));
    }
    this.#changed();
  }

  /** Whether anything was painted since it was opened. */
  get isChanged() {
    const [one, other] = [this.#strokes, this.#opened];
    return one.length !== other.length || one.some((stroke, index) => stroke !== other[index]);
  }

  undo() {
    this.#strokes = this.#strokes.slice(0, -1);
    this.#changed();
  }

  clear() {
    this.#strokes = [];
    this.#changed();
  }

  /** Everything, the opposite, or a mask that was there already. */
  add(stroke) {
    this.#strokes = [...this.#strokes, stroke];
    this.#changed();
  }

  /** Let the edge fade over the brush's width. */
  feather() {
    this.add({ fade: this.#radius / 2 });
  }

  /** The share of the picture that may change. */
  coverage() {
    const [, context] = canvasOf(64, 64);
    context.drawImage(this.#layer, 0, 0, 64, 64);
    const { data } = context.getImageData(0, 0, 64, 64);
    let painted = 0;
    for (let i = 3; i < data.length; i += 4) painted += data[i];
    return painted / (255 * 64 * 64);
  }

  /** The mask as the API takes it: of the picture's size, opaque where nothing may change. */
  toBlob() {
    const [mask, context] = canvasOf(this.#picture.width, this.#picture.height);
    context.fillRect(0, 0, mask.width, mask.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.#layer, 0, 0, mask.width, mask.height);
    return blobOf(mask);
  }

  /** What was painted, in colour, to lay over a thumbnail. */
  toOverlay() {
    return overlayOf({ image: this.#layer });
  }

  get #radius() {
    return (Math.max(this.#canvas.width, this.#canvas.height) * Number(this.brush.value)) / 200;
  }

  #onDown(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#point(event));
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
  }

  #onMove(event) {
    if (this.#current) {
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) this.#extend(this.#point(move));
    }
    this.#hover(this.#point(event));
  }

  #onWheel(event) {
    event.preventDefault();
    this.#resize(event.deltaY < 0 ? 1 : -1);
  }

  #resize(step) {
    this.brush.value = Number(this.brush.value) + step;
    this.#show();
  }

  #onKey(event) {
    const { width, height } = this.#canvas;
    const step = event.shiftKey ? this.#radius * 2 : this.#radius / 2;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const at = this.#cursor ?? [width / 2, height / 2];
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const to = [clamp(at[0] + x * step, width), clamp(at[1] + y * step, height)];
      if (this.#isPenDown) this.#extend(to);
      this.#hover(to);
    } else if (event.key === " ") {
      if (!this.#isPenDown) this.#begin(at);
      this.#isPenDown = true;
      this.#hover(at);
    } else if (event.key === "[" || event.key === "]") {
      this.#resize(event.key === "]" ? 1 : -1);
    } else {
      return;
    }
    event.preventDefault();
  }

  #lift() {
    this.#isPenDown = false;
    this.#end();
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.#canvas.width,
      ((event.clientY - box.top) / box.height) * this.#canvas.height,
    ];
  }

  #begin(point) {
    this.#current = { isEraser: this.tool() === "erase", radius: this.#radius, points: [point] };
    this.#stroke(this.#current);
    this.#show();
  }

  #extend(point) {
    if (!this.#current) return;
    const last = this.#current.points.at(-1);
    this.#current.points.push(point);
    this.#stroke({ ...this.#current, points: [last, point] });
  }

  #end() {
    if (!this.#current) return;
    this.#strokes = [...this.#strokes, this.#current];
    this.#current = null;
    this.onChange(this.coverage());
  }

  #hover(point) {
    this.#cursor = point;
    this.#show();
  }

  #changed() {
    const context = this.#layer.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, this.#layer.width, this.#layer.height);
    for (const stroke of this.#strokes) this.#stroke(stroke);
    this.#show();
    this.onChange(this.coverage());
  }

  #stroke({ isAll, isInverted, image, fade, ...line }) {
    const { width, height } = this.#layer;
    const context = this.#layer.getContext("2d");
    context.globalCompositeOperation = isInverted ? "xor" : line.isEraser ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = PAINT;
    if (isAll || isInverted) context.fillRect(0, 0, width, height);
    else if (image) context.drawImage(image, 0, 0, width, height);
    else if (fade) this.#fade(context, fade);
    else this.#line(context, line);
  }

  #fade(context, fade) {
    const { width, height } = this.#layer;
    const [before, copy] = canvasOf(width, height);
    copy.drawImage(this.#layer, 0, 0);
    context.clearRect(0, 0, width, height);
    context.filter = `blur(${fade.toFixed(1)}px)`;
    context.drawImage(before, 0, 0);
    context.filter = "none";
  }

  #line(context, { radius, points }) {
    context.beginPath();
    if (points.length === 1) {
      // A line of no length is not drawn, round ends or not.
      context.arc(...points[0], radius, 0, 2 * Math.PI);
      context.fill();
      return;
    }
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = radius * 2;
    context.moveTo(...points[0]);
    for (const point of points.slice(1)) context.lineTo(...point);
    context.stroke();
  }

  #show() {
    if (!this.#picture) return;
    const { width, height } = this.#canvas;
    const context = this.#canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(this.#picture, 0, 0, width, height);
    context.globalAlpha = 0.6;
    context.drawImage(this.#layer, 0, 0);
    context.globalAlpha = 1;
    if (!this.#cursor) return;
    for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.beginPath();
      context.arc(...this.#cursor, this.#radius, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}

function clamp(value, most) {
  return Math.min(most, Math.max(0, value));
}
