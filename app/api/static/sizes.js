// Sizes: which ones to offer, what the service makes of a reference, and what a picture costs.
// The limits are the service's own, as `GET /health` hands them out.

const SHAPES = [
  ["Square", 1, 1],
  ["Landscape 3:2", 3, 2],
  ["Portrait 2:3", 2, 3],
  ["Wide 16:9", 16, 9],
  ["Tall 9:16", 9, 16],
];

/** The sizes that a model makes within the service's limits. */
export class SizeRules {
  constructor(model, limits) {
    this.model = model;
    this.limits = limits;
  }

  /** The sizes to choose from: the model's own in five shapes, a small and a large square. */
  presets() {
    const area = this.model.width * this.model.height;
    const side = Math.sqrt(area);
    const wanted = [
      ["Small square", side / 2, side / 2],
      ...SHAPES.map(([name, w, h]) => [name, Math.sqrt((area * w) / h), Math.sqrt((area * h) / w)]),
      ["Large square", side * 2, side * 2],
    ];
    const found = new Map();
    for (const [name, ...sides] of wanted) {
      const [width, height] = sides.map((value) => this.#snap(value));
      found.set(`${width}x${height}`, { name, width, height });
    }
    return [...found.values()].filter((size) => this.#isPossible(size));
  }

  /** What a picture to work from becomes: at most so many pixels, in steps, within the ratio. */
  prepared({ width, height }) {
    const { multiple, max_ratio } = this.limits;
    const scale = Math.min(1, Math.sqrt(this.model.reference_pixels / (width * height)));
    const floor = (value) => Math.max(multiple, Math.floor((value * scale) / multiple) * multiple);
    const [w, h] = [floor(width), floor(height)];
    return { width: Math.min(w, max_ratio * h), height: Math.min(h, max_ratio * w) };
  }

  /** Whether two shapes are near enough for a mask. */
  isAlike(one, other) {
    const ratio = (one.width / one.height) * (other.height / other.width);
    return Math.abs(ratio - 1) <= this.model.mask_tolerance;
  }

  #snap(value) {
    const { min_side, max_side, multiple } = this.limits;
    return Math.round(Math.min(max_side, Math.max(min_side, value)) / multiple) * multiple;
  }

  #isPossible({ width, height }) {
    const { max_pixels, max_ratio } = this.limits;
    const isInRatio = Math.max(width, height) <= max_ratio * Math.min(width, height);
    return isInRatio && width * height <= max_pixels;
  }
}

/**
 * Learns what a picture costs: seconds for the prompt, and seconds per unit of work; `prepare` says
 * what becomes of a reference.
 */
export class Cost {
  #prepare;
  #prompt = 0;
  #perWork = 0;
  #isGuess = true;

  constructor(prepare) {
    this.#prepare = prepare;
  }

  /** Start from the service's warm-up picture, until one of ours has been measured. */
  guess(wish, seconds) {
    if (this.#isGuess && seconds > 0) this.#perWork = seconds / this.#work(wish);
  }

  /** Take the seconds by stage that a picture took; the first one counts whole. */
  learn(wish, { text = 0, reference = 0, denoise = 0, decode = 0 }) {
    const seen = (reference + denoise + decode) / this.#work(wish);
    if (!(seen > 0)) return;
    const weight = this.#isGuess ? 1 : 0.3;
    // A prompt that the service remembers costs nothing; that is no reason to hope for the next.
    this.#prompt = Math.max(text, this.#prompt + weight * (text - this.#prompt));
    this.#perWork += weight * (seen - this.#perWork);
    this.#isGuess = false;
  }

  /** Seconds on the card, 0 while nothing is known. */
  predict(wish) {
    return this.#perWork ? this.#prompt + this.#perWork * this.#work(wish) : 0;
  }
  // A step costs by pixel, those of the references included; text and decoding count as two steps.
  #work({ width, height, steps, references }) {
    const sizes = references.map((reference) => this.#prepare(reference));
    const beside = sizes.reduce((sum, size) => sum + size.width * size.height, 0);
    return (width * height + beside) * steps + width * height * 2;
  }
}
