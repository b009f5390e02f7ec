// Talks to the service: JSON, uploads, and pictures as a stream of server-sent events.
// Knows nothing of the page.

// Codes of refusals that are not the service's.
export const UNREACHABLE = "unreachable";
export const CUT = "cut";

/** What the service said instead of a picture; the message is written for people. */
export class Refusal extends Error {
  constructor(message, { status = 0, code = null, param = null, wait_s = null } = {}) {
    super(message);
    this.name = "Refusal";
    Object.assign(this, { status, code, param, wait_s });
  }
}

/** GET `path`, or POST `json` to it; a refusal carries the body too, since /health tells its state either way. */
export async function ask(path, { key = "", json, method = json ? "POST" : "GET", signal } = {}) {
  const headers = { ...authorization(key), ...(json && { "content-type": "application/json" }) };
  const response = await reach(path, { method, headers, signal, cache: "no-store", body: JSON.stringify(json) });
  const body = await response.json().catch(() => null);
  return { status: response.status, body };
}

/** GET the picture at `path` as a blob. */
export async function askPicture(path, { key = "" } = {}) {
  const response = await reach(path, { headers: authorization(key) });
  if (!response.ok) throw await refusal(response);
  return response.blob();
}

/**
 * Take a job back by the id of its request, wherever its socket has gone; whether there was one.
 */
export async function takeBack(requestId, { key = "" } = {}) {
  const { body } = await ask("v1/jobs", { key });
  const jobs = (body?.data ?? []).filter((job) => job.request_id === requestId);
  const options = { method: "DELETE", headers: authorization(key) };
  await Promise.all(jobs.map(({ id }) => reach(`v1/jobs/${encodeURIComponent(id)}`, options)));
  return jobs.length > 0;
}

/**
 * POST `body` (an object, or a FormData with pictures) for `count` pictures and yield what happens to each `image`:
 * {kind: "comment", text}, {kind: "preview", blob, index}, then one {kind: "done", blob, event}. The same `name` with the
 * same body is the same job: a service that knows it tells all of it again.
 */
export async function* draw(path, body, { key = "", name, count = 1, signal } = {}) {
  const isForm = body instanceof FormData;
  const type = isForm ? {} : { "content-type": "application/json" };
  const response = await reach(path, {
    method: "POST",
    headers: { ...authorization(key), ...type, "idempotency-key": name, "x-request-id": name },
    body: isForm ? body : JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let left = count;
  for await (const item of events(response.body)) {
    if (item.comment !== undefined) {
      const [, image = 0, text] = /^(?:(\d+) )?(.*)/s.exec(item.comment);
      yield { kind: "comment", image, text };
      continue;
    }
    const event = JSON.parse(item.data);
    if (event.error) throw new Refusal(event.error.message, event.error);
    const { image_index: image = 0, partial_image_index: index } = event;
    const blob = decode(event.b64_json, event.output_format);
    if (event.type.endsWith(".completed")) {
      yield { kind: "done", image, blob, event };
      left -= 1;
      if (!left) return;
    } else {
      yield { kind: "preview", image, blob, index };
    }
  }
  throw new Refusal("The connection ended before the picture was done. Try again.", { code: CUT });
}

/** Split a stream of bytes into comments and events; an event ends with its blank line. */
export async function* events(stream) {
  let data = [];
  for await (const line of lines(stream)) {
    if (line === "") {
      if (data.length) yield { data: data.join("\n") };
      data = [];
    } else if (line.startsWith(":")) {
      yield { comment: line.slice(1).trim() };
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  // A picture is one line of megabytes: its pieces are joined once, when its end has come.
  let pieces = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(explain);
      if (done) return;
      const parts = value.split("\n");
      for (const part of parts.slice(0, -1)) {
        pieces.push(part);
        yield pieces.join("").replace(/\r$/, "");
        pieces = [];
      }
      pieces.push(parts.at(-1));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service cannot be reached. Is it still running?", { code: UNREACHABLE });
  }
}

function explain(error) {
  if (error.name === "AbortError") throw error;
  throw new Refusal("The connection was cut before the picture was done. Try again.", { code: CUT });
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const error = body?.error ?? {};
  const message = error.message ?? `The service answered ${response.status} without a reason.`;
  const wait = response.headers.get("retry-after");
  const wait_s = wait === null ? null : Number(wait) || 1;
  return new Refusal(message, { status: response.status, code: error.code, param: error.param, wait_s });
}

function authorization(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

function decode(base64, format) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return new Blob([bytes], { type: `image/${format}` });
}
