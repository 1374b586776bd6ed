/** TeX in Markdown: `$…$` and `\(…\)` in a line, `$$…$$` and `\[…\]` on their own; drawn as MathML by Temml. */

import { el, scrollsSideways } from "./dom.js";

const LONGEST = 20_000; // characters; what is longer stays source text

/** A markdown-it plugin that makes `math_inline` and `math_block` tokens with the TeX as their content. */
export function mathTokens(md) {
  md.inline.ruler.before("escape", "math_inline", inlineMath);
  md.block.ruler.before("fence", "math_block", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
}

const INLINE = [
  { open: "$$", close: "$$", display: true },
  { open: "\\[", close: "\\]", display: true },
  { open: "\\(", close: "\\)", display: false },
  { open: "$", close: "$", display: false },
];

function inlineMath(state, silent) {
  const { src, pos } = state;
  const first = src[pos];
  if (first !== "$" && first !== "\\") return false;
  const form = INLINE.find(({ open }) => src.startsWith(open, pos));
  if (!form) return false;
  const start = pos + form.open.length;
  const end = closing(src, start, form.close, state.posMax);
  if (end < 0 || !src.slice(start, end).trim()) return false;
  if (form.open === "$" && !readsAsMath(src, start, end)) return false;
  if (!silent) {
    const token = state.push("math_inline", "", 0);
    token.content = src.slice(start, end);
    token.meta = { display: form.display, source: src.slice(pos, end + form.close.length) };
  }
  state.pos = end + form.close.length;
  return true;
}

/** Pandoc's rule, which keeps "$5 and $6" prices: no space inside the dollars, no digit behind them. */
function readsAsMath(src, start, end) {
  return !/\s/.test(src[start]) && !/\s/.test(src[end - 1]) && !/\d/.test(src[end + 1] ?? "");
}

/** Where `close` stands unescaped at or after `start`; -1 where it does not. */
function closing(src, start, close, limit) {
  for (let at = src.indexOf(close, start); at >= 0 && at < limit; at = src.indexOf(close, at + 1)) {
    let slashes = 0;
    while (src[at - 1 - slashes] === "\\") slashes += 1;
    if (close[0] === "\\" || slashes % 2 === 0) return at;
  }
  return -1;
}

function blockMath(state, startLine, endLine, silent) {
  const lineText = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = lineText(startLine);
  const close = first.startsWith("$$") ? "$$" : first.startsWith("\\[") ? "\\]" : null;
  if (!close) return false;
  const lines = [];
  for (let line = startLine; line < endLine; line += 1) {
    if (line > startLine && state.sCount[line] < state.blkIndent && !state.isEmpty(line)) return false;
    const text = line === startLine ? first.slice(2) : lineText(line);
    const end = closing(text, 0, close, text.length);
    if (end < 0) {
      lines.push(text);
      continue;
    }
    if (text.slice(end + 2).trim()) return false; // words follow: it is a formula within a paragraph
    lines.push(text.slice(0, end));
    return silent || pushBlock(state, startLine, line + 1, lines, close, true);
  }
  // A formula whose end is still to come must not be read as Markdown meanwhile.
  return Boolean(state.env.streaming) && (silent || pushBlock(state, startLine, endLine, lines, close, false));
}

function pushBlock(state, startLine, nextLine, lines, close, complete) {
  const token = state.push("math_block", "", 0);
  token.block = true;
  token.content = lines.join("\n").trim();
  token.map = [startLine, nextLine];
  const open = close === "$$" ? "$$" : "\\[";
  token.meta = { display: true, complete, source: `${open}\n${token.content}\n${complete ? close : ""}` };
  state.line = nextLine;
  return true;
}

/** The element for a math token: MathML, or the source where it is unfinished or no TeX. */
export function mathElement(token) {
  const { display, complete = true, source } = token.meta;
  const holder = el("span", { class: display ? "math-display" : "math-inline" });
  if (!complete || token.content.length > LONGEST || !draw(token.content, holder, display)) {
    return el("code", { class: display ? "math-source math-display" : "math-source" }, source);
  }
  return display ? scrollsSideways(holder, "Formula") : holder;
}

function draw(tex, holder, display) {
  try {
    // A fresh macro table for each: a formula must not redefine another's commands.
    globalThis.temml.render(tex, holder, {
      displayMode: display,
      throwOnError: true,
      trust: false,
      maxSize: [20, 20],
      maxExpand: 500,
      macros: {},
      annotate: true,
    });
  } catch {
    return false; // a stranger's TeX can fail in any way, deep recursion included
  }
  // `\label` writes ids, which are the page's own to give.
  for (const node of holder.querySelectorAll("[id]")) node.removeAttribute("id");
  return true;
}
