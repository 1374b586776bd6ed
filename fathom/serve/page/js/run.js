/** One answer in the making: reads the stream into the message, and tells the page. It goes on when another conversation is shown. */

import { ChatError, ask } from "./api.js";
import { path } from "./store.js";

const TEMPERATURE = 0.6; // unless set: for a conversation the API's own 1.0 is too much for small models
const SAVE_EVERY = 2000; // ms

export class Run {
  #abort = new AbortController();
  #firstToken = 0;
  #lastToken = 0;
  #thinkingSince = 0;
  #saved = performance.now();

  /**
   * @param {object} node the empty assistant message to fill
   * @param {() => object | undefined} view its view, while it is on the page
   * @param {() => void} save
   */
  constructor(conversation, node, view, save) {
    this.conversation = conversation;
    this.node = node;
    this.view = view;
    this.save = save;
  }

  stop() {
    this.#abort.abort();
  }

  /** Seconds of thinking so far, or null when it is not thinking. */
  get thinkingSeconds() {
    return this.#thinkingSince && !this.node.content ? (performance.now() - this.#thinkingSince) / 1000 : null;
  }

  /** Fill the message; ends in every case, with `node.finish` and perhaps `node.error` set. */
  async fill(request) {
    const { node } = this;
    this.view()?.begin();
    try {
      for await (const part of ask(request, this.#abort.signal)) this.#take(part);
      node.finish ??= "stop";
    } catch (error) {
      if (this.#abort.signal.aborted) {
        node.finish = "stopped";
      } else {
        node.finish = node.content || node.thoughts ? "cut" : "failed";
        node.error = error instanceof ChatError ? { kind: error.kind, message: error.message } : unexpected(error);
      }
    }
    if (this.thinkingSeconds !== null) node.seconds = this.thinkingSeconds;
    const tokens = node.usage?.completion_tokens;
    const elapsed = (this.#lastToken - this.#firstToken) / 1000;
    // The first token's time is the prompt's, so it is not in the rate.
    if (tokens > 1 && elapsed > 0) node.rate = (tokens - 1) / elapsed;
    this.save();
    this.view()?.settle();
  }

  #take(part) {
    const { node } = this;
    if (part.waiting) this.view()?.waiting("Waiting for a place in the queue");
    if (part.thoughts || part.text) {
      this.#lastToken = performance.now();
      this.#firstToken ||= this.#lastToken;
    }
    if (part.thoughts) {
      this.#thinkingSince ||= performance.now();
      node.thoughts = (node.thoughts ?? "") + part.thoughts;
      this.view()?.thinking(part.thoughts, this.thinkingSeconds ?? 0);
    } else if (part.text) {
      if (this.thinkingSeconds !== null) node.seconds = this.thinkingSeconds;
      this.view()?.answering(part.text);
      node.content += part.text;
    } else if (part.finish) {
      node.finish = part.finish;
    } else if (part.usage) {
      node.usage = part.usage;
    }
    if (performance.now() - this.#saved > SAVE_EVERY) {
      this.#saved = performance.now();
      this.save();
    }
  }
}

function unexpected(error) {
  console.error(error);
  return { kind: "server", message: "Something unexpected went wrong; the browser's console has the details." };
}

/** The body of a request that answers the path which ends with `node`'s parent. */
export function requestFor(conversation, node, model, settings) {
  const messages = [];
  for (const { role, content } of path(conversation, node.parent)) {
    // Earlier thoughts are not sent back, for models are trained without them. Templates want the roles to take turns,
    // so a question that got no answer and the next one become one.
    if (role === "user" && messages.at(-1)?.role === "user") messages.at(-1).content += `\n\n${content}`;
    else if (role === "user" || content) messages.push({ role, content });
  }
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const request = { model: model.id, messages };
  request.temperature = settings.temperature === "" ? TEMPERATURE : Number(settings.temperature);
  if (settings.maxTokens !== "") request.max_tokens = Number(settings.maxTokens);
  if (model.thinking) {
    request.thinking = { type: settings.think ? "enabled" : "disabled" };
    if (settings.think) request.reasoning_effort = settings.effort;
    if (settings.think && settings.budget !== "") request.thinking_budget = Number(settings.budget);
  }
  return request;
}
