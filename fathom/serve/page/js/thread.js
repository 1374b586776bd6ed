/** The messages of one conversation on the page. */

import { copy, el, icon, iconButton } from "./dom.js";
import { LiveMarkdown } from "./live.js";
import { path, versions } from "./store.js";

/**
 * @typedef {object} Actions what a person can do with a message
 * @property {(node: object) => void} regenerate
 * @property {(node: object, text: string) => void} resend
 * @property {(node: object) => void} showVersion
 * @property {() => void} askForKey
 */

export class Thread {
  #views = new Map();

  /** @param {Actions} actions */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
  }

  /** Show `conversation` from its first message to its leaf. */
  show(conversation) {
    this.conversation = conversation;
    this.#views.clear();
    this.list.replaceChildren();
    for (const node of path(conversation)) this.add(node);
  }

  add(node) {
    const view = node.role === "user" ? new Question(node, this) : new Answer(node, this);
    this.#views.set(node.id, view);
    this.list.append(view.element);
    return view;
  }

  /** The view of a message, or undefined where it is not on the page. */
  view(id) {
    return this.#views.get(id);
  }

  /** Whether an answer is being made here: what would branch the conversation waits until it is there. */
  setBusy(busy) {
    this.list.classList.toggle("busy", busy);
    this.list.setAttribute("aria-busy", String(busy));
    for (const button of this.list.querySelectorAll("[data-branches]")) button.disabled = busy;
  }

  /** The switch between versions of a message, where it has several. */
  versionSwitch(node) {
    const all = versions(this.conversation, node);
    if (all.length < 2) return [];
    const at = all.findIndex(({ id }) => id === node.id);
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.actions.showVersion(all[to]));
      button.dataset.branches = "";
      button.disabled = !all[to];
      return all[to] ? button : Object.assign(button, { hidden: true });
    };
    const count = el("span", { class: "version" }, `${at + 1} of ${all.length}`);
    return [step("left", "Earlier version", at - 1), count, step("right", "Later version", at + 1)];
  }
}

function branching(button) {
  button.dataset.branches = "";
  return button;
}

class Question {
  constructor(node, thread) {
    this.node = node;
    this.thread = thread;
    this.element = el("article", { class: "question" });
    this.#show();
  }

  #show() {
    const copyButton = iconButton("copy", "Copy message", () => copy(this.node.content, copyButton));
    const edit = branching(iconButton("edit", "Edit and send again", () => this.#edit()));
    this.element.replaceChildren(
      el("h2", { class: "visually-hidden" }, "You"),
      el("div", { class: "bubble", dir: "auto" }, this.node.content),
      el("div", { class: "actions" }, ...this.thread.versionSwitch(this.node), copyButton, edit),
    );
  }

  #edit() {
    const area = el("textarea", { "aria-label": "Edit your message", dir: "auto", rows: "3" });
    area.value = this.node.content;
    const send = el("button", { type: "button", class: "primary" }, "Send");
    const cancel = el("button", { type: "button", class: "secondary" }, "Cancel");
    const close = () => {
      this.#show();
      this.element.querySelector("[aria-label^=Edit]").focus();
    };
    const resend = () => area.value.trim() && this.thread.actions.resend(this.node, area.value);
    cancel.addEventListener("click", close);
    send.addEventListener("click", resend);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        resend();
      }
    });
    const heading = el("h2", { class: "visually-hidden" }, "You");
    this.element.replaceChildren(heading, el("div", { class: "editor" }, area, el("div", { class: "row" }, cancel, send)));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

class Answer {
  #touched = false;

