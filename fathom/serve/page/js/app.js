/** The page: which conversation is shown, what runs, and what each control does. */

import { ChatError, listModels } from "./api.js";
import { Composer } from "./composer.js";
import { askDelete, askName, askSettings } from "./dialogs.js";
import { announce, dismissNotice, el, notify } from "./dom.js";
import { Run, requestFor } from "./run.js";
import { Scroller } from "./scroll.js";
import { Sidebar } from "./sidebar.js";
import { Store, addNode, changedElsewhere, path, showVersion } from "./store.js";
import { Thread, count } from "./thread.js";
import { setUpTheme } from "./theme-button.js";

const ANNOUNCED = 1500; // characters of an answer that a screen reader is given at its end

const byId = (id) => document.getElementById(id);
const store = new Store(() =>
  notify("The browser's storage is full or switched off: new messages are not being kept. Export or delete older conversations."),
);
const runs = new Map(); // conversation id -> Run
let models = [];
let current = store.create();

const thread = new Thread(byId("messages"), { regenerate, resend, showVersion: chooseVersion, askForKey: () => changeSettings("key") });
const sidebar = new Sidebar(store, { open: openConversation, rename, exportFile, remove });
const scroller = new Scroller(byId("scroll"), byId("latest"));
const composer = new Composer({
  send: (text) => answer(addNode(current, current.leaf, "user", text)),
  stop,
  write: (text) => store.saveDraft(current, text),
  change: (changes) => {
    store.saveSettings(changes);
    settings = { ...settings, ...changes };
    showControls();
  },
});
let settings = store.settings();

function model() {
  return models.find(({ id }) => id === settings.model) ?? models[0] ?? null;
}

async function loadModels() {
  try {
    models = await listModels();
    dismissNotice();
  } catch (error) {
    if (!(error instanceof ChatError)) throw error;
    notify(error.message, error.kind === "key" ? ["Enter API key", () => changeSettings("key")] : ["Try again", loadModels]);
  }
  byId("model").replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  byId("model").hidden = models.length < 2;
  byId("only-model").hidden = models.length !== 1;
  byId("only-model").textContent = models.length === 1 ? models[0].id : "";
  if (model()) byId("model").value = model().id;
  showControls();
}

/** Everything around the messages, in step with the state. */
function showControls() {
  const busy = runs.has(current.id);
  composer.show(settings, model());
  composer.setBusy(busy);
  thread.setBusy(busy);
  sidebar.show(current.id, runs);
  byId("title").textContent = current.title;
  document.title = current.leaf === null ? "Fathom" : `${current.title} · Fathom`;
  byId("welcome").hidden = current.leaf !== null;
  showContext();
}

function showContext() {
  const total = path(current).findLast(({ usage }) => usage)?.usage.total_tokens;
  const context = model()?.context;
  byId("context").textContent = total && context ? `${count(total)} of ${count(context)} tokens of context` : "";
  byId("context").classList.toggle("near-full", total / context > 0.8);
}

function showConversation(conversation) {
  current = conversation;
  thread.show(conversation);
  const run = runs.get(conversation.id);
  if (run) rejoin(run);
  composer.write(store.draft(conversation));
  showControls();
  scroller.toEnd();
}

/** A conversation that is being answered comes back on the page. */
function rejoin(run) {
  const view = thread.view(run.node.id);
  if (!view) return;
  view.begin();
  view.onDraw = () => scroller.follow();
}

function openConversation(id) {
  sidebar.setOpen(false);
  const conversation = store.open(id);
  if (!conversation) {
    notify("This conversation is gone or cannot be read.", ["Remove it from the list", () => forget(id)]);
    return;
  }
  location.hash = id;
  showConversation(conversation);
  composer.text.focus();
}

function newConversation() {
  sidebar.setOpen(false);
  history.replaceState(null, "", location.pathname + location.search);
  showConversation(store.create());
  composer.text.focus();
}

