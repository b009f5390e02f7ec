// The pictures that are asked for: which are on their way, which wait, and how they survive a page
// that is loaded anew.
//
// A job is one press of the button. Each of its pictures is one request under a name of its own
// (`Idempotency-Key`): where the page was loaded anew, or the connection was cut, the same request
// under the same name goes on where it was. A service that does not know the header makes the
// picture again, from the same seed.

import { Clock, PREVIEWS } from "./progress.js";
import { fields, formTexts } from "./recipes.js";
import { identity, page } from "./state.js";
import { packed, stored, unpacked } from "./store.js";
import { CUT, Refusal, UNREACHABLE, draw, takeBack } from "./stream.js";

const MOST_AT_ONCE = 3; // a browser opens six connections, and /health wants one
const BUSY = new Set([429, 503]);
const AGAIN_S = 3; // where the service does not say when to try again
const MOST_CUTS = 3;

export class Queue {
  jobs = [];
  #on;
  #lanes;
  #timer = 0;
  #tab = tabName();

  /**
   * `lanes` says how many pictures the service makes at once; `on` is told: changed(), ended("done", "failed" or "cancelled"),
   * failed(error), and of one part queued, stepped, preview(part, blob), done(part, made).
   */
  constructor(on, lanes) {
    this.#on = on;
    this.#lanes = lanes;
  }

  /** The parts that are on their way, the eldest first. */
  get running() {
    return this.#parts("running");
  }

  get isBusy() {
    return this.jobs.some(({ isHeld }) => !isHeld);
  }

  /** Ask for `count` pictures with seeds in a row. */
  add(wish, count) {
    const job = asJob({ key: identity(), at: Date.now(), wish, count, done: [] });
    this.jobs.push(job);
    job.kept = this.#keep(job);
    this.#advance();
    return job;
  }

  /** Take the jobs of this tab up again; those of tabs that have gone wait to be asked for. */
  async resume() {
    const store = await stored;
    const found = (await store.all("jobs")).toSorted((one, other) => one.at - other.at);
    for (const { tab, ...kept } of found) {
      const isOurs = tab === this.#tab;
      const letGo = await claim(kept.key, isOurs);
      if (!letGo) continue;
      const job = asJob({ ...kept, wish: await unpacked(kept.wish), letGo });
      job.isHeld = !isOurs;
      job.isResumed = true;
      this.jobs.push(job);
    }
    this.#advance();
  }

  /** Go on with a job that was held. */
  release(job) {
    job.isHeld = false;
    job.kept = this.#keep(job);
    this.#advance();
  }

  /** Try all that waits for something again at once. */
  wake() {
    for (const job of this.jobs) job.until = 0;
    this.#advance();
  }

  async cancel(job) {
    const parts = job.parts.filter(({ state }) => state === "running");
    for (const part of parts) part.isCancelled = true;
    this.#drop(job);
    this.#on.ended("cancelled");
    // With its name a picture outlives its connection, so it has to be taken back.
    for (const part of parts) {
      await takeBack(part.name, { key: page.key }).catch(() => {});
      part.abort.abort();
    }
  }

