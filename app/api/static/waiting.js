// What is on its way, as people see it: one bar, the pictures of the job as they come, and the jobs
// that wait.

import { $, button, element } from "./dom.js";
import { cost, page } from "./state.js";
import { about, some } from "./words.js";

const items = new Map(); // list items, by job

/** The bar of the eldest picture that is on its way. */
export function showProgress([part]) {
  $("progress").hidden = !part;
  if (!part) {
    document.title = "klein playground";
    return;
  }
  const { clock, job, index } = part;
  $("progress-text").textContent = `${prefix(part)}${clock.text}`;
  $("progress-time").textContent = `${clock.seconds.toFixed(1)} s`;
  if (clock.share) $("bar").value = clock.share;
  else $("bar").removeAttribute("value");
  document.title = `${job.count > 1 ? `${index + 1}/${job.count} ` : ""}${clock.text} - klein playground`;
}

export function prefix({ job, index }) {
  return job.count > 1 ? `Picture ${index + 1} of ${job.count}: ` : "";
}

/** All jobs with their places; of one alone that runs and has one picture, the bar says it all. */
export function showWaiting(queue) {
  const { jobs } = queue;
  const isOne = jobs.length === 1 && jobs[0].count === 1 && !jobs[0].isHeld && jobs[0].until === 0;
  const wanted = isOne ? [] : jobs;
  for (const [job, item] of items) {
    if (wanted.includes(job)) continue;
    if (item.contains(document.activeElement)) (nextButton(item) ?? $("make")).focus();
    item.remove();
    items.delete(job);
  }
  let before_s = 0;
  wanted.forEach((job, index) => {
    const item = items.get(job) ?? itemOf(job, queue);
    if ($("waiting-list").children[index] !== item) $("waiting-list").append(item);
    const left = job.count - job.done.length;
    before_s += page.rules ? cost.predict(job.wish) * left : 0;
    const text = stateOf(job, index, before_s);
    const place = item.querySelector(".note");
    if (place.textContent !== text) place.textContent = text;
    item.querySelector(".release").hidden = !job.isHeld;
  });
  $("waiting").hidden = !wanted.length;
}

function nextButton(item) {
  return (item.nextElementSibling ?? item.previousElementSibling)?.querySelector(".stop");
}

function stateOf(job, index, ready_s) {
  const { parts, count, done, isHeld, until, because } = job;
  if (isHeld) return "Asked for in a tab that was closed";
  if (until === Infinity) return because;
  const left_s = (until - performance.now()) / 1000;
  if (left_s > 0) return `${because} Trying again in ${Math.ceil(left_s)} s`;
  const running = parts.find(({ state }) => state === "running");
  const progress = count > 1 ? `, ${done.length} of ${count} done` : "";
  if (running?.clock) return `${running.clock.text}${progress}`;
  const soon = about(ready_s);
  return `Number ${index + 1}${progress}${soon ? `, done in ${soon}` : ""}`;
}

function itemOf(job, queue) {
  const words = element("span", { className: "words", textContent: job.wish.prompt });
  const facts = element("span", { className: "note" });
  const release = button("Make it now", "release", () => {
    queue.release(job);
    $("make").focus();
  });
  const stop = button("Cancel", "stop", () => queue.cancel(job));
  const name = `${job.wish.prompt.slice(0, 60)}${job.count > 1 ? `, ${some(job.count, "picture")}` : ""}`;
  stop.setAttribute("aria-label", `Cancel: ${name}`);
  const item = element("li", {}, element("div", {}, words, facts), release, stop);
  items.set(job, item);
  return item;
}

// ---------------------------------------------------------------------------------------------
// The pictures of one job, in a grid as they come

let batch = null; // the job that the grid shows
let urls = [];

/** Lay out places for the pictures of `job`, or take the grid away where there is but one; whether it is new. */
export function showBatch(job) {
  if (job === batch) return false;
  batch = job;
  for (const url of urls) URL.revokeObjectURL(url);
  urls = [];
  $("batch").hidden = job.count < 2;
  const places = job.count < 2 ? [] : job.parts.map(({ index }) => {
    const place = element("button", { type: "button", disabled: true });
    place.setAttribute("aria-label", `Picture ${index + 1} of ${job.count}`);
    return element("li", {}, place);
  });
  $("batch").replaceChildren(...places);
  return true;
}

/** Put a preview, or the picture with what a click on it does, into its place. */
export function fillBatch({ job, index }, blob, onClick = null) {
  const place = job === batch && $("batch").children[index]?.firstChild;
  if (!place) return;
  const url = URL.createObjectURL(blob);
  urls.push(url);
  place.replaceChildren(element("img", { src: url, alt: "" }));
  if (!onClick) return;
  place.disabled = false;
  place.addEventListener("click", onClick);
}