  constructor(node, thread) {
    this.node = node;
    this.thread = thread;
    this.seconds = el("span", { class: "thought-time" });
    this.fold = el("details", { class: "thoughts" });
    const summary = el("summary", {}, icon("think"), this.seconds, icon("down"));
    summary.addEventListener("click", () => (this.#touched = true));
    const thoughtBody = el("div", { class: "prose" });
    this.fold.append(summary, thoughtBody);
    this.body = el("div", { class: "prose answer-text" });
    this.wait = el("p", { class: "wait" });
    this.problem = el("div", { class: "problem", role: "alert", hidden: true });
    this.footer = el("div", { class: "actions" });
    const heading = el("h2", { class: "visually-hidden" }, "Answer");
    this.element = el("article", { class: "answer" }, heading, this.fold, this.body, this.wait, this.problem, this.footer);
    this.thoughts = new LiveMarkdown(thoughtBody);
    this.text = new LiveMarkdown(this.body);
    this.thoughts.set(node.thoughts ?? "");
    this.text.set(node.content);
    this.settle();
  }

  /** Called after each drawing of new text. */
  set onDraw(call) {
    this.thoughts.onDraw = call;
    this.text.onDraw = call;
  }

  /** The answer is on its way; what there is of it already stays. */
  begin() {
    const { thoughts = "", content } = this.node;
    this.element.classList.add("running");
    this.footer.replaceChildren();
    this.problem.hidden = true;
    this.thoughts.restart(thoughts);
    this.text.restart(content);
    this.fold.open = !content;
    if (content) this.thoughts.finish();
    if (!thoughts && !content) this.waiting("Reading the prompt");
  }

  waiting(text) {
    this.wait.textContent = text;
    this.wait.hidden = false;
  }

  /** `seconds` of thinking so far. */
  thinking(text, seconds) {
    this.wait.hidden = true;
    if (this.fold.hidden) {
      this.fold.hidden = false;
      this.fold.open = true;
    }
    this.thoughts.push(text);
    this.#showSeconds("Thinking", seconds);
  }

  answering(text) {
    this.wait.hidden = true;
    if (!this.node.content && this.node.thoughts) this.#foldThoughts();
    this.text.push(text);
  }

  tick(seconds) {
    if (seconds !== null) this.#showSeconds("Thinking", seconds);
  }

  #foldThoughts() {
    this.thoughts.finish();
    this.#showSeconds("Thought for", this.node.seconds);
    if (!this.#touched) this.fold.open = false;
  }

  #showSeconds(words, seconds) {
    const text = `${words} ${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
    if (this.seconds.textContent !== text) this.seconds.textContent = text;
  }

  /** Draw what is left, and what is known now that the answer has ended. */
  settle() {
    const { node } = this;
    this.element.classList.remove("running");
    this.wait.hidden = true;
    this.text.finish();
    this.thoughts.finish();
    this.fold.hidden = !node.thoughts;
    if (node.thoughts) this.#showSeconds("Thought for", node.seconds ?? 0);
    this.problem.hidden = !node.error;
    if (node.error) this.#showProblem(node.error);
    this.footer.replaceChildren(...this.thread.versionSwitch(node), ...this.#buttons(), ...figures(node));
  }

  #buttons() {
    const copyButton = iconButton("copy", "Copy answer", () => copy(this.node.content, copyButton));
    const again = branching(iconButton("again", "Answer again", () => this.thread.actions.regenerate(this.node)));
    // A failure has its own button, which says the same.
    return [...(this.node.content ? [copyButton] : []), ...(this.node.error ? [] : [again])];
  }

  #showProblem({ kind, message }) {
    const retry = branching(el("button", { type: "button", class: "secondary" }, "Try again"));
    retry.addEventListener("click", () => this.thread.actions.regenerate(this.node));
    const buttons = el("div", { class: "row" }, retry);
    if (kind === "key") {
      const key = el("button", { type: "button", class: "primary" }, "Enter API key");
      key.addEventListener("click", () => this.thread.actions.askForKey());
      buttons.prepend(key);
    }
    this.problem.replaceChildren(el("p", {}, message), buttons);
  }
}

const ENDINGS = { length: "reached the longest answer allowed", stopped: "stopped", cut: "left incomplete" };

/** Tokens, tokens per second and how the answer ended, in one quiet line. */
function figures(node) {
  const words = [];
  const { usage, rate } = node;
  if (ENDINGS[node.finish]) words.push(ENDINGS[node.finish]);
  if (usage) {
    const reasoning = usage.completion_tokens_details?.reasoning_tokens;
    words.push(`${count(usage.completion_tokens)} ${usage.completion_tokens === 1 ? "token" : "tokens"}${reasoning ? ` (${count(reasoning)} of thought)` : ""}`);
  }
  if (rate) words.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  if (usage) {
    const cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens;
    words.push(`prompt ${count(usage.prompt_tokens)}${cached ? ` (${count(cached)} cached)` : ""}`);
  }
  return words.length ? [el("span", { class: "figures" }, words.join(" · "))] : [];
}

export function count(number) {
  return Number(number).toLocaleString("en");
}
