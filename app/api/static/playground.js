// The page: joins its parts. Everything that a person or the service wrote is set as text, never as
// markup; the page's security policy would refuse the rest.

import { rememberedKey, useKey } from "./access.js";
import { $, onClick, setPressed } from "./dom.js";
import { wireDrop } from "./drop.js";
import { hideError, showError } from "./errors.js";
import { asLink, buildForm, followLink, keepForm, onFormInput, readWish, refreshForm, restoreForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { noteQueue, wireNotify } from "./notify.js";
import { wireExtend } from "./outpaint.js";
import { Queue } from "./queue.js";
import { asCurl, asPython, fileName } from "./recipes.js";
import { addReferences, replaceReferences, restoreDesk, restoreReferences, wireReferences } from "./references.js";
import { say } from "./say.js";
import { lanes, lookAgain, poll, showFacts, showTiming, startPolling } from "./service.js";
import { wireShortcuts } from "./shortcuts.js";
import { cost, on, page } from "./state.js";
import { unpacked } from "./store.js";
import { buildStyles, unchooseStyles } from "./styles.js";
import {
  compareWith, endComparing, expect, fileOf, isComparing, isZoomed, rest, show, showFrame, showPreview, wireViewer, zoom,
} from "./viewer.js";
import { fillBatch, prefix, showBatch, showProgress, showWaiting } from "./waiting.js";
import { some } from "./words.js";

const VARIATIONS = 4;

const gallery = new Gallery(choose);
const queue = new Queue({ changed, queued, stepped, preview, done, failed: showError, ended }, lanes);
let isFollowed = true; // whether what is on its way goes on show; not while somebody looks at another
let isPicking = false; // a picture to compare with
let ticking = 0;
let madeSince = 0; // pictures since the queue was empty

// ---------------------------------------------------------------------------------------------
// What is on its way

function make() {
  hideError();
  try {
    const wish = readWish();
    ask({ ...wish, count: 1 }, wish.count);
  } catch (error) {
    showError(error);
  }
}

function ask(wish, count) {
  if (!queue.isBusy) isFollowed = true;
  else say(`${some(count, "picture")} more asked for.`);
  queue.add(wish, count);
  reveal($("stage"));
}

function changed() {
  const [part] = queue.running;
  const { isBusy } = queue;
  $("stage").setAttribute("aria-busy", String(isBusy));
  if (!isBusy && document.activeElement === $("cancel")) $("make").focus();
  $("cancel").hidden = !isBusy;
  showWaiting(queue);
  showProgress(queue.running);
  if (isBusy) noteQueue(true);
  if (part && isFollowed) {
    if (showBatch(part.job)) for (const one of part.job.parts) fillDone(one, gallery.find(idOf(one)));
    if ($("frame").dataset.state !== "working") expect(part.job.wish);
  }
  clearInterval(ticking);
  if (queue.jobs.length) ticking = setInterval(tick, 100);
}

/** What a picture is kept as. */
function idOf({ job, index }) {
  return `${job.key}-${index}`;
}

function fillDone(part, made) {
  if (made) fillBatch(part, made.thumb, () => choose(made));
}

function tick() {
  showProgress(queue.running);
  showWaiting(queue);
}

function queued(part) {
  stepped(part);
  if (part === queue.running.at(-1)) poll();
}

function stepped(part) {
  if (part === queue.running[0]) say(prefix(part) + part.clock.text);
}

async function preview(part, blob) {
  fillBatch(part, blob);
  const isShown = isFollowed && part === queue.running[0] && !isComparing() && !isZoomed();
  if (isShown) await showPreview(part.job.wish, blob, part.clock.share);
}

async function done(part, made) {
  made.id = idOf(part);
  // What it was made with stays, whatever the service's own become.
  made.wish.loras = { ...made.wish.loras, isTouched: true };
  cost.learn(made.wish, made.timing ?? { denoise: made.seconds });
  madeSince += 1;
  hideUnreachable();
  await gallery.add(made);
  fillDone(part, made);
  if (isFollowed && !isComparing()) await display(made);
}

function hideUnreachable() {
  if ($("error").parentElement === $("error-place")) hideError();
}

function ended(how) {
  if (how === "cancelled") say("Cancelled.");
  else if (how === "done") say(madeSince > 1 ? `${madeSince} pictures are done.` : "The picture is done.");
  noteQueue(queue.isBusy, `${some(madeSince, "picture is", "pictures are")} done.`);
  if (how !== "done") rest();
  if (!queue.isBusy) {
    madeSince = 0;
    isFollowed = true;
    if (page.shown) showFrame("done");
  }
  refreshForm();
  poll();
}

function cancel() {
  const job = queue.running[0]?.job ?? queue.jobs.find(({ isHeld }) => !isHeld);
  if (job) queue.cancel(job);
}

// ---------------------------------------------------------------------------------------------
// What was made

async function display(made) {
  await show(made);
  gallery.mark();
  showFacts();
  showTiming(made);
  refreshForm();
}

/** Show a picture of the history, or lay it beside the one on show. */
function choose(made) {
  if (isPicking && page.shown && made !== page.shown) {
    pick(false);
    compareWith(made);
    return;
  }
  pick(false);
  if (queue.isBusy) isFollowed = false;
  if (made) display(made);
  else {
    page.shown = null;
    rest();
    refreshForm();
  }
}

function pick(isWanted) {
  isPicking = isWanted;
  setPressed("compare", isWanted);
  $("compare").textContent = isWanted ? "Choose the other in the history" : "Compare";
}

function toggleCompare() {
  if (isComparing()) endComparing();
  else pick(!isPicking);
}

function step(by) {
  const made = gallery.beside(by);
  if (made) choose(made);
}

async function toggleFavourite() {
  if (!page.shown) return;
  await gallery.toggleFavourite(page.shown);
  setPressed("favourite", page.shown.isFavourite);
}

async function remove() {
  if (!page.shown) return;
  const next = await gallery.delete(page.shown);
  choose(next);
  $("undelete").focus();
}

async function shownFile() {
  const { wish } = page.shown;
  const blob = await fileOf(page.shown);
  return new File([blob], fileName(wish), { type: blob.type });
}

async function reuse() {
  await addReferences([await shownFile()]);
  say("Added to the pictures to work from.");
  $("prompt").focus();
}

async function edit() {
  if (!page.shown) return;
  await replaceReferences([await shownFile()]);
  say("This picture is the one to work from.");
  $("prompt").focus();
  $("prompt").select();
}

/** The same with the seeds that follow. */
async function variations() {
  const wish = await unpacked(page.shown.wish);
  const most = page.rules.limits.max_seed - VARIATIONS;
  ask({ ...wish, seed: wish.seed >= most ? 0 : wish.seed + 1 }, VARIATIONS);
}

/** Put everything back as it was asked for, seed included. */
async function restore() {
  const { wish } = page.shown;
  restoreForm(wish);
  unchooseStyles();
  say("The settings of this picture are back.");
  $("prompt").focus();
  await restoreReferences(wish);
  restoreForm(wish);
}

async function copy(event, write, what) {
  const pressed = event.currentTarget;
  const base = new URL(".", document.baseURI).href;
  const text = write(page.shown.wish, base, page.needsKey || Boolean(page.key));
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Only https and localhost may write to the clipboard; everybody may select and copy.
    $("text").value = text;
    $("text-dialog").showModal();
    $("text").select();
    return;
  }
  say(`Copied ${what}.`);
  pressed.textContent = "Copied";
  setTimeout(() => {
    pressed.textContent = `Copy ${what}`;
  }, 1600);
}

