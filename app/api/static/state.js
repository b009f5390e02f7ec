// What all parts of the page know, and how they tell one another that it has changed.

import { $ } from "./dom.js";
import { Cost } from "./sizes.js";

export const model = JSON.parse($("model").textContent);

export const page = {
  health: null,
  rules: null, // SizeRules, with the service's limits, once they are known
  key: "",
  needsKey: false,
  isListOld: true, // that of the adapters
  references: [], // {id, name, blob, url, width, height}
  mask: null, // {id, strokes, and promises of blob and overlay's URL}: over the first reference
  shown: null, // a picture of the history
};

export const cost = new Cost((reference) => page.rules.prepared(reference));

const bus = new EventTarget();

/** Call `act` whenever somebody tells `name`: references, poll, key, sources. */
export function on(name, act) {
  bus.addEventListener(name, () => act());
}

export function tell(name) {
  bus.dispatchEvent(new Event(name));
}

/** Letters and digits that nobody else has; `crypto.randomUUID` is for https and localhost only. */
export function identity() {
  const numbers = crypto.getRandomValues(new Uint8Array(16));
  return [...numbers].map((number) => number.toString(16).padStart(2, "0")).join("");
}
