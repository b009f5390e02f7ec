// The API key: asked for where one is needed, kept in this tab, forgotten when told to.

import { $ } from "./dom.js";
import { page, tell } from "./state.js";

const NAME = "klein.key"; // the pages of an error 401 keep theirs under the same

export function rememberedKey() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return "";
  }
}

export function useKey(key) {
  page.key = key;
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // Without storage the key lasts as long as the page.
  }
  tell("key");
}

export function askForKey() {
  page.needsKey = true;
  setStatus("waiting", page.key ? "The key was refused" : "A key is needed");
  showKeyForm(true);
}

/** Ask for a key, or stop asking; where the focus would be lost, it moves on. */
export function showKeyForm(isWanted) {
  const focused = document.activeElement;
  const places = [$("key-form"), $("key-forget")];
  $("key-form").hidden = !isWanted;
  $("key-forget").hidden = !page.key;
  const isLost = places.some((place) => place.hidden && place.contains(focused));
  if (isLost) $(isWanted ? "key" : "prompt").focus();
}

export function setStatus(state, text) {
  document.querySelector(".status").dataset.state = state;
  if ($("status").textContent !== text) $("status").textContent = text;
}