function reveal(place) {
  if (place.getBoundingClientRect().top < window.innerHeight * 0.6) return;
  const isCalm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  place.scrollIntoView({ behavior: isCalm ? "auto" : "smooth", block: "start" });
}

// ---------------------------------------------------------------------------------------------
// Wiring

function leave() {
  if (isPicking) pick(false);
  else if (isComparing()) endComparing();
  else if (isZoomed()) zoom(false);
  else cancel();
}

/** Arrows move what is larger than its frame, and otherwise go through the history. */
function onArrow(event, by) {
  if (isZoomed() && document.activeElement === $("frame")) return false;
  step(by);
  return true;
}

wireShortcuts([
  { keys: ["Ctrl+Enter"], text: "Make it", act: make },
  { keys: ["Escape"], text: "Leave what is open, or cancel the picture on its way", act: leave },
  { keys: ["/"], text: "To the prompt", act: () => $("prompt").focus() },
  { keys: ["ArrowLeft"], text: "The newer picture", act: (event) => onArrow(event, -1) },
  { keys: ["ArrowRight"], text: "The older picture", act: (event) => onArrow(event, 1) },
  { keys: ["z"], text: "One pixel for one pixel, and back", act: () => page.shown && zoom() },
  { keys: ["b"], text: "Before and after", act: () => $("before").hidden || $("before").click() },
  { keys: ["e"], text: "Edit this picture", act: edit },
  { keys: ["f"], text: "Favourite, or no longer", act: toggleFavourite },
  { keys: ["Delete"], text: "Delete this picture", act: remove },
  { keys: ["?"], text: "These keys", act: () => $("help-dialog").showModal() },
]);

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("form").addEventListener("input", onFormInput);
for (const id of ["adapters", "settings"]) $(id).addEventListener("toggle", keepForm);
for (const id of ["chosen", "adapters-list"]) $(id).addEventListener("click", keepForm);
onClick("cancel", cancel);
onClick("reuse", reuse);
onClick("edit", edit);
onClick("variations", variations);
onClick("restore", restore);
onClick("compare", toggleCompare);
onClick("favourite", toggleFavourite);
onClick("delete", remove);
onClick("copy-link", (event) => copy(event, asLink, "link"));
onClick("copy-curl", (event) => copy(event, asCurl, "as curl"));
onClick("copy-python", (event) => copy(event, asPython, "as Python"));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  hideError();
  useKey($("key").value.trim());
  $("key").value = "";
});
onClick("key-forget", () => useKey(""));
window.addEventListener("hashchange", followLink);
on("references", () => refreshForm());
on("key", () => {
  lookAgain();
  if (page.key) queue.wake();
});
for (const wire of [wireDrop, wireReferences, wireExtend, wireViewer, wireNotify]) wire();

page.key = rememberedKey();
buildStyles();
buildForm();
refreshForm();
showFacts();
const onQueue = (size, askedAt) => queue.running.toReversed().forEach(({ clock }, behind) => clock.onQueue(size - behind, askedAt));
startPolling(() => queue.isBusy, onQueue);
await gallery.load();
if (gallery.newest && !page.shown) await display(gallery.newest);
delete $("stage").dataset.loading;
await restoreDesk();
await queue.resume();
