// What went wrong, said at the field that it is about, with what would mend it.

import { askForKey } from "./access.js";
import { $, button } from "./dom.js";
import { picker, setSize } from "./form.js";
import { page } from "./state.js";
import { Refusal } from "./stream.js";

const FIELD_OF = {
  prompt: "prompt",
  n: "count",
  num_inference_steps: "steps",
  steps: "steps",
  seed: "seed",
  guidance_scale: "guidance",
  output_format: "format",
  output_compression: "quality",
  size: "size-field",
  width: "size-field",
  height: "size-field",
  image: "references-field",
  mask: "references-field",
};
const isNumber = (field) => field.matches("input[type=number]");

export function showError(error) {
  const isOurs = error instanceof Refusal;
  if (!isOurs) console.error(error);
  const name = (error.param ?? "").replace(/[[.].*/, "");
  if (name === "loras") {
    page.isListOld = true;
    picker.complain(error.message, /^loras\[(\d+)/.exec(error.param)?.[1]);
    return;
  }
  const text = isOurs ? error.message : "The page failed in a way that nobody expected; load it anew.";
  const field = $(FIELD_OF[name] ?? "");
  place(field);
  $("error").replaceChildren(text, ...fixes(field, text));
  $("error").hidden = false;
  if (error.status === 401) {
    askForKey();
    $("key").focus();
    return;
  }
  if (!field) return;
  if ($("settings").contains(field)) $("settings").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", `${field.getAttribute("aria-describedby") ?? ""} error`.trim());
  if (field.matches("input, textarea, select")) field.focus();
  else $("error").scrollIntoView({ block: "nearest" });
}

export function hideError() {
  picker.forgive();
  $("error").hidden = true;
  $("error").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    const others = (field.getAttribute("aria-describedby") ?? "").replace(/ ?error$/, "");
    if (others) field.setAttribute("aria-describedby", others);
    else field.removeAttribute("aria-describedby");
  }
}

/** After the field, where it is seen beside it, or under the picture. */
function place(field) {
  if (!field) $("error-place").append($("error"));
  else (field.closest(".row") ?? field.closest("fieldset") ?? field).after($("error"));
}

/** What the message itself names: the nearest size, or a limit of the number. */
function fixes(field, text) {
  if (field?.id === "size-field") {
    const [, width, height] = /nearest\D*(\d+) ?[x×] ?(\d+)/.exec(text) ?? [];
    if (!width) return [];
    return [fix(`Use ${width} × ${height}`, () => setSize({ width: Number(width), height: Number(height) }))];
  }
  if (!field || !isNumber(field) || !field.max) return [];
  const value = Math.round(Math.min(Number(field.max), Math.max(Number(field.min), Number(field.value))));
  if (String(value) === field.value) return [];
  return [fix(`Use ${value}`, () => {
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  })];
}

function fix(text, act) {
  return button(text, "fix", () => {
    act();
    hideError();
    $("make").focus();
  });
}
