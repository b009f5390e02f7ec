// Where a picture is on its way, told by the stream's comments, and how long it has taken.

export const PREVIEWS = 3;
export const STAGES = {
  queue: "Waiting",
  text: "Reading the prompt",
  reference: "Reading the pictures",
  denoise: "Denoising",
  decode: "Decoding",
  encode: "Encoding",
};

export class Clock {
  share = 0;
  text = "Asking for it";
  #started = performance.now();
  #before = null; // pictures that start before this one; null once it runs
  #queuedAt = 0;
  #onStep;

  /** `onStep` is called where a person would like to hear of it. */
  constructor(onStep) {
    this.#onStep = onStep;
  }

  /** Count its seconds from now on: it is the next. */
  start() {
    this.#started = performance.now();
  }

  get seconds() {
    return (performance.now() - this.#started) / 1000;
  }

  /** `queued 3`, `waking 4.0` (seconds), `denoise 2/4`, `timing text;dur=1.5, ...`, `peak 123` (bytes); whether it waits. */
  read(comment, made) {
    const [word, rest = ""] = comment.split(/ (.*)/s);
    const [step, steps] = rest.split("/").map(Number);
    if (word === "queued") {
      this.#queuedAt = performance.now();
      this.#queued(Number(rest));
      return true;
    }
    if (word === "waking") {
      this.text = "Waking the model";
      return true;
    }
    if (word === "timing") made.timing = timings(rest);
    else if (word === "peak") made.peak = Number(rest);
    else if (word in STAGES && steps > 0) this.#stepped(word, step, steps);
    return false;
  }

  preview(index) {
    this.share = Math.max(this.share, (index + 1) / (PREVIEWS + 1));
  }

  /** A queue of `size`, asked for at `askedAt`, has at most so many before this picture. */
  onQueue(size, askedAt) {
    if (this.#before === null || askedAt < this.#queuedAt) return;
    if (size > 0 && size - 1 < this.#before) this.#queued(size - 1);
  }

  #queued(before) {
    this.#before = before;
    this.text = before === 0 ? "Next in line" : before === 1 ? "One picture before this one" : `${before} pictures before this one`;
    this.#onStep();
  }

  #stepped(stage, step, steps) {
    const parts = { text: 0.03, reference: 0.06, decode: 0.95, encode: 0.98 };
    this.share = parts[stage] ?? 0.08 + (0.84 * step) / steps;
    this.#before = null;
    this.text = stage === "denoise" ? `Step ${step} of ${steps}` : STAGES[stage];
    if (stage === "denoise") this.#onStep();
  }
}

function timings(text) {
  const found = [...text.matchAll(/([a-z]+);dur=([\d.]+)/g)];
  return Object.fromEntries(found.map(([, stage, ms]) => [stage, Number(ms) / 1000]));
}
