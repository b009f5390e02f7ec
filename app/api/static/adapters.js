// The picker of adapters: those that the service has, which of them are chosen, and their scales.

import { $, button, element } from "./dom.js";

const MOST = 4; // in one request, and from -2 to 2; the service refuses more
const UNFILTERED = 8; // so many are found without a filter

/** Fills the place `#adapters`; `askPreview` gets the picture at a path, as a promise of a blob. */
export class Picker {
  #askPreview;
  #listed = []; // as `GET /v1/loras` tells them
  #told = ""; // the same as text
  #chosen = []; // {name, scale}, in the order in which they were chosen
  #isTouched = false; // until then the chosen ones are the service's own
  #previews = new Map(); // promises of URLs, by path
  #seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) this.#showPreview(target);
  });

  constructor(askPreview) {
    this.#askPreview = askPreview;
    $("adapters-filter").addEventListener("input", () => this.#filter());
    $("adapters-filter").addEventListener("keydown", (event) => {
      // Neither asks for a picture nor cancels one.
      if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) event.preventDefault();
      if (event.key === "Escape" && event.target.value) event.stopPropagation();
    });
  }

  /** What is chosen now, and what the service takes where a request names none. */
  get loras() {
    return { chosen: copied(this.#chosen), usual: this.#usual(), isTouched: this.#isTouched };
  }

  /** Take the list of those that the service has; a choice that somebody made stays. */
  list(adapters) {
    const told = JSON.stringify(adapters);
    if (told === this.#told) return;
    const focused = document.activeElement.id;
    this.#told = told;
    this.#listed = adapters;
    this.#isTouched &&= adapters.length > 0;
    if (!this.#isTouched) this.#chosen = this.#usual();
    for (const url of this.#previews.values()) url.then((it) => URL.revokeObjectURL(it), () => {});
    this.#previews.clear();
    $("adapters-list").replaceChildren(...adapters.map((adapter) => this.#choice(adapter)));
    $("adapters-filter").hidden = adapters.length <= UNFILTERED;
    if ($("adapters-filter").hidden) $("adapters-filter").value = "";
    this.#showChosen();
    $(focused)?.focus();
  }

  /** Whether the service has an adapter of this name. */
  has(name) {
    return this.#listed.some(({ id }) => id === name);
  }

  /** Choose what an earlier picture was made with. */
  restore({ chosen }) {
    this.#isTouched = true;
    this.#chosen = copied(chosen);
    this.#showChosen();
  }

  /** Say what the service has against the chosen ones, or against the one at `index`. */
  complain(message, index) {
    $("adapters").open = true;
    $("adapters-error").textContent = message;
    $("adapters-error").hidden = false;
    const wrong = $(`scale:${this.#chosen[index]?.name}`);
    wrong?.setAttribute("aria-invalid", "true");
    wrong?.setAttribute("aria-describedby", "adapters-error");
    (wrong ?? $("adapters").querySelector("summary")).focus();
  }

  /** Take the complaint back. */
  forgive() {
    $("adapters-error").textContent = "";
    $("adapters-error").hidden = true;
    for (const slider of $("chosen").querySelectorAll("[aria-invalid]")) {
      slider.removeAttribute("aria-invalid");
      slider.removeAttribute("aria-describedby");
    }
  }

  #usual() {
    const usual = this.#listed.filter(({ scale }) => scale !== null);
    return usual.map(({ id, scale }) => ({ name: id, scale }));
  }

  #choose(adapter, isWanted) {
    this.#isTouched = true;
    this.#chosen = this.#chosen.filter(({ name }) => name !== adapter.id);
    if (isWanted) this.#chosen.push({ name: adapter.id, scale: adapter.scale ?? 1 });
    this.#showChosen();
  }

  #remove(name) {
    const index = this.#chosen.findIndex((one) => one.name === name);
    this.#choose({ id: name }, false);
    const next = this.#chosen[index] ?? this.#chosen.at(-1);
    const places = [$(`remove:${next?.name}`), $(`adapter:${name}`)];
    (places.find((it) => it?.checkVisibility()) ?? $("adapters").querySelector("summary")).focus();
  }

  /** One of the list, with its box to tick. */
  #choice(adapter) {
    const box = element("input", { type: "checkbox", id: `adapter:${adapter.id}`, value: adapter.id });
    box.addEventListener("change", () => this.#choose(adapter, box.checked));
    const usual = adapter.scale === null ? "" : `, by default at ${adapter.scale}`;
    const facts = element("small", { textContent: `rank ${adapter.rank}${usual}` });
    const label = element("label", {}, box, ...this.#thumb(adapter), this.#name(adapter.id, facts));
    return element("li", {}, label);
  }

  /** One of the chosen, with its slider. */
  #row({ name, scale }, index) {
    const adapter = this.#listed.find(({ id }) => id === name);
    const slider = element("input", { type: "range", id: `scale:${name}`, min: -2, max: 2, step: 0.05, value: scale });
    const number = element("output", { textContent: scale });
    slider.setAttribute("list", "scales");
    slider.setAttribute("aria-label", `Scale of ${name}`);
    slider.setAttribute("aria-valuetext", scale);
    slider.addEventListener("input", () => {
      this.#isTouched = true;
      this.#chosen[index].scale = slider.valueAsNumber;
      number.textContent = slider.value;
      slider.setAttribute("aria-valuetext", slider.value);
      this.#summarize();
    });
    const remove = button("Remove", "", () => this.#remove(name));
    remove.id = `remove:${name}`;
    remove.setAttribute("aria-label", `Remove ${name}`);
    const gone = adapter ? [] : [element("small", { textContent: "no longer there" })];
    const head = element("div", {}, this.#name(name, ...gone), remove);
    const beside = element("div", { className: "scale" }, head, element("div", {}, slider, number));
    return element("li", {}, ...this.#thumb(adapter), beside);
  }

  #name(name, ...more) {
    return element("span", {}, element("b", { textContent: name }), ...more);
  }

  /** A place for the preview, where any adapter has one. */
  #thumb(adapter) {
    if (!this.#listed.some(({ preview }) => preview)) return [];
    const thumb = element("span", { className: "thumb" });
    if (adapter?.preview) {
      thumb.dataset.path = adapter.preview.replace(/^\/+/, "");
      this.#seen.observe(thumb);
    }
    return [thumb];
  }

  async #showPreview(thumb) {
    this.#seen.unobserve(thumb);
    const { path } = thumb.dataset;
    if (!this.#previews.has(path)) {
      this.#previews.set(path, this.#askPreview(path).then((blob) => URL.createObjectURL(blob)));
    }
    const url = await this.#previews.get(path).catch(() => null);
    if (url) thumb.replaceChildren(element("img", { src: url, alt: "" }));
  }

  #showChosen() {
    const focused = document.activeElement.id;
    $("chosen").replaceChildren(...this.#chosen.map((one, index) => this.#row(one, index)));
    $("adapters").hidden = !this.#listed.length && !this.#chosen.length;
    const isFull = this.#chosen.length >= MOST;
    for (const box of $("adapters-list").querySelectorAll("input")) {
      box.checked = this.#chosen.some(({ name }) => name === box.value);
      box.disabled = isFull && !box.checked;
    }
    this.#filter();
    this.#summarize();
    if (document.activeElement.id !== focused) $(focused)?.focus();
  }

  #filter() {
    const words = $("adapters-filter").value.toLowerCase().split(/\s+/);
    let found = 0;
    for (const item of $("adapters-list").children) {
      const name = item.querySelector("input").value.toLowerCase();
      item.hidden = !words.every((word) => name.includes(word));
      found += item.hidden ? 0 : 1;
    }
    const notes = [
      found < this.#listed.length ? `${found} of ${this.#listed.length} have this in their name.` : "",
      this.#chosen.length >= MOST ? `No more than ${MOST} at a time.` : "",
    ];
    const text = notes.filter(Boolean).join(" ");
    if ($("adapters-note").textContent !== text) $("adapters-note").textContent = text;
  }

  #summarize() {
    $("adapters-summary").textContent = asText(this.#chosen) || "none";
  }
}

/** Adapters as a line of text. */
export function asText(loras) {
  return loras.map(({ name, scale }) => `${name} ${scale}`).join(", ");
}

function copied(loras) {
  return loras.map((one) => ({ ...one }));
}