  #parts(state) {
    return this.jobs.flatMap(({ parts }) => parts.filter((part) => part.state === state));
  }

  #advance() {
    clearTimeout(this.#timer);
    const now = performance.now();
    const free = Math.max(1, Math.min(MOST_AT_ONCE, this.#lanes())) - this.running.length;
    const ready = this.jobs.filter((job) => !job.isHeld && job.until <= now);
    const next = ready.flatMap(({ parts }) => parts.filter(({ state }) => state === "waiting"));
    for (const part of next.slice(0, Math.max(0, free))) this.#run(part);
    const later = this.jobs.map(({ until }) => until).filter((until) => until > now && until < Infinity);
    if (later.length) this.#timer = setTimeout(() => this.#advance(), Math.min(...later) - now);
    this.#on.changed();
  }

  async #run(part) {
    const { job } = part;
    const wish = { ...job.wish, seed: job.wish.seed + part.index };
    const made = { wish, warnings: [], timing: null, peak: null };
    part.state = "running";
    part.name = `${job.key}-${part.index}`;
    part.abort = new AbortController();
    part.clock = new Clock(() => this.#on.stepped(part));
    try {
      await job.kept;
      const [path, body] = await request(wish);
      const how = { key: page.key, name: part.name, signal: part.abort.signal };
      for await (const event of draw(path, body, how)) {
        if (!part.isCancelled) await this.#take(part, event, made);
      }
      if (part.isCancelled) return;
      made.seconds = part.clock.seconds;
      await this.#on.done(part, made);
      part.state = "done";
      job.cuts = 0;
      await this.#settle(job);
    } catch (error) {
      if (!part.isCancelled) this.#failed(part, error);
    } finally {
      part.clock = null;
      this.#advance();
    }
  }

  async #take(part, event, made) {
    if (event.kind === "comment") {
      if (part.clock.read(event.text, made)) this.#on.queued(part);
    } else if (event.kind === "preview") {
      part.clock.preview(event.index);
      await this.#on.preview(part, event.blob);
    } else {
      made.blob = event.blob;
      made.warnings = event.event.warnings ?? [];
      Object.assign(made.wish, { seed: event.event.seed ?? made.wish.seed, ...measured(event.event.size) });
    }
  }

  /** What has gone wrong for now is tried again; what never will go well ends the job. */
  #failed(part, error) {
    const { job } = part;
    part.state = "waiting";
    const isRefusal = error instanceof Refusal;
    job.because = isRefusal ? error.message : "";
    if (isRefusal && (BUSY.has(error.status) || error.code === UNREACHABLE)) {
      job.until = performance.now() + 1000 * (error.wait_s ?? AGAIN_S);
      if (error.code === UNREACHABLE) this.#on.failed(error);
    } else if (error.code === CUT && job.cuts < MOST_CUTS) {
      job.cuts += 1;
      job.until = performance.now() + 1000 * job.cuts;
    } else if (error.status === 401) {
      job.until = Infinity;
      this.#on.failed(error);
    } else if (error.code === "idempotency_key_reused" && !job.isRenamed) {
      this.#rename(job);
    } else {
      for (const other of job.parts.filter((it) => it.state === "running")) {
        other.isCancelled = true;
        other.abort.abort();
      }
      this.#drop(job);
      this.#on.failed(error);
      this.#on.ended("failed");
    }
  }

  /** A new page may write the same wish in another way: then it is asked for anew. */
  #rename(job) {
    const old = job.key;
    job.letGo?.();
    Object.assign(job, { key: identity(), letGo: undefined });
    job.isRenamed = true;
    job.kept = this.#keep(job, [["jobs", old]]);
  }

  async #settle(job) {
    job.done = job.parts.filter(({ state }) => state === "done").map(({ index }) => index);
    if (job.done.length === job.count) {
      this.#drop(job);
      this.#on.ended("done");
    } else {
      await this.#keep(job);
    }
  }

  #drop(job) {
    this.jobs = this.jobs.filter((one) => one !== job);
    job.letGo?.();
    stored.then((store) => store.change([], [["jobs", job.key]])).catch(() => {});
    this.#advance();
  }

  /** Write it down with all that it is made from; without room, it lasts as long as the page. */
  async #keep(job, gone = []) {
    try {
      const store = await stored;
      const { key, at, count, done } = job;
      const { kept: wish, entries } = await packed(job.wish);
      if (!this.jobs.includes(job)) return;
      await store.change([...entries, ["jobs", { key, at, tab: this.#tab, wish, count, done }]], gone);
      job.letGo ??= await claim(key, true);
    } catch {
      // The gallery says that there is no room.
    }
  }
}

function asJob(kept) {
  const job = { ...kept, isHeld: false, until: 0, cuts: 0, because: "" };
  job.parts = Array.from({ length: job.count }, (_, index) => {
    return { job, index, state: job.done.includes(index) ? "done" : "waiting", clock: null };
  });
  return job;
}

async function request(wish) {
  const body = { prompt: wish.prompt, ...fields(wish), stream: true, partial_images: Math.min(PREVIEWS, wish.steps - 1) };
  if (!wish.references.length) return ["v1/images/generations", body];
  const form = new FormData();
  for (const [name, text] of formTexts(body)) form.append(name, text);
  for (const { blob, name } of wish.references) form.append("image[]", blob, name);
  if (wish.mask) form.append("mask", await wish.mask.blob, "mask.png");
  return ["v1/images/edits", form];
}

function measured(size) {
  const [width, height] = (size ?? "").split("x").map(Number);
  return width && height ? { width, height } : {};
}

/** A name that a tab keeps when it is loaded anew. */
function tabName() {
  try {
    sessionStorage["klein.tab"] ??= identity();
    return sessionStorage["klein.tab"];
  } catch {
    return "";
  }
}

/**
 * Hold a job, so that no other tab makes it; what lets it go again, or null where another has it.
 * Locks are for https and localhost only; elsewhere each tab keeps to its own.
 */
async function claim(key, isOurs) {
  if (!navigator.locks) return isOurs ? () => {} : null;
  return new Promise((resolve) => {
    // The page that was here before may take a moment to let go.
    const how = isOurs ? { signal: AbortSignal.timeout(3000) } : { ifAvailable: true };
    const hold = (lock) => (lock ? new Promise((letGo) => { resolve(letGo); }) : resolve(null));
    navigator.locks.request(`klein ${key}`, how, hold).catch(() => resolve(null));
  });
}
