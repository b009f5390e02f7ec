// What ComfyUI's front end does with a PNG that is dropped onto it (getFromPngBuffer, handleFile and
// importA1111), in lines of our own: a text by its keyword; a graph as JSON, else AUTOMATIC1111's text.
// Reads the file named first; prints what it would fill in.

import { readFileSync } from "node:fs";

const file = new Uint8Array(readFileSync(process.argv[2]));
const view = new DataView(file.buffer);
const latin = new TextDecoder("latin1");
if (view.getUint32(0) !== 0x89504e47) throw new Error("no PNG");

const texts = {};
for (let at = 8; at < file.length; at += 12 + view.getUint32(at)) {
  const body = file.subarray(at + 8, at + 8 + view.getUint32(at));
  if (!["tEXt", "comf", "iTXt"].includes(latin.decode(file.subarray(at + 4, at + 8)))) continue;
  const end = body.indexOf(0);
  texts[latin.decode(body.subarray(0, end))] = new TextDecoder().decode(body.subarray(end + 1));
}

if (texts.workflow) JSON.parse(texts.workflow);
else if (texts.prompt) JSON.parse(texts.prompt);
else console.log(JSON.stringify(nodes(texts.parameters)));

function nodes(text) {
  const last = text.lastIndexOf("\nSteps:");
  const negative = text.lastIndexOf("\nNegative prompt:", last);
  if (last < 0 || negative < 0) return null;
  const found = text.slice(last + 1).matchAll(/\s*([^:,]+):\s*(".*?"|[^,]*)\s*(?:,|$)/g);
  const settings = Object.fromEntries([...found].map(([, name, value]) => [name.toLowerCase(), value]));
  const [width, height] = settings.size.split("x").map(Number);
  return {
    positive: text.slice(0, negative).replace(/^[\0\s]+/, ""), // an iTXt's flags are read with it
    negative: text.slice(negative + 18, last).trim(),
    seed: Number(settings.seed),
    steps: Number(settings.steps),
    width,
    height,
  };
}
