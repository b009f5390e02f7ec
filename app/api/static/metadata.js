// Reads from a picture's file how it was made: by this service, by AUTOMATIC1111 and those who
// write as it does, or by ComfyUI. Files are somebody else's: whatever cannot be read is no recipe.

const MOST_BYTES = 64 * 1024 * 1024;
const MOST_INFLATED = 4 * 1024 * 1024; // bytes of all compressed texts of a file
const PIECE = 1024; // bytes that are inflated at a time: they become a thousand times as many
const NAMES = new Set(["klein", "parameters", "prompt"]);
const MOST_LETTERS = [100_000, 4_000]; // of AUTOMATIC1111's text, and of its last line
const text = (bytes, label = "utf-8") => new TextDecoder(label).decode(bytes);
const latin = (bytes) => text(bytes, "latin1");

/** {from, prompt, seed, steps, width, height, guidance, loras}, as far as it is known, or null. */
export async function readRecipe(blob) {
  if (blob.size > MOST_BYTES) return null;
  try {
    const found = await readTexts(new Uint8Array(await blob.arrayBuffer()));
    return fromKlein(found) ?? fromComfy(found.prompt) ?? fromParameters(found.parameters);
  } catch {
    return null;
  }
}

function readTexts(bytes) {
  if (latin(bytes.subarray(1, 4)) === "PNG") return pngTexts(bytes);
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return jpegTexts(bytes);
  if (latin(bytes.subarray(0, 4)) === "RIFF" && latin(bytes.subarray(8, 12)) === "WEBP") return webpTexts(bytes);
  return {};
}

// ---------------------------------------------------------------------------------------------
// Containers

async function pngTexts(bytes) {
  const view = new DataView(bytes.buffer);
  const found = {};
  let room = MOST_INFLATED;
  const inflate = async (data) => {
    const whole = await inflated(data, room);
    room -= whole.length;
    return whole;
  };
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const type = latin(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    const end = data.indexOf(0);
    const name = latin(data.subarray(0, end));
    if (!NAMES.has(name)) continue;
    if (type === "tEXt") found[name] = latin(data.subarray(end + 1));
    if (type === "zTXt") found[name] = latin(await inflate(data.subarray(end + 2)));
    if (type === "iTXt") {
      const words = data.subarray(data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1);
      found[name] = text(data[end + 1] ? await inflate(words) : words);
    }
  }
  return found;
}

/** At most `most` bytes, or it throws: a file of kilobytes may hold gigabytes. */
async function inflated(data, most) {
  let at = 0;
  const pull = (into) => {
    if (at >= data.length) into.close();
    else into.enqueue(data.slice(at, (at += PIECE)));
  };
  const reader = new ReadableStream({ pull }).pipeThrough(new DecompressionStream("deflate")).getReader();
  const pieces = [];
  for (let left = most; ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(pieces).arrayBuffer());
    left -= value.length;
    if (left < 0) {
      reader.cancel().catch(() => {});
      throw new RangeError("too long");
    }
    pieces.push(value);
  }
}

function jpegTexts(bytes) {
  const view = new DataView(bytes.buffer);
  const found = {};
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
    const data = bytes.subarray(at + 4, at + 2 + view.getUint16(at + 2));
    if (bytes[at + 1] === 0xe1) Object.assign(found, exifTexts(data), xmpTexts(data));
    at += 2 + view.getUint16(at + 2);
  }
  return found;
}

function webpTexts(bytes) {
  const view = new DataView(bytes.buffer);
  const found = {};
  for (let at = 12; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at + 4, true);
    const data = bytes.subarray(at + 8, at + 8 + length);
    const type = latin(bytes.subarray(at, at + 4));
    if (type === "EXIF") Object.assign(found, exifTexts(data));
    if (type === "XMP ") Object.assign(found, xmpTexts(data));
    at += 8 + length + (length % 2);
  }
  return found;
}

/** The user's comment. */
function exifTexts(bytes) {
  const tiff = latin(bytes.subarray(0, 6)) === "Exif\0\0" ? bytes.subarray(6) : bytes;
  const order = latin(tiff.subarray(0, 2));
  if (order !== "II" && order !== "MM") return {};
  const view = new DataView(tiff.buffer, tiff.byteOffset, tiff.length);
  const isLittle = order === "II";
  const found = {};
  const read = (at) => {
    for (let left = view.getUint16(at, isLittle), entry = at + 2; left > 0; left -= 1, entry += 12) {
      const tag = view.getUint16(entry, isLittle);
      const length = view.getUint32(entry + 4, isLittle);
      const value = view.getUint32(entry + 8, isLittle);
      const data = length > 4 ? tiff.subarray(value, value + length) : tiff.subarray(entry + 8, entry + 8 + length);
      if (tag === 0x8769) read(value);
      else if (tag === 0x9286) found.parameters = commented(data, isLittle);
    }
  };
  read(view.getUint32(4, isLittle));
  return found;
}

