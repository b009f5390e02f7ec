// The pictures that are asked for: which are on their way, which wait, and how they survive a page
// that is loaded anew.
//
// A job is one press of the button, and one request under a name of its own (`Idempotency-Key`),
// in parts only where the service takes no more pictures at a time: where the page was loaded anew,
// or the connection was cut, the same request under the same name brings all of its pictures again.
// A service that has forgotten the name makes them again, from the same seeds.

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
    return this.jobs.flatMap(({ parts }) => parts.filter(isIn("running")));
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
    const runs = runsOf(job);
    for (const run of runs) run.isCancelled = true;
    this.#drop(job);
    this.#on.ended("cancelled");
    // With its name a request outlives its connection, so it has to be taken back.
    for (const { name, abort } of runs) {
      await takeBack(name, { key: page.key }).catch(() => {});
      abort.abort();
    }
  }

  #advance() {
    clearTimeout(this.#timer);
    const now = performance.now();
    let free = Math.max(1, Math.min(MOST_AT_ONCE, this.#lanes())) - this.running.length;
    const ready = this.jobs.filter((job) => !job.isHeld && job.until <= now);
    for (const parts of ready.flatMap(requestsOf)) {
      if (free <= 0) break;
      free -= parts.length;
      this.#run(parts);
    }
    const later = this.jobs.map(({ until }) => until).filter((until) => until > now && until < Infinity);
    if (later.length) this.#timer = setTimeout(() => this.#advance(), Math.min(...later) - now);
    this.#on.changed();
  }

  /** Ask for `parts`, which lie in a row; of those that are done, nothing is heard again. */
  async #run(parts) {
    const [{ job, index }] = parts;
    const run = { name: `${job.key}-${index}`, abort: new AbortController() };
    for (const part of parts.filter(isIn("waiting"))) {
      const wish = { ...job.wish, seed: job.wish.seed + part.index };
      const made = { wish, warnings: [], timing: null, peak: null };
      Object.assign(part, { state: "running", run, made, clock: new Clock(() => this.#on.stepped(part)) });
    }
    try {
      await job.kept;
      const [path, body] = await request(parts);
      const how = { key: page.key, name: run.name, count: parts.length, signal: run.abort.signal };
      for await (const event of draw(path, body, how)) {
        const part = parts[event.image];
        if (part.state === "running" && !run.isCancelled) await this.#take(part, event);
      }
    } catch (error) {
      if (!run.isCancelled) this.#failed(parts, error);
    } finally {
      this.#advance();
    }
  }

  async #take(part, event) {
    const { job, clock, made } = part;
    if (event.kind === "comment") {
      if (clock.read(event.text, made)) this.#on.queued(part);
    } else if (event.kind === "preview") {
      clock.preview(event.index);
      await this.#on.preview(part, event.blob);
    } else {
      const { seed = made.wish.seed, size, warnings = [] } = event.event;
      Object.assign(made, { blob: event.blob, warnings, seconds: clock.seconds });
      Object.assign(made.wish, { seed, ...measured(size) });
      await this.#on.done(part, made);
      part.state = "done";
      job.cuts = 0;
      await this.#settle(job);
      this.running[0]?.clock.start();
      this.#advance();
    }
  }

  /** What has gone wrong for now is tried again; what never will go well ends the job. */
  #failed(parts, error) {
    const [{ job }] = parts;
    for (const part of parts.filter(isIn("running"))) part.state = "waiting";
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
    } else if (error.param === "n" && parts.length > 1) {
      job.most = Math.ceil(parts.length / 2);
      job.kept = this.#keep(job);
    } else {
      for (const run of runsOf(job)) {
        run.isCancelled = true;
        run.abort.abort();
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
    job.done = job.parts.filter(isIn("done")).map(({ index }) => index);
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
      const { key, at, count, most, done } = job;
      const { kept: wish, entries } = await packed(job.wish);
      if (!this.jobs.includes(job)) return;
      await store.change([...entries, ["jobs", { key, at, tab: this.#tab, wish, count, most, done }]], gone);
      job.letGo ??= await claim(key, true);
    } catch {
      // The gallery says that there is no room.
    }
  }
}

const isIn = (wanted) => ({ state }) => state === wanted;

function asJob(kept) {
  const job = { most: kept.count, ...kept, isHeld: false, until: 0, cuts: 0, because: "" };
  job.parts = Array.from({ length: job.count }, (_, index) => {
    return { job, index, state: job.done.includes(index) ? "done" : "waiting", clock: null };
  });
  return job;
}

/** The parts of each request that is to be sent. */
function requestsOf({ parts, most }) {
  const all = Array.from({ length: Math.ceil(parts.length / most) }, (_, at) => parts.slice(at * most, (at + 1) * most));
  return all.filter((some) => some.some(isIn("waiting")) && !some.some(isIn("running")));
}

/** The requests that are on their way: {name, abort, isCancelled}. */
function runsOf({ parts }) {
  return new Set(parts.filter(isIn("running")).map(({ run }) => run));
}

async function request(parts) {
  const [{ job, index }] = parts;
  const { wish } = job;
  const how = { n: parts.length, stream: true, indexed: true, partial_images: Math.min(PREVIEWS, wish.steps - 1) };
  const body = { prompt: wish.prompt, ...fields({ ...wish, seed: wish.seed + index }), ...how };
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
