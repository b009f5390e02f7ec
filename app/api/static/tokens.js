// How many tokens the prompt has, and from where on the model will not read it.

import { $ } from "./dom.js";
import { page } from "./state.js";
import { ask } from "./stream.js";

const PAUSE_MS = 400;
const SHOWN = 40; // characters
let counted = "";
let pause = 0;

/** Count those of `prompt` once nothing has changed for a moment. */
export function countTokens(prompt) {
  if (prompt === counted || !page.health) return;
  counted = prompt;
  clearTimeout(pause);
  pause = setTimeout(async () => {
    const { status, body } = await ask("v1/tokens", { key: page.key, json: { prompt } }).catch(() => ({}));
    if (prompt !== counted) return;
    const isCut = status === 200 && body.cut_at !== null;
    $("tokens").textContent = status === 200 && prompt ? `${body.tokens} of ${body.limit} tokens` : "";
    $("cut").textContent = isCut ? `Not read from here on: ${[...prompt].slice(body.cut_at).slice(0, SHOWN).join("")}` : "";
  }, PAUSE_MS);
}
