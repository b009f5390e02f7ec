// Sizes: which ones to offer, what the service makes of a reference, and what a picture costs.

const STEP = 16;
const MAX_RATIO = 3;
const REFERENCE_PIXELS = 1024 * 1024;
const RATIOS = [[1, 1], [3, 2], [2, 3], [16, 9], [9, 16]];

/** The sizes to choose from: the model's own in five shapes, a small and a large square. */
export function presets(model) {
  const area = model.width * model.height;
  const side = Math.sqrt(area);
  const wanted = [
    [side / 2, side / 2],
    ...RATIOS.map(([w, h]) => [Math.sqrt((area * w) / h), Math.sqrt((area * h) / w)]),
    [side * 2, side * 2],
  ];
  const found = new Map();
  for (const sides of wanted) {
    const [width, height] = sides.map((value) => snap(value, model.min_side, model.max_side));
    found.set(`${width}x${height}`, { width, height });
  }
  return [...found.values()].filter((size) => size.width * size.height <= model.max_pixels);
}

/** The nearest multiple of 16 within the limits. */
export function snap(value, least, most) {
  const steps = Math.round(Math.min(most, Math.max(least, value)) / STEP);
  return steps * STEP;
}

/** What a picture to work from becomes: at most a megapixel, multiples of 16, from 1:3 to 3:1. */
export function prepared({ width, height }) {
  const scale = Math.min(1, Math.sqrt(REFERENCE_PIXELS / (width * height)));
  const floor = (value) => Math.max(STEP, Math.floor((value * scale) / STEP) * STEP);
  const [w, h] = [floor(width), floor(height)];
  return { width: Math.min(w, MAX_RATIO * h), height: Math.min(h, MAX_RATIO * w) };
}

/** Whether two shapes are near enough for a mask: within 2 %. */
export function isAlike(one, other) {
  const ratio = (one.width / one.height) * (other.height / other.width);
  return Math.abs(ratio - 1) <= 0.02;
}

/** Learns what a picture costs: seconds for the prompt, and seconds per unit of work. */
export class Cost {
  #prompt = 0;
  #perWork = 0;
  #isGuess = true;

  /** Start from the service's warm-up picture, until one of ours has been measured. */
  guess(wish, seconds) {
    if (this.#isGuess && seconds > 0) this.#perWork = seconds / work(wish);
  }

  /** Take the seconds by stage that a picture took; the first one counts whole. */
  learn(wish, { text = 0, reference = 0, denoise = 0, decode = 0 }) {
    const seen = (reference + denoise + decode) / work(wish);
    if (!(seen > 0)) return;
    const weight = this.#isGuess ? 1 : 0.3;
    // A prompt that the service remembers costs nothing; that is no reason to hope for the next.
    this.#prompt = Math.max(text, this.#prompt + weight * (text - this.#prompt));
    this.#perWork += weight * (seen - this.#perWork);
    this.#isGuess = false;
  }

  /** Seconds on the card, 0 while nothing is known. */
  predict(wish) {
    return this.#perWork ? this.#prompt + this.#perWork * work(wish) : 0;
  }
}

// A step costs by pixel, those of the references included; text and decoding count as two steps.
function work({ width, height, steps, references }) {
  const beside = references.map(prepared).reduce((sum, size) => sum + size.width * size.height, 0);
  return (width * height + beside) * steps + width * height * 2;
}
