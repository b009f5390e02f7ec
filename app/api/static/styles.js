// Styles: words with a name, kept in this browser, that are put after the prompt.

import { $, button, element, onClick } from "./dom.js";
import { keep, recall } from "./keeping.js";

const NAME = "klein.styles";

let styles = []; // {name, words, isChosen}

/** The prompt with the words of the chosen styles. */
export function styled(prompt) {
  const words = styles.filter(({ isChosen }) => isChosen).map((style) => style.words);
  return [prompt, ...words].join(", ");
}

export function buildStyles() {
  styles = recall(NAME, []);
  showStyles();
  onClick("style-add", addStyle);
  for (const id of ["style-name", "style-words"]) {
    $(id).addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      addStyle();
    });
  }
}

/** Choose none: the prompt that is put back holds their words already. */
export function unchooseStyles() {
  for (const style of styles) style.isChosen = false;
  changed();
}

function addStyle() {
  const [name, words] = ["style-name", "style-words"].map((id) => $(id).value.trim());
  const missing = name ? (words ? null : "style-words") : "style-name";
  if (missing) {
    $(missing).focus();
    return;
  }
  styles = [...styles.filter((style) => style.name !== name), { name, words, isChosen: true }];
  for (const id of ["style-name", "style-words"]) $(id).value = "";
  changed();
  $("style-name").focus();
}

function changed() {
  keep(NAME, styles);
  showStyles();
}

function showStyles() {
  const items = styles.map((style) => {
    const box = element("input", { type: "checkbox", checked: style.isChosen });
    box.addEventListener("change", () => {
      style.isChosen = box.checked;
      changed();
      [...$("styles-list").querySelectorAll("input")][styles.indexOf(style)]?.focus();
    });
    const label = element("label", {}, box, element("b", { textContent: style.name }), element("span", { textContent: style.words }));
    const remove = button("Remove", "", () => {
      styles = styles.filter((one) => one !== style);
      changed();
      $("style-name").focus();
    });
    remove.setAttribute("aria-label", `Remove the style ${style.name}`);
    return element("li", {}, label, remove);
  });
  $("styles-list").replaceChildren(...items);
  const names = styles.filter(({ isChosen }) => isChosen).map(({ name }) => name);
  $("styles-summary").textContent = names.join(", ") || "none";
}
