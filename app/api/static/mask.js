// Paints a mask over a picture: strokes in, a PNG out whose transparent pixels may change.

// The longer side of the canvas on screen; the PNG has the picture's own size.
const LEAST_SIDE = 640;
const MOST_SIDE = 1280;
const PAINT = "#ff3b6b";

/** One painting on one canvas; `onChange` is told the painted share, 0 to 1. */
export class Painter {
  #canvas;
  #picture = null;
  #layer = document.createElement("canvas");
  #strokes = [];
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
    this.#strokes = [...strokes];
    this.#cursor = null;
    for (const canvas of [this.#canvas, this.#layer]) {
      canvas.width = Math.max(1, Math.round(picture.width * scale));
      canvas.height = Math.max(1, Math.round(picture.height * scale));
    }
    this.#changed();
  }

  undo() {
    this.#strokes = this.#strokes.slice(0, -1);
    this.#changed();
  }

  clear() {
    this.#strokes = [];
    this.#changed();
  }

  fill() {
    this.#strokes = [...this.#strokes, { isAll: true }];
    this.#changed();
  }

  /** The share of the picture that may change. */
  coverage() {
    const small = document.createElement("canvas");
    small.width = small.height = 64;
    const context = small.getContext("2d", { willReadFrequently: true });
    context.drawImage(this.#layer, 0, 0, 64, 64);
    const { data } = context.getImageData(0, 0, 64, 64);
    let painted = 0;
    for (let i = 3; i < data.length; i += 4) painted += data[i];
    return painted / (255 * 64 * 64);
  }

  /** The mask as the API takes it: of the picture's size, opaque where nothing may change. */
  toBlob() {
    const mask = this.#sized();
    const context = mask.getContext("2d");
    context.fillRect(0, 0, mask.width, mask.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.#layer, 0, 0, mask.width, mask.height);
    return new Promise((resolve) => mask.toBlob(resolve, "image/png"));
  }

  /** What was painted, in colour, to lay over a thumbnail. */
  toOverlay() {
    const small = document.createElement("canvas");
    const scale = 256 / Math.max(this.#layer.width, this.#layer.height);
    small.width = Math.max(1, Math.round(this.#layer.width * scale));
    small.height = Math.max(1, Math.round(this.#layer.height * scale));
    const context = small.getContext("2d");
    context.globalAlpha = 0.6;
    context.drawImage(this.#layer, 0, 0, small.width, small.height);
    return new Promise((resolve) => small.toBlob(resolve, "image/png"));
  }

  #sized() {
    const canvas = document.createElement("canvas");
    canvas.width = this.#picture.width;
    canvas.height = this.#picture.height;
    return canvas;
  }

  get #radius() {
    return (Math.max(this.#canvas.width, this.#canvas.height) * Number(this.brush())) / 200;
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

  #stroke({ isAll, isEraser, radius, points }) {
    const context = this.#layer.getContext("2d");
    context.globalCompositeOperation = isEraser ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = PAINT;
    if (isAll) {
      context.fillRect(0, 0, this.#layer.width, this.#layer.height);
      return;
    }
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
