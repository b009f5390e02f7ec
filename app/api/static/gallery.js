// The history: every picture with all that it was made with, kept in this browser until somebody
// deletes it.

import { $, blobOf, button, canvasOf, element, isOff, onClick, saveAs, setOff } from "./dom.js";
import { page } from "./state.js";
import { packed, stored } from "./store.js";
import { bytes, some } from "./words.js";
import { fileOf } from "./viewer.js";
import { MOST_BYTES, pictureName, zipped } from "./zip.js";

const PER_PAGE = 60;
const THUMB = 224;
const FULL = 0.85; // of the browser's room, from where on the oldest are offered for deletion
const OLDEST = 20;
const ENDINGS = { jpeg: "jpg" };

export class Gallery {
  #pictures = []; // {id, at, wish, thumb, bytes, isFavourite, seconds, timing, peak, warnings}
  #items = new Map(); // list items, by the picture's id
  #most = PER_PAGE;
  #onChoose;
  #deleted = null; // {made, index}: the last one, as long as it can be had back
  #isFull = false;

  constructor(onChoose) {
    this.#onChoose = onChoose;
    $("favourites-only").addEventListener("change", () => this.#show());
    onClick("older", () => {
      this.#most += PER_PAGE;
      this.#show();
    });
    onClick("undelete", () => this.#undelete());
    onClick("delete-oldest", () => this.#deleteOldest());
    onClick("zip", () => this.#download());
  }

  get newest() {
    return this.#pictures[0];
  }

  /** What was kept; of two tabs each sees the other's when it is loaded anew. */
  async load() {
    const store = await stored;
    const found = await store.all("pictures").catch(() => []);
    this.#pictures.push(...found.filter(({ id }) => !this.#items.has(id)));
    this.#pictures.sort((one, other) => other.at - one.at);
    this.#show();
    await store.sweep().catch(() => {});
    await this.#measure();
  }

  /** Keep a picture; it is there even if there is no room to keep it. */
  async add(made) {
    const index = this.#pictures.findIndex(({ id }) => id === made.id);
    if (index >= 0) this.#pictures.splice(index, 1);
    Object.assign(made, { at: Date.now(), bytes: made.blob.size, thumb: await thumbOf(made.blob) });
    this.#pictures.unshift(made);
    this.#show();
    await this.#keep(made);
  }

  find(id) {
    return this.#pictures.find((made) => made.id === id);
  }

  /** The one before (-1) or after (1) that on show, as they lie. */
  beside(step) {
    const shown = this.#shown();
    const index = shown.indexOf(page.shown);
    return shown[index < 0 ? 0 : index + step];
  }

  async toggleFavourite(made) {
    made.isFavourite = !made.isFavourite;
    this.#show();
    await this.#write(made);
    await this.#measure();
  }

  /** Delete a picture, which can be had back until the next one is; the one to show now. */
  async delete(made) {
    const index = this.#pictures.indexOf(made);
    await this.#forget();
    this.#deleted = { made, index };
    this.#pictures.splice(index, 1);
    this.#show();
    // The file is kept by the page alone now, so that it does not come back with the next visit.
    made.blob = await fileOf(made);
    await (await stored).change([], [["pictures", made.id], ["files", made.id]]);
    $("deleted").hidden = false;
    await this.#measure();
    return this.#pictures[Math.min(index, this.#pictures.length - 1)];
  }

  /** Mark the one on show. */
  mark() {
    for (const [id, item] of this.#items) {
      const isShown = id === page.shown?.id;
      if (isShown) item.firstChild.setAttribute("aria-current", "true");
      else item.firstChild.removeAttribute("aria-current");
    }
  }

  async #undelete() {
    const { made, index } = this.#deleted;
    this.#deleted = null;
    $("deleted").hidden = true;
    this.#pictures.splice(index, 0, made);
    this.#show();
    this.#onChoose(made);
    await this.#keep(made);
  }

  async #forget() {
    if (!this.#deleted) return;
    this.#deleted = null;
    await (await stored).sweep().catch(() => {});
  }

  async #keep(made) {
    const { blob, ...rest } = made;
    try {
      const store = await stored;
      const { kept: wish, entries } = await packed(made.wish);
      await store.change([...entries, ["pictures", { ...rest, wish }], ["files", blob, made.id]]);
      if (store.isLasting) delete made.blob; // it is in the store, and need not be in memory
      // Asked at most once; the browser then deletes nothing to make room for other sites.
      if (this.#pictures.length === 1) navigator.storage?.persist?.().catch(() => {});
    } catch {
      this.#isFull = true;
    }
    await this.#measure();
  }

  async #write(made) {
    const { kept: wish } = await packed(made.wish);
    const rest = { ...made, blob: undefined };
    await (await stored).change([["pictures", { ...rest, wish }]]).catch(() => {});
  }

  #shown() {
    const isWanted = $("favourites-only").checked ? ({ isFavourite }) => isFavourite : () => true;
    return this.#pictures.filter(isWanted);
  }

  /** Items stay what they are, so that neither the focus nor the place is lost. */
  #show() {
    const shown = this.#shown();
    const wanted = shown.slice(0, this.#most);
    const ids = new Set(wanted.map(({ id }) => id));
    for (const [id, item] of this.#items) {
      if (ids.has(id)) continue;
      URL.revokeObjectURL(item.querySelector("img").src);
      item.remove();
      this.#items.delete(id);
    }
    wanted.forEach((made, index) => {
      const item = this.#items.get(made.id) ?? this.#item(made);
      const label = `${made.isFavourite ? "Favourite, s" : "S"}eed ${made.wish.seed}: ${made.wish.prompt.slice(0, 80)}`;
      item.firstChild.setAttribute("aria-label", label);
      item.dataset.favourite = String(Boolean(made.isFavourite));
      const there = $("gallery").children[index];
      if (there !== item) $("gallery").insertBefore(item, there ?? null);
    });
    $("older").hidden = shown.length <= wanted.length;
    $("history").dataset.empty = String(!this.#pictures.length);
    this.mark();
  }

  #item(made) {
    const thumb = element("img", { src: URL.createObjectURL(made.thumb), alt: "", loading: "lazy" });
    const item = element("li", {}, button("", "", () => this.#onChoose(made)));
    item.firstChild.append(thumb);
    this.#items.set(made.id, item);
    return item;
  }

  async #measure() {
    const store = await stored;
    const { usage = 0, quota = 0 } = (await navigator.storage?.estimate?.().catch(() => null)) ?? {};
    const size = this.#pictures.reduce((sum, made) => sum + made.bytes, 0);
    const kept = `${some(this.#pictures.length, "picture")}, ${bytes(size)}`;
    const room = quota ? ` The browser uses ${bytes(usage)} of ${bytes(quota)}.` : "";
    if (!this.#pictures.length) $("room").textContent = "What you make is kept here, until you delete it.";
    else $("room").textContent = store.isLasting
      ? `${kept}, kept in this browser.${room}`
      : `${kept}. This browser keeps nothing: they are gone when the page is closed.`;
    const isFull = this.#isFull || (quota > 0 && usage > FULL * quota);
    const oldest = this.#oldest();
    $("full").hidden = !isFull || !oldest.length;
    if ($("full").hidden) return;
    const freed = bytes(oldest.reduce((sum, made) => sum + made.bytes, 0));
    $("delete-oldest").textContent = `Delete the oldest ${some(oldest.length, "picture")} (${freed})`;
  }

  #oldest() {
    return this.#pictures.filter(({ isFavourite }) => !isFavourite).slice(-OLDEST);
  }

  async #deleteOldest() {
    const store = await stored;
    const oldest = new Set(this.#oldest());
    this.#pictures = this.#pictures.filter((made) => !oldest.has(made));
    await store.change([], [...oldest].flatMap(({ id }) => [["pictures", id], ["files", id]]));
    await store.sweep().catch(() => {});
    this.#isFull = false;
    this.#show();
    await this.#measure();
    if (oldest.has(page.shown)) this.#onChoose(this.newest);
    $("zip").focus();
  }

  /** Those that the list shows, as one file. */
  async #download() {
    if (isOff("zip")) return;
    setOff("zip", true);
    try {
      let room = MOST_BYTES;
      const wanted = this.#shown().filter((made) => {
        room -= made.bytes;
        return room > 0;
      });
      const files = await Promise.all(wanted.map(async (made) => {
        const { wish, at: date } = made;
        return { name: pictureName(wish, ENDINGS[wish.format] ?? wish.format), blob: await fileOf(made), date };
      }));
      saveAs(await zipped(files.filter(({ blob }) => blob)), "klein-pictures.zip");
    } finally {
      setOff("zip", false);
    }
  }
}

async function thumbOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMB / Math.min(bitmap.width, bitmap.height));
  const [canvas, context] = canvasOf(bitmap.width * scale, bitmap.height * scale);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return blobOf(canvas, "image/webp", 0.85);
}
