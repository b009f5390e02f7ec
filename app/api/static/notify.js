// Says that a long queue is done to those who have gone to another window, where they allow it.

import { $ } from "./dom.js";
import { keep, recall } from "./keeping.js";

const NAME = "klein.notify";
const LONG_S = 10;

let since = 0; // when the queue began, 0 while it is empty

export function wireNotify() {
  if (!("Notification" in window)) return;
  $("notify-field").hidden = false;
  $("notify").checked = recall(NAME, false) && Notification.permission === "granted";
  $("notify").addEventListener("change", async () => {
    const isWanted = $("notify").checked && (await Notification.requestPermission()) === "granted";
    $("notify").checked = isWanted;
    keep(NAME, isWanted);
  });
}

/** Take whether there is anything to wait for; `text` says what was made. */
export function noteQueue(isBusy, text) {
  if (isBusy) {
    since ||= performance.now();
    return;
  }
  const isLong = since && performance.now() - since > LONG_S * 1000;
  since = 0;
  if (!isLong || !document.hidden || !$("notify").checked) return;
  const note = new Notification("klein playground", { body: text, tag: "klein", icon: "static/icon.svg" });
  note.addEventListener("click", () => window.focus());
}
