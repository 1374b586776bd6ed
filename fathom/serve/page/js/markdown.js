/**
 * Markdown to elements.
 *
 * Model output is hostile input. It is never parsed as HTML: markdown-it makes tokens, and this file makes one element
 * for each token of a kind it knows. An element or attribute that does not stand here cannot come out, whatever the
 * text holds; HTML in it is shown as text, pictures as links, and links lead to http, https and mailto alone.
 */

import markdownit from "../vendor/markdown-it.js";
import hljs from "../vendor/highlight.js";
import { el, iconButton, copy, scrollsSideways } from "./dom.js";
import { mathElement, mathTokens } from "./math.js";

const md = markdownit({ html: false, linkify: true, maxNesting: 40 }).use(mathTokens);
md.validateLink = (url) => safeUrl(url) !== null;
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

const TAGS = new Set("p blockquote ul ol li hr table thead tbody tr th td em strong s".split(" "));
// The page has the first two levels: a message's headings go below them.
const HEADINGS = { h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6" };
const LONGEST_HIGHLIGHTED = 200_000; // characters

/** Tokens of `text`; `env.streaming` says that more is to come. */
export function parse(text, env) {
  return md.parse(text, env);
}

/** Elements for markdown-it's block tokens. `highlight` false leaves code plain. */
export function build(tokens, { highlight = true } = {}) {
  const root = document.createDocumentFragment();
  const open = [root];
  for (const token of tokens) addToken(token, open, highlight);
  return root;
}

/** Add one token to the innermost of the `open` elements. A loop and a stack, for nesting is the writer's choice. */
function addToken(token, open, highlight) {
  const parent = open.at(-1);
  if (token.nesting === 1) {
    if (token.hidden) open.push(parent); // the paragraph of a tight list's item
    else open.push(openElement(token, parent));
  } else if (token.nesting === -1) {
    open.pop();
  } else if (token.type === "inline") {
    const inner = [parent];
    for (const child of token.children) addToken(child, inner, highlight);
  } else {
    parent.append(leaf(token, highlight));
  }
}

function openElement(token, parent) {
  const node = element(token);
  if (token.tag === "table") parent.append(scrollsSideways(el("div", { class: "table-holder" }, node), "Table"));
  else parent.append(node);
  return node;
}

function element(token) {
  if (token.type === "link_open") return link(token.attrGet("href"));
  if (token.type === "heading_open") return el(HEADINGS[token.tag] ?? "h6", { dir: "auto" });
  if (!TAGS.has(token.tag)) return el("span");
  const node = el(token.tag, { dir: ["p", "li", "td", "th"].includes(token.tag) ? "auto" : null });
  if (token.tag === "ol" && token.attrGet("start") !== null) node.setAttribute("start", token.attrGet("start"));
  const align = /^text-align:(left|center|right)$/.exec(token.attrGet("style") ?? "");
  if (align) node.classList.add(`align-${align[1]}`);
  return node;
}

function leaf(token, highlight) {
  switch (token.type) {
    case "fence":
      return codeBlock(token.content, token.info.trim().split(/\s+/)[0], highlight);
    case "code_block":
      return codeBlock(token.content, "", highlight);
    case "code_inline":
      return el("code", {}, token.content);
    case "math_inline":
    case "math_block":
      return mathElement(token);
    case "image":
      return picture(token);
    case "hardbreak":
    case "softbreak": // models end a line where they mean it to end
      return el("br");
    case "hr":
      return el("hr");
    default:
      return document.createTextNode(token.content);
  }
}

/** The address if it is one that a person may follow from here, else null. */
function safeUrl(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative addresses too: they would lead into this service
  }
}

function link(address) {
  const href = safeUrl(address);
  if (href === null) return el("span");
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** A picture would tell its host that this answer was read: it becomes a link. */
function picture(token) {
  const node = link(token.attrGet("src"));
  node.append(`Picture: ${token.content || "without a description"}`);
  return node;
}

function codeBlock(source, language, highlight) {
  const code = el("code");
  const known = hljs.getLanguage(language);
  if (highlight && known && source.length <= LONGEST_HIGHLIGHTED) {
    addScopes(code, hljs.highlight(source, { language, ignoreIllegals: true })._emitter.rootNode);
  } else {
    code.textContent = source;
  }
  const button = iconButton("copy", "Copy code", () => copy(source, button));
  const name = language.slice(0, 30) || "text";
  const head = el("div", { class: "code-head" }, el("span", {}, name), button);
  return el("div", { class: "code" }, head, scrollsSideways(el("pre", {}, code), `Code, ${name}`));
}

/** highlight.js's tree: strings, and nodes with a scope such as `title.function`. */
function addScopes(parent, node) {
  for (const child of node.children) {
    if (typeof child === "string") {
      parent.append(child);
    } else {
      const span = child.scope ? el("span", { class: scopeClass(child.scope) }) : parent;
      addScopes(span, child);
      if (span !== parent) parent.append(span);
    }
  }
}

function scopeClass(scope) {
  return scope.startsWith("language:") ? "" : `hljs-${scope.split(".")[0]}`;
}
