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
  if (prompt === counted || !page.health || document.hidden) return;
  counted = prompt;
  clearTimeout(pause);
  pause = setTimeout(async () => {
    const { body } = await ask("v1/tokens", { key: page.key, json: { prompt } }).catch(() => ({}));
    if (prompt !== counted) return;
    const { tokens, limit, cut_at: cut = null } = body ?? {};
    const lost = cut === null ? [] : [...prompt].slice(cut, cut + SHOWN);
    $("tokens").textContent = prompt && tokens ? `${tokens} of ${limit} tokens` : "";
    $("cut").textContent = lost.length ? `Not read from here on: ${lost.join("")}` : "";
  }, PAUSE_MS);
}
