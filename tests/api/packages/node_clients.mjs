// Run by `test_packages.py` where the packages are installed: openai-node, the Vercel AI SDK and
// LangChain.js against a service.
//
//     node node_clients.mjs http://127.0.0.1:8000/v1 picture.png mask.png
//
// Writes one JSON object: what each client got.

import { readFileSync, writeSync } from "node:fs";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { DallEAPIWrapper } from "@langchain/openai";
import { generateImage } from "ai";
import OpenAI, { toFile } from "openai";

const [baseURL, picturePath, maskPath] = process.argv.slice(2);
const apiKey = "none-at-all";
const model = "flux.2-klein-4b";
const picture = readFileSync(picturePath);
const mask = readFileSync(maskPath);
const file = () => toFile(picture, "picture.png", { type: "image/png" });

async function openaiNode() {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const made = await client.images.generate({ prompt: "a", n: 2, size: "256x256", seed: 5 });
  const edited = await client.images.edit({
    image: [await file(), await file()],
    mask: await toFile(mask, "mask.png", { type: "image/png" }),
    prompt: "a",
  });
  const streamed = [];
  const stream = await client.images.generate({ prompt: "a", stream: true, partial_images: 2 });
  for await (const event of stream) streamed.push(event.type);
  const streamedEdit = [];
  const edit = await client.images.edit({ image: await file(), prompt: "a", stream: true });
  for await (const event of edit) streamedEdit.push(event.type);
  const refused = await client.images.generate({ prompt: "a", size: "1000x1000" }).then(
    () => null,
    (error) => ({ status: error.status, param: error.param, code: error.code }),
  );
  const models = [];
  for await (const each of client.models.list()) models.push(each.id);
  return {
    seeds: made.data.map((item) => item.seed),
    made: made.data.map((item) => item.b64_json),
    edited: edited.data.map((item) => item.b64_json),
    streamed,
    streamedEdit,
    refused,
    models,
    hub: (await client.models.retrieve("black-forest-labs/FLUX.2-klein-4B")).id,
  };
}

async function vercel() {
  const compatible = createOpenAICompatible({ name: "klein", baseURL, apiKey });
  const asked = { prompt: "a", size: "256x256", maxRetries: 0 };
  const made = await generateImage({ ...asked, model: compatible.imageModel(model), n: 3 });
  const seeded = await generateImage({
    ...asked,
    model: compatible.imageModel(model),
    providerOptions: { klein: { seed: 5 } },
  });
  const edited = await generateImage({
    model: compatible.imageModel(model),
    prompt: { text: "a", images: [picture, picture], mask },
    maxRetries: 0,
  });
  const openai = createOpenAI({ baseURL, apiKey });
  const alias = await generateImage({ ...asked, model: openai.image("gpt-image-1"), n: 2 });
  return {
    made: made.images.map((image) => image.base64),
    seeded: seeded.images.map((image) => image.base64),
    edited: edited.images.map((image) => image.base64),
    alias: alias.images.map((image) => image.base64),
  };
}

async function langchain() {
  const wrapper = new DallEAPIWrapper({
    apiKey,
    configuration: { baseURL },
    baseUrl: baseURL,
    model: "dall-e-3",
    size: "1024x1024",
    dallEResponseFormat: "url",
    maxRetries: 0,
  });
  // Followed here: on the server of the tests a link ends after a second.
  const answer = await fetch(await wrapper.invoke("a"));
  return answer.headers.get("content-type");
}

const results = {
  openai: await openaiNode(),
  vercel: await vercel(),
  langchain: await langchain(),
};
writeSync(1, JSON.stringify(results));
