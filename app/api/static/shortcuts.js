// Keys for those who would rather not reach for the mouse; `?` shows them all.

import { $, element, onClick } from "./dom.js";

const FIELDS = "input, textarea, select, [contenteditable], canvas, summary";

/** `acts` are {keys, text, act}; those with one letter are not for fields. */
export function wireShortcuts(acts) {
  const rows = acts.flatMap(({ keys, text }) => [
    element("dt", {}, ...keys.map((key) => element("kbd", { textContent: NAMES[key] ?? key }))),
    element("dd", { textContent: text }),
  ]);
  $("help-keys").replaceChildren(...rows);
  onClick("help", () => $("help-dialog").showModal());
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.altKey) return;
    const withControl = event.ctrlKey || event.metaKey;
    const name = withControl ? `Ctrl+${event.key}` : event.key;
    const found = acts.find(({ keys }) => keys.includes(name));
    if (!found) return;
    const isAnywhere = withControl || event.key === "Escape";
    if (!isAnywhere && event.target.matches(FIELDS)) return;
    if (found.act(event) !== false) event.preventDefault();
  });
}

const NAMES = { ArrowLeft: "←", ArrowRight: "→", Escape: "Esc", "Ctrl+Enter": "Ctrl Enter", Delete: "Del" };
