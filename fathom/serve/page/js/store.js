/**
 * Conversations and settings, kept in this browser.
 *
 * A conversation is a tree of messages: editing a question or asking for another answer adds a sibling, so nothing that
 * was said is lost. `leaf` is the message at the end of the path that is shown. Each lies under its own key of
 * localStorage; the index names them all, newest first.
 */

const INDEX = "fathom.index";
const PREFIX = "fathom.conversation.";
const DRAFT = "fathom.draft.";
const UNSENT = "new"; // stands for a conversation that has no message yet
const SETTINGS = "fathom.settings";
const KEY = "fathom.key";

const DEFAULTS = { model: "", system: "", temperature: "", maxTokens: "", budget: "", think: true, effort: "medium" };

/** Storage can be full, switched off, or hold what another program wrote: all of that reads as "not there". */
function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function isConversation(value) {
  return (
    value !== null &&
    typeof value === "object" &&
    typeof value.id === "string" &&
    typeof value.title === "string" &&
    value.nodes !== null &&
    typeof value.nodes === "object" &&
    Object.values(value.nodes).every((node) => typeof node?.content === "string" && typeof node.id === "string") &&
    endsAtTheTop(value)
  );
}

/** Whether every message's parents lead to the first one, not round in a circle. */
function endsAtTheTop({ nodes, leaf }) {
  if (leaf !== null && !Object.hasOwn(nodes, leaf)) return false;
  return Object.values(nodes).every(({ parent }) => {
    for (let steps = Object.keys(nodes).length; parent !== null; steps -= 1) {
      if (steps === 0 || !Object.hasOwn(nodes, parent)) return false;
      parent = nodes[parent].parent;
    }
    return true;
  });
}

export class Store {
  #opened = new Map();
  #onFull;

  /** `onFull` is called when the browser refuses to keep more. */
  constructor(onFull) {
    this.#onFull = onFull;
  }

  /** `{id, title, updated}` of each conversation, the latest first. */
  list() {
    const index = read(INDEX);
    const entries = Array.isArray(index) ? index.filter((entry) => typeof entry?.id === "string") : [];
    return entries.sort((a, b) => b.updated - a.updated);
  }

  create() {
    const conversation = { id: newId(), title: "New conversation", named: false, updated: Date.now(), nodes: {}, leaf: null };
    this.#opened.set(conversation.id, conversation);
    return conversation;
  }

  /** The conversation, or null where it is gone or unreadable. The same object each time, until `forget`. */
  open(id) {
    const known = this.#opened.get(id);
    if (known) return known;
    const stored = read(PREFIX + id);
    if (!isConversation(stored)) return null;
    this.#opened.set(id, stored);
    return stored;
  }

  /** Read it anew from the browser next time, for another tab has changed it. */
  forget(id) {
    this.#opened.delete(id);
  }

  save(conversation) {
    const entry = { id: conversation.id, title: conversation.title, updated: conversation.updated };
    this.#write(PREFIX + conversation.id, conversation);
    this.#write(INDEX, [entry, ...this.list().filter(({ id }) => id !== conversation.id)]);
  }

  remove(id) {
    this.#opened.delete(id);
    localStorage.removeItem(PREFIX + id);
    localStorage.removeItem(DRAFT + id);
    this.#write(INDEX, this.list().filter((entry) => entry.id !== id));
  }

  /** What has been written for a conversation and not been sent. */
  draft(conversation) {
    const text = read(draftKey(conversation));
    return typeof text === "string" ? text : "";
  }

  saveDraft(conversation, text) {
    if (text) this.#write(draftKey(conversation), text);
    else localStorage.removeItem(draftKey(conversation));
  }

  settings() {
    const stored = read(SETTINGS);
    return { ...DEFAULTS, ...(stored !== null && typeof stored === "object" ? stored : {}) };
  }

  saveSettings(changes) {
    this.#write(SETTINGS, { ...this.settings(), ...changes });
  }

  #write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch {
      this.#onFull();
    }
  }
}

function draftKey({ id, leaf }) {
  return DRAFT + (leaf === null ? UNSENT : id);
}

/** The API key lives as long as the tab, and is in no export. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Whether a change in another tab concerns the list, and which conversation it was. */
export function changedElsewhere(event) {
  return { list: event.key === INDEX || event.key === null, id: event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null };
}

function newId() {
  // crypto.randomUUID is missing over plain HTTP from another machine.
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Add a message below `parent` (an id, or null for the first) and make it the end of the path. */
export function addNode(conversation, parent, role, content = "") {
  const node = { id: newId(), parent, role, content, time: Date.now() };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = node.time;
  if (role === "user" && !conversation.named && parent === null) conversation.title = titleOf(content);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New conversation";
}

/** Messages from the first to `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const nodes = [];
  for (let id = leaf; id !== null; id = conversation.nodes[id].parent) nodes.unshift(conversation.nodes[id]);
  return nodes;
}

/** The versions of a message, oldest first, itself among them. */
export function versions(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((other) => other.parent === node.parent && other.role === node.role)
    .sort((a, b) => a.time - b.time);
}

/** Show the path through `node` that ends with the newest message below it. */
export function showVersion(conversation, node) {
  const all = Object.values(conversation.nodes).sort((a, b) => a.time - b.time);
  let end = node;
  for (let next = end; next; next = all.findLast((other) => other.parent === end.id)) end = next;
  conversation.leaf = end.id;
}