/** Answer the user's message `question`, which is at the end of the path. */
async function answer(question) {
  const conversation = current;
  const node = addNode(conversation, question.id, "assistant");
  node.model = model()?.id;
  if (!thread.view(question.id)) thread.add(question);
  const view = thread.add(node);
  view.onDraw = () => scroller.follow();
  const save = () => store.open(conversation.id) === conversation && store.save(conversation);
  const run = new Run(conversation, node, () => (current === conversation ? thread.view(node.id) : undefined), save);
  runs.set(conversation.id, run);
  save();
  history.replaceState(null, "", `#${conversation.id}`);
  showControls();
  scroller.toEnd();
  announce("Waiting for the answer");
  await run.fill(requestFor(conversation, node, model(), settings));
  runs.delete(conversation.id);
  showControls();
  if (current !== conversation) return;
  scroller.follow();
  announceEnd(node, thread.view(node.id));
}

function announceEnd(node, view) {
  if (node.error || !view) return; // the alert speaks for itself
  const text = view.body.textContent.slice(0, ANNOUNCED);
  announce(node.finish === "stopped" ? "Stopped" : `Answer: ${text}`);
}

function stop() {
  runs.get(current.id)?.stop();
}

function regenerate(node) {
  if (runs.has(current.id) || !model()) return;
  if (node.error && !node.content && !node.thoughts) delete current.nodes[node.id]; // an empty failure is no version
  current.leaf = node.parent;
  thread.show(current);
  answer(current.nodes[node.parent]);
}

function resend(node, text) {
  if (runs.has(current.id) || !model()) return;
  const question = addNode(current, node.parent, "user", text.trim());
  thread.show(current);
  answer(question);
  composer.text.focus();
}

function chooseVersion(node) {
  showVersion(current, node);
  store.save(current);
  thread.show(current);
  showControls();
  thread.view(node.id).element.scrollIntoView({ block: "nearest" });
  thread.view(node.id).element.querySelector(".actions button:not([hidden])")?.focus();
}

async function rename(id) {
  const conversation = store.open(id);
  const name = conversation && (await askName(conversation.title));
  if (!name) return;
  conversation.title = name;
  conversation.named = true;
  store.save(conversation);
  showControls();
}

async function remove(id) {
  const title = store.list().find((entry) => entry.id === id)?.title ?? "";
  if (await askDelete(title)) forget(id);
}

function forget(id) {
  runs.get(id)?.stop();
  store.remove(id);
  if (id === current.id) newConversation();
  else showControls();
  byId("new").focus();
}

function exportFile(id) {
  const conversation = store.open(id);
  if (!conversation) return;
  const messages = path(conversation).map(({ role, content, thoughts }) => ({ role, content, ...(thoughts && { reasoning_content: thoughts }) }));
  const content = { format: "fathom-conversation", title: conversation.title, messages, tree: conversation };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation";
  el("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function changeSettings(focus) {
  const changes = await askSettings(settings, model(), typeof focus === "string" ? focus : undefined);
  if (!changes) return;
  store.saveSettings(changes);
  settings = store.settings();
  loadModels();
}

function onOtherTab(event) {
  const { list, id } = changedElsewhere(event);
  if (id && !runs.has(id)) {
    store.forget(id);
    const changed = id === current.id && store.open(id);
    if (changed) return showConversation(changed);
  }
  if (list) showControls();
}

byId("new").addEventListener("click", newConversation);
byId("settings").addEventListener("click", changeSettings);
byId("model").addEventListener("change", ({ target }) => composer.actions.change({ model: target.value }));
addEventListener("storage", onOtherTab);
addEventListener("hashchange", () => {
  const id = location.hash.slice(1);
  if (id && id !== current.id) openConversation(id);
});
addEventListener("pagehide", () => {
  for (const run of runs.values()) run.save();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
// The counting seconds of every thought in the making, also while no token comes.
setInterval(() => {
  const run = runs.get(current.id);
  run?.view()?.tick(run.thinkingSeconds);
}, 200);

setUpTheme(byId("theme"));
const wanted = store.open(location.hash.slice(1));
showConversation(wanted ?? current);
composer.text.focus();
loadModels();
