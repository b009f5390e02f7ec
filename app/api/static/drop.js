// Pictures that come from outside: picked, pasted or dropped. One that says how it was made can be
// worked from, or made again.

import { $, onClick } from "./dom.js";
import { hideError } from "./errors.js";
import { picker, restoreForm } from "./form.js";
import { readRecipe } from "./metadata.js";
import { addReferences } from "./references.js";
import { say } from "./say.js";
import { unchooseStyles } from "./styles.js";
import { some } from "./words.js";

let found = null; // {file, recipe}: what the dialog asks about

export async function take(files) {
  hideError();
  const recipe = files.length === 1 ? await readRecipe(files[0]) : null;
  if (!recipe) {
    await addReferences(files);
    return;
  }
  found = { file: files[0], recipe };
  const { from, prompt, width, height, steps, seed, loras = [] } = recipe;
  const facts = [
    width && height ? `${width} × ${height}` : "",
    steps ? some(steps, "step") : "",
    seed === undefined ? "" : `seed ${seed}`,
    ...loras.map(({ name, scale }) => `${name} ${scale}`),
  ];
  $("found-from").textContent = `It was made with ${from}.`;
  $("found-prompt").textContent = prompt;
  $("found-facts").textContent = facts.filter(Boolean).join(" · ");
  $("found-dialog").showModal();
  $("found-restore").focus();
}

/** What this service has no adapter for is left out, and said. */
function restoreFound() {
  const { loras = [], width, height, ...recipe } = found.recipe;
  $("found-dialog").close();
  const known = loras.filter(({ name }) => picker.has(name)).map(({ name, scale }) => ({ name, scale: Number(scale) }));
  const size = width && height ? { width, height } : {};
  restoreForm({ ...recipe, ...size, loras: { chosen: known } });
  unchooseStyles();
  const missing = loras.filter(({ name }) => !picker.has(name)).map(({ name }) => name);
  say(missing.length ? `The settings are back, without ${missing.join(", ")}.` : "The settings of this picture are back.");
  $("prompt").focus();
}

function carriesFiles({ dataTransfer }) {
  return dataTransfer?.types.includes("Files");
}

export function wireDrop() {
  onClick("found-restore", restoreFound);
  onClick("found-use", async () => {
    $("found-dialog").close();
    await addReferences([found.file]);
  });
  onClick("found-cancel", () => $("found-dialog").close());
  $("files").addEventListener("change", async () => {
    const files = [...$("files").files];
    $("files").value = "";
    await take(files);
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });

  let dragged = 0;
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    clearTimeout(dragged);
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", () => {
    dragged = setTimeout(() => {
      $("drop").hidden = true;
    }, 120);
  });
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = true;
    take([...event.dataTransfer.files]);
  });
}
