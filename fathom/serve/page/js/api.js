/** The service's API, as the page needs it: the models, and one streamed answer. */

import { apiKey } from "./store.js";

/** What went wrong, in words for a person. `kind`: key, busy, refused, offline, broken, server. */
export class ChatError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** `[{id, thinking, context}]`. Raises ChatError. */
export async function listModels() {
  const response = await send("v1/models", { method: "GET" });
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ChatError("server", "The service gave no list of models.");
  return body.data.map(({ id, thinking, context }) => ({ id: String(id), thinking: thinking === true, context: context ?? null }));
}

/**
 * Ask for one answer. Yields `{thoughts}`, `{text}`, `{usage}`, `{finish}` and `{waiting: true}` as they come.
 * Raises ChatError, or the AbortError of `signal`.
 */
export async function* ask(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let done = false;
  for await (const event of events(response, signal)) {
    if (event === null) {
      yield { waiting: true };
    } else if (event === "[DONE]") {
      done = true;
      break;
    } else {
      yield* parts(parseEvent(event));
    }
  }
  if (!done) throw new ChatError("broken", "The connection broke off before the answer was complete.");
}

function parseEvent(text) {
  let event;
  try {
    event = JSON.parse(text);
  } catch {
    throw new ChatError("broken", "The service sent something unreadable, so the answer is incomplete.");
  }
  if (event?.error) throw new ChatError("server", `The service reports: ${messageOf(event)}`);
  return event;
}

function* parts(event) {
  const choice = event?.choices?.[0];
  if (choice?.delta?.reasoning_content) yield { thoughts: choice.delta.reasoning_content };
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (event?.usage) yield { usage: event.usage };
}

/** Data of each server-sent event; null for a comment, which says that the request is still waiting. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) yield null;
        else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ChatError) throw error;
    throw new ChatError("broken", "The connection broke off before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already; what matters is that nothing reads on
  }
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw navigator.onLine
      ? new ChatError("offline", "The service cannot be reached. Is it still running?")
      : new ChatError("offline", "This device is offline.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const detail = messageOf(await response.json().catch(() => null));
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const when = seconds > 0 ? `Try again in ${seconds} s.` : "Try again in a moment.";
  switch (response.status) {
    case 401:
    case 403:
      return new ChatError("key", apiKey.get() ? "The service did not accept this API key." : "The service asks for an API key.");
    case 429:
      return new ChatError("busy", `Too many requests at once. ${when}`);
    case 503:
      return new ChatError("busy", `The service is busy. ${when}`);
    default:
      if (response.status >= 500) return new ChatError("server", `The service failed (${response.status}). ${detail}`.trim());
      return new ChatError("refused", `The service refused the request (${response.status}). ${detail}`.trim());
  }
}

function messageOf(body) {
  const message = body?.error?.message ?? body?.detail;
  return typeof message === "string" ? message.slice(0, 500) : "";
}
