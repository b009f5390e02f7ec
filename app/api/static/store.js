// What the browser keeps between visits: pictures, what they were made from, jobs, and the
// pictures that lie ready to work from. Where there is no IndexedDB, all of it lasts as long as
// the page.

const NAME = "klein";
const STORES = {
  pictures: "id", // {id, at, wish, thumb, bytes, isFavourite, ...}
  files: null, // a picture's file, by its id
  sources: "id", // {id, blob}: references and masks, which several pictures share
  jobs: "key", // {key, at, tab, wish, count, done}
  desk: null, // "form": the references and the mask that lie in the form
};

class Kept {
  isLasting = true;
  #database;

  constructor(database) {
    this.#database = database;
  }

  get(store, key) {
    return this.#ask(store, "get", key);
  }

  all(store) {
    return this.#ask(store, "getAll");
  }

  /** Put and delete at once, or not at all: entries are [store, value, key], gone ones [store, key]. */
  async change(entries, gone = []) {
    const names = [...new Set([...entries, ...gone].map(([store]) => store))];
    if (!names.length) return;
    const changing = this.#database.transaction(names, "readwrite");
    for (const [store, value, key] of entries) {
      changing.objectStore(store).put(value, STORES[store] ? undefined : key);
    }
    for (const [store, key] of gone) changing.objectStore(store).delete(key);
    await ended(changing);
  }

  /** Let go of what no picture, no job and nothing in the form is made from. */
  async sweep() {
    const sweeping = this.#database.transaction(["pictures", "jobs", "desk", "sources"], "readwrite");
    const read = (store, how) => answered(sweeping.objectStore(store)[how]());
    const [pictures, jobs, desk, ids] = await Promise.all([
      read("pictures", "getAll"),
      read("jobs", "getAll"),
      read("desk", "getAll"),
      read("sources", "getAllKeys"),
    ]);
    const used = new Set();
    for (const { references, mask } of [...desk, ...[...pictures, ...jobs].map(({ wish }) => wish)]) {
      for (const { id } of [...references, ...(mask ? [mask] : [])]) used.add(id);
    }
    for (const id of ids) if (!used.has(id)) sweeping.objectStore("sources").delete(id);
    await ended(sweeping);
  }

  #ask(store, how, ...what) {
    return answered(this.#database.transaction(store).objectStore(store)[how](...what));
  }
}

class Fleeting {
  isLasting = false;
  #stores = Object.fromEntries(Object.keys(STORES).map((name) => [name, new Map()]));

  async get(store, key) {
    return this.#stores[store].get(key);
  }

  async all(store) {
    return [...this.#stores[store].values()];
  }

  async change(entries, gone = []) {
    for (const [store, value, key] of entries) this.#stores[store].set(value[STORES[store]] ?? key, value);
    for (const [store, key] of gone) this.#stores[store].delete(key);
  }

  async sweep() {}
}

async function open() {
  try {
    const asking = indexedDB.open(NAME, 1);
    asking.addEventListener("upgradeneeded", () => {
      for (const [name, keyPath] of Object.entries(STORES)) {
        asking.result.createObjectStore(name, keyPath ? { keyPath } : {});
      }
    });
    const database = await answered(asking);
    // A newer version of this page in another tab may change the stores.
    database.addEventListener("versionchange", () => database.close());
    return new Kept(database);
  } catch {
    return new Fleeting();
  }
}

/** The store, as a promise. */
export const stored = open();

/** A wish as it is kept: of what it is made from, the names; and what they name, as entries. */
export async function packed(wish) {
  const { references, mask } = wish;
  const sources = [...references, ...(mask ? [mask] : [])];
  const entries = sources.filter(({ blob }) => blob).map(async ({ id, blob }) => ["sources", { id, blob: await blob }]);
  const kept = {
    ...wish,
    references: references.map(({ id, name, width, height }) => ({ id, name, width, height })),
    mask: mask && { id: mask.id },
  };
  return { kept, entries: await Promise.all(entries) };
}

/** The wish with the files that it is made from; what is gone is left out. */
export async function unpacked(wish) {
  const store = await stored;
  const load = async (one) => {
    const blob = (await one.blob) ?? (await store.get("sources", one.id))?.blob;
    return blob && { ...one, blob };
  };
  const references = (await Promise.all(wish.references.map(load))).filter(Boolean);
  return { ...wish, references, mask: (wish.mask && (await load(wish.mask))) || null };
}

function answered(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
    request.addEventListener("blocked", () => reject(new Error("another tab holds an older version")));
  });
}

function ended(transaction) {
  return new Promise((resolve, reject) => {
    transaction.addEventListener("complete", () => resolve());
    for (const name of ["abort", "error"]) transaction.addEventListener(name, () => reject(transaction.error));
  });
}
