// What is behind the page: the service's state, the model, the cards, and the seconds of a picture.

import { askForKey, setStatus, showKeyForm } from "./access.js";
import { $, element } from "./dom.js";
import { picker, refreshForm, takeLimits } from "./form.js";
import { STAGES } from "./progress.js";
import { cost, model, page } from "./state.js";
import { ask } from "./stream.js";
import { bytes, exactly } from "./words.js";

let polling = 0;
let canRest = true;
let isBusy = () => false;
let onQueue = () => {};

/** Ask again and again while the page is seen; `busy` says whether often, `queued` hears of the queue. */
export function startPolling(busy, queued) {
  [isBusy, onQueue] = [busy, queued];
  document.addEventListener("visibilitychange", lookAgain);
  window.addEventListener("focus", lookAgain);
  $("rest").addEventListener("click", rest);
  poll();
}

export async function poll() {
  clearTimeout(polling);
  if (document.hidden) return; // it is asked as soon as the page is seen
  let wait_s = 3;
  const askedAt = performance.now();
  try {
    const { status, body } = await ask("health", { key: page.key });
    wait_s = onHealth(status, body);
    if (body?.queue) onQueue(body.queue.size, askedAt);
  } catch (error) {
    setStatus("gone", error.message);
  }
  clearTimeout(polling);
  polling = setTimeout(poll, wait_s * 1000);
}

/** Have the service asked for everything anew. */
export function lookAgain() {
  if (document.hidden) return;
  page.isListOld = true;
  poll();
}

/** Have the service free the card, or take it back. */
async function rest() {
  const { status } = await ask(page.health.state === "ready" ? "sleep" : "wake", { key: page.key, method: "POST" });
  if (status === 404) canRest = false; // its owner does not want that
  poll();
}

/** How many pictures it makes at once. */
export function lanes() {
  const devices = page.health?.devices ?? [];
  return devices.filter(({ ready }) => ready).length || 1;
}

/** Take what the service says of itself; return when to ask again, in seconds. */
function onHealth(status, body) {
  if (status === 401) {
    askForKey();
    return 600;
  }
  showKeyForm(false);
  page.health = body;
  if (body) takeLimits(body);
  if (page.rules && body?.worker) cost.guess({ ...model, references: [] }, body.worker.warm_up_s);
  showFacts();
  refreshForm();
  $("rest").hidden = !canRest || !["ready", "asleep", "yielding"].includes(body?.state);
  $("rest").textContent = body?.state === "ready" ? "Free the card" : "Wake";
  if (!body?.ready) {
    const share = body?.progress ? ` ${Math.round(body.progress * 100)} %` : "";
    setStatus("waiting", `${body?.reason || "Not ready yet."}${share}`);
    return 1.5;
  }
  const waiting = body.queue.size ? `, ${body.queue.size} waiting` : "";
  refreshAdapters();
  const where = body.worker?.device === "cpu" ? "the CPU" : body.worker?.device;
  const resting = { asleep: "Asleep; the next picture wakes it", waking: "Waking" }[body.state];
  setStatus(resting ? "waiting" : "ready", `${resting ?? `Ready on ${where}`}${waiting}`);
  return isBusy() ? 1 : 6;
}

/** Ask for the list of adapters, unless it is known. */
async function refreshAdapters() {
  if (!page.isListOld) return;
  page.isListOld = false;
  try {
    const { status, body } = await ask("v1/loras", { key: page.key });
    if (status === 200) picker.list(body.data);
    else page.isListOld = true;
  } catch {
    page.isListOld = true; // the status says that the service is gone
  }
}

let factsShown = "";

export function showFacts() {
  const { health } = page;
  const worker = health?.worker;
  const facts = [["Model", model.title, worker ? `${model.id}, revision ${worker.revision.slice(0, 12)}` : model.id]];
  if (worker) {
    facts.push(["Card", worker.device === "cpu" ? "none, on the CPU" : worker.device]);
    facts.push(["Precision", worker.precision, worker.precision_reason]);
    facts.push(["Memory plan", worker.plan, worker.plan_reasons.join(" ")]);
    facts.push(["Memory", `${bytes(worker.weights_bytes)} of weights`, page.shown?.peak ? `at most ${bytes(page.shown.peak)} during that picture` : ""]);
    if (worker.features.length) facts.push(["Switched on", worker.features.join(", ")]);
    facts.push(["Software", [`torch ${worker.torch}`, worker.cuda ? `CUDA ${worker.cuda}` : "", `klein-server ${health.version}`].filter(Boolean).join(", ")]);
  }
  if (health?.queue) {
    const { size, capacity, running } = health.queue;
    facts.push(["Queue", `${size} of ${capacity} waiting, ${running} running`]);
  }
  const text = JSON.stringify([facts, health?.devices]);
  if (text === factsShown) return;
  factsShown = text;
  $("facts").replaceChildren(
    ...facts.flatMap(([name, value, reason]) => {
      const because = reason ? [element("small", { textContent: reason })] : [];
      return [element("dt", { textContent: name }), element("dd", {}, value, ...because)];
    }),
  );
  showDevices(health?.devices ?? []);
}

/** Cards side by side, where there are several. */
function showDevices(devices) {
  $("devices").hidden = devices.length < 2;
  if (devices.length < 2) return;
  const items = devices.map((device, index) => {
    const { name, ready, stage, progress, reason, precision, plan, restarts, left_out: isLeftOut } = device;
    const share = !ready && progress ? `, ${Math.round(progress * 100)} %` : "";
    const state = ready ? "Ready" : isLeftOut ? "Left out" : `${stage[0].toUpperCase()}${stage.slice(1)}${share}`;
    const facts = [precision, plan, restarts ? `started ${restarts + 1} times` : ""].filter(Boolean).join(", ");
    const dot = element("span", { className: "dot" });
    dot.setAttribute("aria-hidden", "true");
    const item = element("li", {}, element("b", { textContent: `${index + 1}. ${name}` }));
    item.dataset.state = ready ? "ready" : isLeftOut ? "gone" : "waiting";
    item.append(element("span", {}, dot, state));
    for (const text of [facts, ready ? "" : reason]) if (text) item.append(element("small", { textContent: text }));
    return item;
  });
  $("devices").replaceChildren(...items);
}

export function showTiming({ timing }) {
  $("timing").hidden = !timing;
  if (!timing) return;
  const spent = Object.keys(STAGES).filter((stage) => timing[stage] > 0);
  const sum = spent.reduce((before, stage) => before + timing[stage], 0);
  const bars = spent.map((stage) => {
    const bar = element("span");
    bar.dataset.stage = stage;
    // Shares of one: where they add up to less, they leave the rest of the bar empty.
    bar.style.flexGrow = timing[stage] / sum;
    return bar;
  });
  const rows = spent.flatMap((stage) => {
    const name = element("dt", { textContent: STAGES[stage] });
    name.dataset.stage = stage;
    return [name, element("dd", { textContent: exactly(timing[stage]) })];
  });
  rows.push(element("dt", { textContent: "Altogether" }), element("dd", { textContent: exactly(timing.total) }));
  $("stages").replaceChildren(...bars);
  $("stage-list").replaceChildren(...rows);
}