/** Eight bytes name the alphabet; of UTF-16 the first letter tells the order of its bytes. */
function commented(data, isLittle) {
  const alphabet = latin(data.subarray(0, 8));
  const rest = data.subarray(8);
  const isWide = alphabet === "UNICODE\0";
  const order = rest[0] === 0 ? "utf-16be" : rest[1] === 0 ? "utf-16le" : isLittle ? "utf-16le" : "utf-16be";
  return text(rest, isWide ? order : "utf-8").replaceAll(/\0+$/g, "");
}

function xmpTexts(bytes) {
  const xmp = text(bytes);
  const [, klein] = /<klein:recipe>([^<]*)</.exec(xmp) ?? [];
  return klein ? { klein: unescaped(klein) } : {};
}

function unescaped(value) {
  const letters = { lt: "<", gt: ">", quot: '"', apos: "'", amp: "&" };
  return value.replaceAll(/&(\w+);/g, (whole, name) => letters[name] ?? whole);
}

// ---------------------------------------------------------------------------------------------
// Recipes

function fromKlein({ klein, parameters }) {
  const told = asObject(klein);
  if (!told) return null;
  const { guidance, loras, steps = told.num_inference_steps, size = "" } = told;
  const [width, height] = `${size}`.split("x");
  const known = { ...told, steps, guidance: guidance ?? told.guidance_scale };
  return recipe("klein-server", { ...fromParameters(parameters), ...(size ? { width, height } : {}), ...defined(known), loras });
}

/** The prompt, perhaps a negative one, and a line such as `Steps: 4, Seed: 7, Size: 512x512`. */
function fromParameters(parameters) {
  if (!parameters || parameters.length > MOST_LETTERS[0]) return null;
  const at = parameters.startsWith("Steps: ") ? 0 : parameters.lastIndexOf("\nSteps: ") + 1;
  const facts = parameters.slice(at).trim();
  if (!facts.startsWith("Steps: ") || facts.length > MOST_LETTERS[1]) return null;
  const pairs = facts.matchAll(/([\w ]+): *("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)/g);
  const told = Object.fromEntries([...pairs].map(([, name, value]) => [name.trim().toLowerCase(), value]));
  const [width, height] = (told.size ?? "").split("x");
  const words = parameters.slice(0, at);
  const end = `\n${words}`.lastIndexOf("\nNegative prompt:");
  const prompt = end < 0 ? words : words.slice(0, end);
  const loras = [...prompt.matchAll(/<lora:([^:<>]+)(?::([-\d.]+))?>/g)].map(([, name, scale = 1]) => ({ name, scale }));
  const plain = prompt.replaceAll(/ ?<lora:[^<>]*>/g, "").trim();
  const { steps, seed, "cfg scale": guidance } = told;
  return recipe("AUTOMATIC1111", { prompt: plain, steps, seed, guidance, width, height, loras });
}

/** Go from the node that samples to those that it is connected with. */
function fromComfy(prompt) {
  const nodes = asObject((prompt ?? "").replaceAll(/\bNaN\b/g, "null"));
  if (!nodes) return null;
  const samplers = Object.values(nodes).filter((node) => /sampler/i.test(node?.class_type ?? ""));
  const sampler = samplers.find(({ inputs }) => inputs?.latent_image);
  if (!sampler) return null;
  const follow = (from, names, type) => {
    const seen = new Set();
    const left = from.filter(Boolean);
    while (left.length) {
      const inputs = left.shift().inputs ?? {};
      for (const name of names) if (typeof inputs[name] === type) return inputs[name];
      for (const link of Object.values(inputs)) {
        const next = Array.isArray(link) ? nodes[link[0]] : null;
        if (next && !seen.has(next)) left.push(next);
        seen.add(next);
      }
    }
    return undefined;
  };
  const at = ({ inputs }, name) => (Array.isArray(inputs?.[name]) ? nodes[inputs[name][0]] : null);
  const guider = at(sampler, "guider");
  const words = [at(sampler, "positive"), guider && (at(guider, "positive") ?? at(guider, "conditioning"))];
  const latent = [at(sampler, "latent_image")];
  return recipe("ComfyUI", {
    prompt: follow(words, ["text", "prompt", "clip_l", "value"], "string"),
    seed: follow([sampler], ["seed", "noise_seed"], "number"),
    steps: follow([sampler], ["steps"], "number"),
    width: follow(latent, ["width"], "number"),
    height: follow(latent, ["height"], "number"),
  });
}

function recipe(from, { prompt, loras, format, ...numbers }) {
  const found = { from };
  if (typeof prompt === "string") found.prompt = prompt;
  if (["png", "jpeg", "webp"].includes(format)) found.format = format;
  for (const name of ["seed", "steps", "width", "height", "guidance"]) {
    const number = Number(numbers[name] ?? Number.NaN);
    if (Number.isFinite(number) && number >= 0) found[name] = number;
  }
  if (Array.isArray(loras)) found.loras = loras.map(({ name, scale }) => ({ name: `${name}`, scale: Number(scale) || 0 }));
  return found.prompt === undefined ? null : found;
}

function asObject(value) {
  try {
    const found = JSON.parse(value);
    return found && typeof found === "object" && !Array.isArray(found) ? found : null;
  } catch {
    return null;
  }
}

function defined(values) {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined && value !== null));
}
