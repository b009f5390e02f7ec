// Tells a screen reader what happens, at most every two seconds; the latest word wins.

import { $ } from "./dom.js";

let saidAt = -2000;
let unsaid = 0;

export function say(text) {
  clearTimeout(unsaid);
  unsaid = setTimeout(() => {
    saidAt = performance.now();
    $("announcer").textContent = text;
  }, Math.max(0, saidAt + 2000 - performance.now()));
}
