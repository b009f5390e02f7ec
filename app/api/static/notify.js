// Says that a long queue is done to those who have gone to another window, where they allow it.

import { $ } from "./dom.js";

const NAME = "klein.notify";
const LONG_S = 10;

let since = 0; // when the queue began, 0 while it is empty

export function wireNotify() {
  if (!("Notification" in window)) return;
  $("notify-field").hidden = false;
  try {
    $("notify").checked = localStorage.getItem(NAME) === "yes" && Notification.permission === "granted";
  } catch {
    // Without storage it is asked for each time.
  }
  $("notify").addEventListener("change", async () => {
    const isWanted = $("notify").checked && (await Notification.requestPermission()) === "granted";
    $("notify").checked = isWanted;
    try {
      localStorage.setItem(NAME, isWanted ? "yes" : "no");
    } catch {
      // It lasts as long as the page.
    }
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
