// Writes down how to get the same picture without this page. The key is never part of it.

const EXTENSIONS = { jpeg: "jpg" }; // where it is not the format's own name

/** The name under which a picture is saved. */
export function fileName(wish) {
  return `klein-${wish.seed}.${EXTENSIONS[wish.format] ?? wish.format}`;
}

/** A shell command; pictures to work from are expected beside it, under the names in it. */
export function asCurl(wish, base, needsKey) {
  const key = needsKey ? ` \\\n  -H "authorization: Bearer $KLEIN_API_KEY"` : "";
  if (!wish.references.length) {
    const body = {
      prompt: wish.prompt,
      ...sides(wish),
      num_inference_steps: wish.steps,
      seed: wish.seed,
      output_format: wish.format,
      ...how(wish),
      ...adapters(wish),
    };
    return (
      `curl -fsS ${quote(`${base}generate`)}${key} \\\n  -H 'content-type: application/json' \\\n` +
      `  -d ${quote(JSON.stringify(body))} \\\n  -o ${fileName(wish)}\n`
    );
  }
  const texts = { prompt: wish.prompt, ...fields(wish) };
  const parts = [
    ...formTexts(texts).map(([name, value]) => `--form-string ${quote(`${name}=${value}`)}`),
    ...wish.references.map(({ name }) => `-F ${upload("image[]", name)}`),
    ...(wish.mask ? [`-F ${upload("mask", "mask.png")}`] : []),
  ];
  return (
    `curl -fsS ${quote(`${base}v1/images/edits`)}${key} \\\n  ${parts.join(" \\\n  ")} \\\n` +
    `  | sed 's/.*"b64_json": *"\\([^"]*\\)".*/\\1/' | base64 -d > ${fileName(wish)}\n`
  );
}

/** A script for OpenAI's Python package. */
export function asPython(wish, base, needsKey) {
  const key = needsKey ? 'os.environ["KLEIN_API_KEY"]' : '"none"';
  const call = wish.references.length
    ? [
        "client.images.edit(",
        `    image=[${wish.references.map(({ name }) => `open(${python(name)}, "rb")`).join(", ")}],`,
        ...(wish.mask ? ['    mask=open("mask.png", "rb"),'] : []),
      ]
    : ["client.images.generate("];
  const { size, output_format, ...extra } = fields(wish);
  return [
    "import base64",
    ...(needsKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(`${base}v1`)}, api_key=${key})`,
    `answer = ${call[0]}`,
    ...call.slice(1),
    `    prompt=${python(wish.prompt)},`,
    `    size=${python(size)},`,
    `    output_format=${python(output_format)},`,
    `    extra_body=${python(extra)},`,
    ")",
    `with open(${python(fileName(wish))}, "wb") as file:`,
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
    "",
  ].join("\n");
}

/** What the images API is asked for besides prompt and pictures. */
export function fields(wish) {
  return {
    size: wish.isAuto ? "auto" : `${wish.width}x${wish.height}`,
    num_inference_steps: wish.steps,
    seed: wish.seed,
    output_format: wish.format,
    ...how(wish),
    ...adapters(wish),
  };
}

/** What most pictures are made without. */
function how({ guidance, quality }) {
  return {
    ...(guidance === undefined ? {} : { guidance_scale: guidance }),
    ...(quality === undefined || quality === 100 ? {} : { output_compression: quality }),
  };
}

/** The texts of a form with these fields, as pairs; of a list, those of its entries in order. */
export function formTexts(values) {
  return Object.entries(values).flatMap(([name, value]) => {
    if (!Array.isArray(value)) return [[name, String(value)]];
    return value.flatMap((entry) =>
      Object.entries(entry).map(([key, part]) => [`${name}[][${key}]`, String(part)]),
    );
  });
}

/** The adapters that a request names; where none are named, the service takes its own. */
function adapters({ loras: { chosen, usual, isTouched }, references }) {
  if (!isTouched || !(chosen.length || usual.length)) return {};
  if (chosen.length || !references.length) return { loras: chosen };
  // A form cannot hold an empty list; at scale 0 an adapter changes nothing.
  return { loras: usual.map(({ name }) => ({ name, scale: 0 })) };
}

function sides({ width, height }) {
  return { width, height };
}

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function upload(field, name) {
  return quote(`${field}=@"${name.replaceAll(/["\\]/g, "\\$&")}"`);
}

// JSON's texts and numbers are Python's too.
function python(value) {
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  const entries = Object.entries(value).map(([name, entry]) => `${python(name)}: ${python(entry)}`);
  return `{${entries.join(", ")}}`;
}
